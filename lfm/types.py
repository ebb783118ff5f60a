"""The values that cross a module's border, in the order of an image's way through the pipeline.

B batch; H W pixels; h w latent size; C latent channels; K condition channels. Time 0 is data, time 1 is noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # the stages that never touch a tensor start without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)  # there is one for every image of a source
class SourceItem:
    """One image of a source, before anything of it is read: names that the source's store reads."""

    image: str
    class_index: int | None = None
    segmentation: str | tuple[tuple[int, str], ...] | None = None  # a map, or its parts: class id and mask
    mask: str | None = None


@dataclass(frozen=True)
class RawSample:
    """One image as the raw shards hold it."""

    key: str  # digits only: webdataset splits a member's name at its first dot
    image: np.ndarray  # uint8 (H, W, 3)
    class_index: int | None = None
    mask: np.ndarray | None = None  # uint8 (H, W), 1 = missing, to be filled
    segmentation: np.ndarray | None = None  # uint8 or uint16 (H, W), class ids
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Posterior:
    """What the autoencoder knows of an image's latent: a diagonal Gaussian, unscaled."""

    mean: Tensor  # float32 (B, C, h, w)
    std: Tensor  # float32 (B, C, h, w); zero for a deterministic autoencoder


@dataclass(frozen=True)
class LatentSample:
    """One image as the latent shards hold it."""

    key: str
    posterior: np.ndarray  # float16 (2C, h, w): mean, then std, unscaled
    posterior_flip: np.ndarray | None = None  # the same of the mirrored image
    class_index: int | None = None
    mask: np.ndarray | None = None  # uint8 (h, w), 1 = something in the cell is missing
    masked: np.ndarray | None = None  # float16 (C, h, w): the posterior mean of the image without what is missing
    masked_flip: np.ndarray | None = None
    segmentation: np.ndarray | None = None  # uint8 or uint16 (H, W), class ids


@dataclass(frozen=True)
class Condition:
    """What the model is told about each image; None where the model does not take it."""

    class_index: Tensor | None = None  # int64 (B,); the number of classes stands for the null class
    spatial: Tensor | None = None  # float32 (B, K, h, w)
    segmentation: Tensor | None = None  # int64 (B, H, W), class ids; the number of labels stands for no label

    def rows(self, index: Tensor) -> Condition:
        """The condition of some rows of the batch, in the order of `index` (int64)."""
        return self._each(lambda value: value[index])

    def to(self, device: Any) -> Condition:
        """The condition on `device`, copied without waiting where the memory is pinned."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def _each(self, change: Any) -> Condition:
        values = (self.class_index, self.spatial, self.segmentation)
        return Condition(*(value if value is None else change(value) for value in values))


@dataclass(frozen=True)
class LatentBatch:
    """A rank's part of one global batch, with all that is random about it.

    `noise` and `uniform` come with the data because they, too, are functions of (seed, sample number).
    """

    sample_numbers: Tensor  # int64 (B,): each sample's number in the global order
    latents: Tensor  # float32 (B, C, h, w): drawn from the posterior, scaled
    noise: Tensor  # float32 (B, C, h, w): standard normal
    uniform: Tensor  # float32 (B,) in [0, 1): what the time sampler makes a time of
    condition: Condition
    kept_tokens: Tensor | None = None  # int64 (B, kept): of each sample, where the model drops tokens in training

    def rows(self, index: Tensor) -> LatentBatch:
        """Some rows of the batch, for one micro-batch."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        parts = {name: value[index] for name, value in values.items() if value is not None and name != "condition"}
        return replace(self, **parts, condition=self.condition.rows(index))


@dataclass(frozen=True)
class PathSample:
    """A training example: a point of the probability path and the velocity there."""

    state: Tensor  # float32 (B, C, h, w)
    time: Tensor  # float32 (B,)
    velocity: Tensor  # float32 (B, C, h, w)


class Velocity(Protocol):
    """A velocity field over the rows of one batch, as the solvers call it."""

    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        """Velocity (A, C, h, w) at `state` (A, C, h, w) and `time` (A,).

        `rows` (int64 (A,)) tells which rows of the batch these are: an adaptive solver goes on with those that
        are not finished, and each row has its own condition.
        """


@dataclass(frozen=True)
class SolverResult:
    """Where the solver arrived, and at what cost."""

    latents: Tensor  # float32 (B, C, h, w)
    nfe: Tensor  # int64 (B,): network evaluations per image, guidance counted double
