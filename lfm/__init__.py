"""Flow matching in latent space (Dao, Phung, Nguyen, Tran, 2023): the library behind the pipeline's stages."""

__version__ = "0.1.0"
