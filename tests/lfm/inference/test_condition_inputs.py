"""Tests of condition inputs: they are cycled over the images, encoded one by one, and refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lfm
from lfm.errors import ConfigError
from lfm.inference.condition_inputs import Conditions, encode_conditions, with_classes
from lfm.inference.trained_model import TrainedModel
from tests.support.commands import Tasks

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
MASKS = np.zeros((2, 16, 16), dtype=np.uint8)
MASKS[:, 4:8, 4:8] = 255


@pytest.fixture(scope="module")
def inpainting(tasks: Tasks) -> TrainedModel:
    return lfm.load(str(tasks.runs / "inpaint"), autoencoder=str(tasks.autoencoder), device="cpu")


def encode(model: TrainedModel, **inputs: Any) -> Conditions:
    return encode_conditions(model.header, model.autoencoder, **inputs)


def test_inputs_are_cycled_over_the_images() -> None:
    maps = np.arange(2, dtype=np.uint16)[:, None, None].repeat(4, 1).repeat(4, 2)
    conditions = Conditions(torch.tensor([5, 6, 7]), torch.arange(2.0).view(2, 1, 1, 1), maps)
    condition = conditions.condition(range(2, 6))
    assert condition.class_index is not None and condition.class_index.tolist() == [7, 5, 6, 7]
    assert condition.spatial is not None and condition.spatial.flatten().tolist() == [0, 1, 0, 1]
    assert condition.segmentation is not None and condition.segmentation.dtype == torch.int64
    assert condition.segmentation[:, 0, 0].tolist() == [0, 1, 0, 1]


def test_a_condition_does_not_depend_on_others_or_on_hidden_pixels(inpainting: TrainedModel) -> None:
    both = encode(inpainting, images=IMAGES, masks=MASKS).spatial
    changed = np.where(MASKS[..., None] > 0, 255 - IMAGES, IMAGES)
    alone = encode(inpainting, images=changed[1:], masks=MASKS[1:] > 0).spatial
    assert both is not None and both.shape == (2, 5, 8, 8)
    assert alone is not None and torch.equal(both[1:], alone)
    assert both[0, -1].unique().tolist() == [0, 1] and both[0, -1].sum() == 4


def test_known_pixels_are_put_back(inpainting: TrainedModel) -> None:
    conditions = encode(inpainting, images=IMAGES, masks=MASKS)
    pixels = np.zeros((3, 16, 16, 3), np.uint8)
    result = conditions.composite(range(3), pixels)
    for number, image in enumerate(result):
        hidden = MASKS[number % 2] > 0
        assert not image[hidden].any() and np.array_equal(image[~hidden], IMAGES[number % 2][~hidden])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "^the model was trained to inpaint: needs `images` and `masks`$"),
        ({"images": IMAGES}, "needs `images` and `masks`$"),
        ({"images": IMAGES, "masks": MASKS[:1]}, "^`masks`: 1 for 2 images; "),
        (
            {"images": IMAGES[:, :8], "masks": MASKS[:, :8]},
            "^image 0: is 16 x 8 pixels, the model makes 16 x 16; scale",
        ),
        ({"images": IMAGES, "masks": MASKS * 0, "names": ["a.png", "b.png"]}, "^mask of a.png: nothing is missing; "),
        ({"images": IMAGES, "masks": MASKS, "segmentations": MASKS}, "leave out `segmentations`$"),
        ({"images": IMAGES, "masks": MASKS, "class_index": 1}, "^`class_index`: the model was trained without classes"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(
    inpainting: TrainedModel, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        encode(inpainting, **inputs)
    assert "\n" not in str(caught.value)


def test_the_id_of_pixels_without_a_label_is_not_counted_as_one(tasks: Tasks) -> None:
    model = lfm.load(str(tasks.runs / "semantic"), autoencoder=str(tasks.autoencoder), device="cpu")
    assert model.header.labels[255] == "unlabelled"
    message = (
        f"class id 100: the model knows {len(model.header.labels) - 1} labels: 0 sky, .*, \\.\\.\\., and 255 for pixels "
        "without one; draw with these$"
    )
    with pytest.raises(ConfigError, match=message):
        encode(model, segmentations=np.full((1, 16, 16), 100, np.uint8))


def test_all_classes_are_cycled_by_default() -> None:
    conditions = with_classes(Conditions(), None, 3)
    assert conditions.class_index is not None and conditions.class_index.tolist() == [0, 1, 2]
    assert with_classes(Conditions(), None, None).class_index is None
    chosen = with_classes(Conditions(), 2, 3).class_index
    assert chosen is not None and chosen.tolist() == [2]
