"""Raw samples -> latent samples: the posteriors of the images, of their mirror images and of the masked images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from lfm.autoencoder import Autoencoder, check_storable
from lfm.data.manifest import Manifest
from lfm.data.masks import at_latent_size, hide
from lfm.errors import DataError
from lfm.types import LatentSample, RawSample


@dataclass(frozen=True)
class ImageEncoder:
    """Encodes batches of raw samples, with the mirror image of each if `flips` is set.

    The mirror image is encoded by itself: its latent is not the mirrored latent of the image.
    """

    autoencoder: Autoencoder
    flips: bool

    def encode(self, batch: list[RawSample]) -> list[LatentSample]:
        """Encode samples of one image size that all have the same fields.

        Raises:
            DataError: a latent has values that float16 cannot hold.
        """
        if not batch:
            return []
        keys = [sample.key for sample in batch]
        images = np.stack([sample.image for sample in batch])
        posterior, posterior_flip = self._posteriors(images, keys)
        columns = {"posterior": posterior, "posterior_flip": posterior_flip}
        if batch[0].mask is not None:
            masks = np.stack([np.asarray(sample.mask) for sample in batch])
            masked, masked_flip = self._posteriors(hide(images, masks), keys)
            means = slice(self.autoencoder.latent_channels)
            columns["mask"] = at_latent_size(masks, self.autoencoder.downsample_factor)
            columns["masked"] = masked[:, means]
            columns["masked_flip"] = None if masked_flip is None else masked_flip[:, means]
        return [
            LatentSample(
                key=sample.key,
                class_index=sample.class_index,
                segmentation=sample.segmentation,
                **{name: column[row] for name, column in columns.items() if column is not None},
            )
            for row, sample in enumerate(batch)
        ]

    def example(self, raw: Manifest) -> LatentSample:
        """A sample of zeros with the fields, shapes and dtypes of every latent sample of a data set."""
        channels, size = self.autoencoder.latent_channels, self.autoencoder.latent_size(raw.image_size)
        posterior = np.zeros((2 * channels, size, size), np.float16)
        mean = posterior[:channels]
        has_masks = "mask" in raw.fields
        ids = np.zeros((raw.image_size, raw.image_size), ids_dtype(raw))
        return LatentSample(
            key="0",
            posterior=posterior,
            posterior_flip=posterior if self.flips else None,
            class_index=0 if raw.classes else None,
            mask=np.zeros((size, size), np.uint8) if has_masks else None,
            masked=mean if has_masks else None,
            masked_flip=mean if has_masks and self.flips else None,
            segmentation=ids if "segmentation" in raw.fields else None,
        )

    def _posteriors(self, images: np.ndarray, keys: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """The posteriors of images, uint8 (B, H, W, 3), and of their mirror images: float16 (B, 2C, h, w) each."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        posterior = self._posterior(pixels, keys)
        return posterior, self._posterior(pixels.flip(3), keys) if self.flips else None

    def _posterior(self, images: torch.Tensor, keys: list[str]) -> np.ndarray:
        """Mean and then std, as the shards hold them."""
        posterior = self.autoencoder.encode(images)
        check_storable(posterior, keys)
        return torch.cat([posterior.mean, posterior.std], dim=1).to(torch.float16).cpu().numpy()


def checked(samples: Iterable[RawSample], raw: Manifest, path: str) -> Iterator[RawSample]:
    """Yield the samples of a shard, with class ids of one dtype; a constant stride needs samples of one shape.

    Raises:
        DataError: a sample has another size, a missing field, or a class id that is no label of the data set.
    """
    required = [*raw.fields, "class_index"] if raw.classes else [*raw.fields]
    for sample in samples:
        if sample.image.shape != (raw.image_size, raw.image_size, 3):
            raise DataError(
                f"{path}: sample {sample.key} has the shape {sample.image.shape}, and not the size {raw.image_size} of "
                "the data set; shard it again"
            )
        for name in required:
            if getattr(sample, name) is None:
                raise DataError(f"{path}: sample {sample.key} has no {name}; shard it again")
        if raw.classes and not 0 <= (sample.class_index or 0) < len(raw.classes):
            raise DataError(
                f"{path}: sample {sample.key} has the class {sample.class_index}, of {len(raw.classes)}; shard it again"
            )
        ids = sample.segmentation
        if ids is None:
            yield sample
            continue
        if ids.max() >= raw.num_labels:
            raise DataError(
                f"{path}: sample {sample.key} has the class id {ids.max()}, above all labels; shard it again"
            )
        yield replace(sample, segmentation=ids.astype(ids_dtype(raw)))


def ids_dtype(raw: Manifest) -> type[np.unsignedinteger]:
    """The dtype of a data set's class ids in latent shards."""
    return np.uint8 if raw.num_labels <= 256 else np.uint16
