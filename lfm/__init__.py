"""Flow matching in latent space (Dao, Phung, Nguyen, Tran, 2023): the library behind the pipeline's stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm.inference.trained_model import TrainedModel

__version__ = "0.1.0"


def load(run: str, **options: Any) -> TrainedModel:
    """Load the model of a run folder, a checkpoint folder or a weights file; see `lfm.inference.trained_model.load`."""
    from lfm.inference import trained_model  # here, so that `import lfm` needs no torch

    return trained_model.load(run, **options)
