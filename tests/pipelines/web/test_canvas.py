"""What is painted on the canvas of the page becomes the mask or the segmentation, pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lfm.errors import ConfigError
from pipelines.common import image_files
from pipelines.web import canvas

SIZES = st.sampled_from([8, 16, 60, 256])
LABELS = {0: "sky", 3: "sea", 17: "shore", 300: "ship"}


def drawn(ids: np.ndarray, labels: dict[int, str] = LABELS) -> np.ndarray:
    return canvas.enlarged(canvas.draw_map(ids, canvas.palette(labels)))


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(0, 2**32 - 1), st.integers(0, canvas.MOST_DIFFERENCE), st.booleans())
def test_a_map_survives_the_canvas_and_the_noise_of_browsers(size: int, seed: int, noise: int, has_alpha: bool) -> None:
    random = np.random.default_rng(seed)
    ids = random.choice(np.array(list(LABELS), np.uint16), (size, size))
    image = drawn(ids)
    noisy = (image + random.integers(-noise, noise + 1, image.shape)).clip(0, 255).astype(np.uint8)
    if has_alpha:
        noisy = np.dstack([noisy, np.full(noisy.shape[:2], 255, np.uint8)])
    assert np.array_equal(canvas.read_map(noisy, canvas.palette(LABELS), size), ids)


def test_the_edge_of_a_smooth_stroke_is_of_either_side() -> None:
    """The mean of two colours may be the colour of a third label, or of none."""
    ids = np.zeros((16, 16), np.uint8)
    ids[:, 8:] = 3
    image = drawn(ids).astype(float)
    image[:, 8 * 32 - 20 : 8 * 32 + 20] = image[:, [0, -1]].mean(1, keepdims=True)  # wider than half a cell
    result = canvas.read_map(image.astype(np.uint8), canvas.palette(LABELS), 16)
    assert np.array_equal(result, ids)
    image[:, 6 * 32 : 10 * 32] = image[:, [0, -1]].mean(1, keepdims=True)  # four whole cells
    result = canvas.read_map(image.astype(np.uint8), canvas.palette(LABELS), 16)
    assert (result[:, :6] == 0).all() and (result[:, 10:] == 3).all() and set(np.unique(result)) == {0, 3}


def test_a_canvas_of_another_size_is_resized() -> None:
    ids = np.arange(64).reshape(8, 8) % 4
    labels = {index: str(index) for index in range(4)}
    image = Image.fromarray(drawn(ids, labels)).resize((400, 400), Image.Resampling.NEAREST)
    assert np.array_equal(canvas.read_map(np.asarray(image), canvas.palette(labels), 8), ids)


def test_a_canvas_without_labels_is_one_line() -> None:
    black = np.zeros((512, 512, 3), np.uint8)
    with pytest.raises(ConfigError, match="none of the labels"):
        canvas.read_map(black, {0: (255, 255, 255), 1: (0, 0, 200)}, 16)


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(0, 2**32 - 1))
def test_a_mask_is_what_any_layer_covers(size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    masks, cell = random.random((2, size, size)) < 0.2, canvas.cell_size(size)
    layers = np.zeros((2, size * cell, size * cell, 4), np.uint8)
    for layer, mask in zip(layers, masks, strict=True):
        rows, columns = np.nonzero(mask)  # one painted pixel of each cell
        layer[rows * cell + random.integers(cell), columns * cell + random.integers(cell), 3] = 255
    mask = canvas.read_mask(list(layers), size)
    assert mask.dtype == np.uint8 and np.array_equal(mask == 1, masks.any(0))


def test_labels_have_the_colours_of_the_grids_and_are_told_apart() -> None:
    labels = {class_id: str(class_id) for class_id in (*range(256), 65535)}
    colours = canvas.palette(labels)
    assert len(set(colours.values())) == 257
    grid = image_files.colours(np.arange(256, dtype=np.uint16)[None])[0].round().astype(int)
    same = [tuple(grid[class_id].tolist()) == colours[class_id] for class_id in range(256)]
    assert sum(same) >= 254
