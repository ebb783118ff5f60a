"""The types that modules exchange, in the order in which an image passes through the pipeline.

B batch; H W pixels; h w latent size; C latent channels; K condition channels. Time 0 is data, time 1 is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # the stages that never touch a tensor start without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)  # there is one for every image of a source
class SourceItem:
    """One image of a source before it is read: the names under which the source reads its parts."""

    image: str
    class_index: int | None = None
    segmentation: str | tuple[tuple[int, str], ...] | None = (
        None  # a map, or a class id and a mask for each of its parts
    )
    mask: str | None = None
    columns: Mapping[str, Any] | None = field(default=None, compare=False)  # the rest of its row in a label file


@dataclass(frozen=True)
class RawSample:
    """One image as stored in raw shards."""

    key: str  # digits only, since webdataset splits the name of a member at its first dot
    image: np.ndarray  # uint8 (H, W, 3)
    class_index: int | None = None
    mask: np.ndarray | None = None  # uint8 (H, W), 1 = missing, to be filled
    segmentation: np.ndarray | None = None  # uint8 or uint16 (H, W), class ids
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Posterior:
    """Distribution of the latents of images: a diagonal Gaussian, unscaled."""

    mean: Tensor  # float32 (B, C, h, w)
    std: Tensor  # float32 (B, C, h, w); zero for a deterministic autoencoder


@dataclass(frozen=True)
class LatentSample:
    """One image as stored in latent shards."""

    key: str
    posterior: np.ndarray  # float16 (2C, h, w): mean, then std, unscaled
    posterior_flip: np.ndarray | None = None  # the same of the mirrored image
    class_index: int | None = None
    mask: np.ndarray | None = None  # uint8 (h, w), 1 = part of the cell is missing
    masked: np.ndarray | None = None  # float16 (C, h, w): posterior mean of the masked image
    masked_flip: np.ndarray | None = None
    segmentation: np.ndarray | None = None  # uint8 or uint16 (H, W), class ids


@dataclass(frozen=True)
class Condition:
    """Conditions of a batch; None for those that the model does not take."""

    class_index: Tensor | None = None  # int64 (B,); the number of classes stands for the null class
    spatial: Tensor | None = None  # float32 (B, K, h, w)
    segmentation: Tensor | None = None  # int64 (B, H, W), class ids; the number of labels stands for no label

    def rows(self, index: Tensor) -> Condition:
        """Return the condition of some rows of the batch, in the order of `index` (int64)."""
        return self._each(lambda value: value[index])

    def to(self, device: Any) -> Condition:
        """Return the condition on `device`, copied asynchronously from pinned memory."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def _each(self, change: Any) -> Condition:
        values = (self.class_index, self.spatial, self.segmentation)
        return Condition(*(value if value is None else change(value) for value in values))


@dataclass(frozen=True)
class LatentBatch:
    """A rank's part of one global batch, with all of its random numbers.

    `noise` and `uniform` come with the data because they, too, are functions of (seed, sample number).
    """

    sample_numbers: Tensor  # int64 (B,): each sample's number in the global order
    latents: Tensor  # float32 (B, C, h, w): drawn from the posterior, scaled
    noise: Tensor  # float32 (B, C, h, w): standard normal
    uniform: Tensor  # float32 (B,) in [0, 1): the time sampler maps it to a time
    condition: Condition
    kept_tokens: Tensor | None = None  # int64 (B, kept): numbers of the tokens that token dropout keeps

    def rows(self, index: Tensor) -> LatentBatch:
        """Return some rows of the batch, for one micro-batch."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        parts = {name: value[index] for name, value in values.items() if value is not None and name != "condition"}
        return replace(self, **parts, condition=self.condition.rows(index))


@dataclass(frozen=True)
class PathSample:
    """A batch of training examples: points of the probability path, and their velocities."""

    state: Tensor  # float32 (B, C, h, w)
    time: Tensor  # float32 (B,)
    velocity: Tensor  # float32 (B, C, h, w)


class Velocity(Protocol):
    """A velocity field over the rows of one batch, as the solvers call it."""

    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        """Return the velocity (A, C, h, w) at `state` (A, C, h, w) and `time` (A,).

        `rows`, int64 (A,), are the numbers of these rows in the batch: each row has its own condition, and an adaptive
        solver continues with those that are not finished.
        """


@dataclass(frozen=True)
class SolverResult:
    """Latents, and the cost of making them."""

    latents: Tensor  # float32 (B, C, h, w)
    nfe: Tensor  # int64 (B,): network evaluations per image, guidance counted double
