"""Scenes are pure, balanced and labelled rightly, and the recogniser reads them back, but nothing into noise."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.synthetic.scenes import CLASS_NAMES, SEGMENT_NAMES, SEGMENTS_BEHIND, Scene, draw_scene, recognise, segment

SIZE = 64


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(7, index, SIZE) for index in range(500)]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 2**32), size=st.integers(16, 48))
def test_a_scene_depends_on_its_number_alone(seed: int, index: int, size: int) -> None:
    scene = draw_scene(seed, index, size)
    np.random.seed(1)
    again = draw_scene(seed, index, size)
    assert scene.class_index == again.class_index
    for name in ("image", "segmentation", "mask"):
        assert getattr(scene, name).tobytes() == getattr(again, name).tobytes()
        assert getattr(scene, name).dtype == np.uint8
    assert scene.image.shape == (size, size, 3) and scene.segmentation.shape == scene.mask.shape == (size, size)


def test_scenes_differ(scenes: list[Scene]) -> None:
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)
    assert not np.array_equal(draw_scene(8, 0, SIZE).image, scenes[0].image)


@pytest.mark.parametrize("index", range(4))
def test_a_scene_is_the_same_at_every_size(index: int) -> None:
    small, large = draw_scene(3, index, 32), draw_scene(3, index, 96)
    assert small.class_index == large.class_index
    shrunk = large.image.reshape(32, 3, 32, 3, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 3


def test_classes_are_balanced(scenes: list[Scene]) -> None:
    counts = Counter(scene.class_index for scene in scenes)
    expected = len(scenes) / len(CLASS_NAMES)
    assert set(counts) == set(range(len(CLASS_NAMES)))
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 24.3, "chi squared, 0.1 %"


def test_the_mask_covers_the_shape_and_only_a_part(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert set(np.unique(scene.mask)) == {0, 1}
        assert scene.mask[scene.segmentation >= len(SEGMENTS_BEHIND)].all()
        assert 0.1 < scene.mask.mean() < 0.7


def test_the_segmentation_knows_the_class(scenes: list[Scene]) -> None:
    for scene in scenes:
        present = set(np.unique(scene.segmentation).tolist())
        shapes = {name for name in present if name >= len(SEGMENTS_BEHIND)}
        assert shapes == {len(SEGMENTS_BEHIND) + scene.class_index}
        assert SEGMENT_NAMES[shapes.pop()] == CLASS_NAMES[scene.class_index]
        assert {0, 1} <= present, "sky and ground"


def test_the_recogniser_reads_the_classes(scenes: list[Scene]) -> None:
    right = [recognise(scene.image) == scene.class_index for scene in scenes]
    assert np.mean(right) >= 0.98
    by_class = [np.mean([r for r, s in zip(right, scenes, strict=True) if s.class_index == c]) for c in range(8)]
    assert min(by_class) >= 0.9, dict(zip(CLASS_NAMES, by_class, strict=True))


def test_the_recogniser_reads_the_segments(scenes: list[Scene]) -> None:
    agreement = [(segment(scene.image) == scene.segmentation).mean() for scene in scenes]
    assert np.mean(agreement) >= 0.95
    assert np.quantile(agreement, 0.05) > 0.9


def test_nothing_is_read_into_noise() -> None:
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8) for _ in range(40)]
    waves = [np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(40)]
    flat = [np.full((SIZE, SIZE, 3), colour, np.uint8) for colour in ((0, 0, 0), (255, 255, 255), (200, 10, 10))]
    assert np.mean([recognise(image) is None for image in noise]) >= 0.9
    assert np.mean([recognise(image) is None for image in waves]) >= 0.8
    assert all(recognise(image) is None for image in flat)
    for image in (*noise[:3], *flat):
        assert segment(image).shape == (SIZE, SIZE) and segment(image).max() < len(SEGMENT_NAMES)


def test_a_scene_without_its_shape_has_no_class(scenes: list[Scene]) -> None:
    seen = []
    for scene in scenes[:60]:
        image = scene.image.copy()
        image[scene.mask == 1] = image[scene.mask == 0].mean(0).astype(np.uint8)
        seen.append(recognise(image))
    assert sum(label is None for label in seen) >= 55


def test_a_mild_blur_or_noise_does_not_hide_the_class(scenes: list[Scene]) -> None:
    """What a decoder does to an image."""
    random = np.random.default_rng(0)
    noisy = [np.clip(s.image + random.normal(0, 5, s.image.shape), 0, 255).astype(np.uint8) for s in scenes[:100]]
    right = [recognise(image) == s.class_index for image, s in zip(noisy, scenes, strict=False)]
    assert np.mean(right) >= 0.95
