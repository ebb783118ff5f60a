"""Tests of the metrics against recorded values, closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm.metrics.frechet import FeatureSums, Gaussian, frechet_distance, singular_warning
from lfm.metrics.inception_score import inception_score
from lfm.metrics.kid import kid, squared_discrepancy
from lfm.metrics.memorisation import nearest_samples
from lfm.metrics.paired import discrimination_scores, psnr, ssim
from lfm.metrics.precision_recall import density_coverage, precision_recall
from lfm.metrics.segmentation import Confusion
from tests.support.recorded_values import recorded


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(features: Tensor) -> Gaussian:
    return FeatureSums.of(features).gaussian()


# --- the recorded values -----------------------------------------------------------------------------------------


def test_the_recorded_frechet_distance() -> None:
    values = recorded("metrics")
    real, fake = gaussian(values["real"]), gaussian(values["fake"])
    torch.testing.assert_close(real.mean, values["mu_real"])
    torch.testing.assert_close(fake.covariance, values["sigma_fake"])
    assert frechet_distance(real, fake) == pytest.approx(2.002789839219261, rel=1e-6)
    few = frechet_distance(gaussian(values["real"][:40]), gaussian(values["fake"][:40]))
    assert few == pytest.approx(19.6292, rel=1e-4)


def test_the_recorded_inception_score() -> None:
    blocks = recorded("metrics")["is_probs"].split(77)
    ten, one = inception_score(blocks, 500), inception_score(blocks, 500, num_splits=1)
    assert (ten.mean, ten.deviation) == (pytest.approx(4.092953, rel=1e-6), pytest.approx(0.274065, rel=1e-5))
    assert one.mean == pytest.approx(4.375443, rel=1e-6)


def test_the_recorded_discrimination_scores() -> None:
    values = recorded("metrics")
    scores = discrimination_scores(values["real"], values["fake"])
    assert scores == pytest.approx((0.236, 0.298))


@pytest.mark.parametrize(
    ("count", "dimensions", "shift", "expected"),
    [
        (500, 64, 0.1, (0.198, 0.288)),
        (200, 16, 0.3, (0.17, 0.2725)),
        (60, 100, 0.1, (0.0, 0.0)),
        (1000, 8, 0.02, (0.452, 0.4605)),
    ],
)
def test_discrimination_scores_equal_those_of_the_exact_minimiser(
    count: int, dimensions: int, shift: float, expected: tuple[float, float]
) -> None:
    """The expected values were computed with Newton's method on the objective, to machine precision."""
    scores = discrimination_scores(normal(count, dimensions), normal(count, dimensions, seed=1) + shift)
    assert scores == pytest.approx(expected)


def test_kid_of_the_recorded_features_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    values = recorded("metrics")
    real, fake = values["real"].double(), values["fake"].double()
    assert kid(real, fake).mean == pytest.approx(float(poly_mmd(real, fake)), rel=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_neighbour_metrics_of_the_recorded_features_equal_brute_force(k: int) -> None:
    values = recorded("metrics")
    real, fake = (values[name].double().numpy()[:300] for name in ("real", "fake"))

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    def radii(a: np.ndarray) -> np.ndarray:
        return np.sort(distances(a, a), axis=1)[:, k]

    across = distances(real, fake)
    inside = across <= radii(real)[:, None]
    precision, recall = inside.any(0).mean(), (across <= radii(fake)).any(1).mean()
    expected = (precision, recall, inside.sum() / k / 300, inside.any(1).mean())
    features = torch.from_numpy(real), torch.from_numpy(fake)
    assert (*precision_recall(*features, k), *density_coverage(*features, k)) == pytest.approx(expected)
    nearest = nearest_samples(features[1], [features[0]], k=1)
    assert nearest.rows[:, 0].tolist() == across.argmin(0).tolist()


# --- the Frechet distance ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_the_distance_of_commuting_covariances_has_a_closed_form(variances: list[float], shifts: list[float]) -> None:
    first, second = torch.tensor(variances).double(), torch.tensor(variances[::-1]).double() + 0.5
    shift = torch.tensor(shifts[: len(variances)]).double()
    rotation = torch.linalg.qr(normal(len(variances), len(variances))).Q  # has no influence on the distance
    expected = shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    distance = frechet_distance(
        Gaussian(rotation @ shift, rotation @ first.diag() @ rotation.T, None),
        Gaussian(torch.zeros_like(shift), rotation @ second.diag() @ rotation.T, None),
    )
    assert distance == pytest.approx(float(expected), rel=1e-8, abs=1e-8)


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(1, 12))
def test_the_distance_to_itself_is_zero_and_symmetric(count: int, dimensions: int) -> None:
    first, second = gaussian(normal(count, dimensions)), gaussian(normal(count, dimensions, seed=1) * 2 + 1)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6)


