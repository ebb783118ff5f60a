"""The intermediate states of images on their way from noise, recorded while a solver runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lfm.data.random_draws import image_noise
from lfm.inference.trained_model import TrainedModel
from pipelines.common.sample_jobs.sample_plan import PlannedImage

NUM_IMAGES, NUM_FRAMES = 6, 10
MIN_CELL_PIXELS = 64  # smaller images are enlarged


class FrameRecorder:
    """A step callback that records the states (B, C, h, w) of NUM_FRAMES equidistant times from 1 to 0.

    The state of a frame is the last one that the solver reached at or before its time.
    """

    def __init__(self, noise: Tensor) -> None:
        self.times = torch.linspace(1, 0, NUM_FRAMES, dtype=torch.float64).tolist()
        self.states = noise.expand(NUM_FRAMES, *noise.shape).clone()  # (frames, B, C, h, w)

    def __call__(self, at: Tensor, state: Tensor, rows: Tensor) -> None:
        for frame, frame_time in enumerate(self.times):
            reached = at >= frame_time - 1e-9
            self.states[frame, rows[reached]] = state[reached]


def record_frames(model: TrainedModel, images: Sequence[PlannedImage]) -> FrameRecorder:
    """Return the step callback that records the states of a batch of images, from their noise on."""
    noise = image_noise([image.seed for image in images], model.latent_shape)
    return FrameRecorder(torch.from_numpy(noise).to(model.device))


def decode_frames(model: TrainedModel, recorder: FrameRecorder, batch_size: int) -> np.ndarray:
    """Decode the frames of the first NUM_IMAGES images: uint8 (NUM_FRAMES, B, H, W, 3)."""
    return np.stack([model.decode(states, batch_size) for states in recorder.states[:, :NUM_IMAGES]])


def enlargement(model: TrainedModel) -> int:
    """Return the whole number by which the cells of a sheet of frames are enlarged."""
    return max(1, MIN_CELL_PIXELS // model.header.image_size)
