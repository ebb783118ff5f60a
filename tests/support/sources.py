"""Runs to start training from."""

from __future__ import annotations

from pathlib import Path

from lfm import weights_file
from lfm.data import manifest as manifests
from lfm.models.dit_config import DiTConfig
from lfm.weights_file import WeightsHeader, save_weights
from tests.support.commands import SmallSet
from tests.support.models import randomized_dit


def save_source(small_set: SmallSet, folder: Path, names: tuple[str, ...], **fields: object) -> Path:
    """Write a run of random weights whose classes have these names."""
    record = manifests.load(str(small_set.latents), "latents").autoencoder
    assert record is not None
    shape = {"num_classes": len(names), "condition_dropout": 0.1} | fields
    model = randomized_dit(DiTConfig(4, 8, 2, 32, 2, 2, frequency_shift=1, **shape))
    classes = tuple(manifests.ClassRecord(index=index, name=name, count=1) for index, name in enumerate(names))
    header = WeightsHeader(model.config, record, 16, classes, 64, "digest", "test")
    folder.mkdir()
    save_weights(str(folder / weights_file.WEIGHTS), model.state_dict(), header)
    return folder