def test_singular_covariances_give_a_finite_distance_and_a_warning() -> None:
    features = normal(40, 64) @ normal(64, 64, seed=1)
    few, same = gaussian(features[:20]), gaussian(torch.ones(40, 64))
    for first, second in ((few, few), (few, same), (same, few), (same, same)):
        assert math.isfinite(frechet_distance(first, second))
    assert "20 images in 64 dimensions" in str(singular_warning(few, gaussian(features)))
    assert singular_warning(gaussian(normal(65, 64)), gaussian(normal(65, 64))) is None


@settings(max_examples=20)
@given(st.lists(st.integers(1, 50), min_size=3, max_size=3))
def test_sums_of_parts_add_up_to_the_sums_of_all(sizes: list[int]) -> None:
    features = (normal(sum(sizes), 8) * 3 + 10).float()
    first, second, third = (FeatureSums.of(part) for part in features.split(sizes))
    merged, direct = (third + (first + second)).gaussian(), gaussian(features)
    assert merged.count == direct.count == sum(sizes)
    torch.testing.assert_close(merged.mean, direct.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged.covariance, direct.covariance, rtol=1e-10, atol=1e-10)


# --- KID ---------------------------------------------------------------------------------------------------------


def test_kid_is_unbiased_at_every_size() -> None:
    """In one dimension E (x y + 1)^3 follows from the moments of N(0, 1) and N(m, 1)."""
    m = 0.7
    centred = [1.0, 0.0, 1.0, 0.0]
    shifted = [1.0, m, m**2 + 1, m**3 + 3 * m]
    expected = sum(math.comb(3, i) * (centred[i] - shifted[i]) ** 2 for i in range(4))
    for size in (4, 30):
        values = torch.tensor(
            [
                squared_discrepancy(normal(size, 1, seed=seed), normal(size, 1, seed=10_000 + seed) + m)
                for seed in range(3000)
            ]
        )
        error = float(values.std() / math.sqrt(len(values)))
        assert abs(float(values.mean()) - expected) < 4 * error


def test_kid_of_subsets_is_near_that_of_all_and_deterministic() -> None:
    first, second = normal(600, 5), normal(500, 5, seed=1) + 0.5
    few = kid(first, second, num_subsets=50, subset_size=200)
    assert few.mean == pytest.approx(squared_discrepancy(first, second), abs=4 * few.deviation / math.sqrt(50) + 0.01)
    assert few == kid(first, second, num_subsets=50, subset_size=200)


# --- pairs and maps ----------------------------------------------------------------------------------------------


def test_discrimination_scores_of_separable_and_of_equal_features() -> None:
    scores = discrimination_scores(normal(50, 4), normal(50, 4, seed=1) + 100)
    assert scores == (0.0, 0.0)
    same = normal(50, 4)
    assert discrimination_scores(same, same).unpaired == 0.5


def test_psnr_and_ssim_of_known_images() -> None:
    image = torch.randint(0, 246, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert psnr(image, image + 10).tolist() == pytest.approx([10 * math.log10(255**2 / 100)] * 2)
    assert psnr(image, image).tolist() == [100, 100]
    assert ssim(image, image).tolist() == pytest.approx([1, 1])
    assert ssim(image[:1], 255 - image[:1]).shape == (1,)
    assert float(ssim(image[:1], 255 - image[:1])) < 0


def test_confusion_counts_pixels() -> None:
    true = torch.tensor([[[0, 0, 1], [1, 2, 255]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 1, 1]]])
    both = Confusion.of(predicted, true, 4)
    assert both.pixel_accuracy == pytest.approx(3 / 5)
    assert both.mean_iou == pytest.approx((1 / 2 + 2 / 4 + 0) / 3), "class 3 does not occur, 255 is ignored"
    rows = [Confusion.of(predicted[:, row : row + 1], true[:, row : row + 1], 4) for row in range(2)]
    assert torch.equal((rows[0] + rows[1]).pixels, both.pixels)
