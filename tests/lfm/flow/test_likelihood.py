"""Against densities that are known, and against each other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lfm import weights_file
from lfm.data import manifest as manifests
from lfm.errors import ConfigError
from lfm.flow.likelihood import log_likelihood
from lfm.models.dit_config import DiTConfig
from lfm.solvers import Solving
from lfm.types import Condition
from lfm.weights_file import WeightsHeader, save_weights
from tests.support.commands import SmallSet, Tasks, assert_one_line, lfm
from tests.support.models import randomized_dit

MEAN, STD = 0.4, torch.linspace(0.3, 1.8, 8, dtype=torch.float64).view(2, 2, 2)


class OfNormalData(nn.Module):
    """The velocity of the linear path from independent normal values, each with a spread of its own."""

    def forward(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        t = time.view(-1, 1, 1, 1)
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        return slope * (state - (1 - t) * MEAN) - MEAN


def signs(latents: Tensor) -> Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).sign()


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("solving", [Solving("dopri5"), Solving("rk4", num_steps=60)])
def test_the_density_of_normal_values_is_found(estimator: str, solving: Solving) -> None:
    latents = MEAN + STD * torch.randn(5, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    density = torch.distributions.Normal(MEAN, STD).log_prob(latents).flatten(1).sum(1)
    found = log_likelihood(
        *(OfNormalData(), latents, Condition()),
        solving=solving,
        signs=signs(latents) if estimator == "hutchinson" else None,  # exact too: the derivative is diagonal
    )
    torch.testing.assert_close(found.bits_per_dim, -density / (8 * math.log(2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.noise, (latents - MEAN) / STD, atol=1e-3, rtol=0)
    assert (found.nfe == 240).all() if solving.solver == "rk4" else (found.nfe > 10).all()


def test_hutchinsons_estimate_has_the_exact_mean_and_no_row_depends_on_another() -> None:
    model = randomized_dit(DiTConfig(2, 4, 2, 16, 1, 2, num_classes=3)).double()
    latents = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    condition, solving = Condition(torch.tensor([0, 2])), Solving("rk4", num_steps=6)
    exact = log_likelihood(model, latents, condition, solving=solving).bits_per_dim
    alone = log_likelihood(model, latents[1:], Condition(torch.tensor([2])), solving=solving).bits_per_dim
    torch.testing.assert_close(alone, exact[1:])
    many, count = latents.repeat(200, 1, 1, 1), 200
    repeated = Condition(torch.tensor([0, 2]).repeat(count))
    estimates = log_likelihood(model, many, repeated, solving=solving, signs=signs(many)).bits_per_dim.view(count, 2)
    error = estimates.std(0) / math.sqrt(count)
    assert (estimates.std(0) > 0).all() and ((estimates.mean(0) - exact).abs() < 4 * error).all()


def test_a_stochastic_solver_is_refused() -> None:
    with pytest.raises(ConfigError, match="`solver` sde: the likelihood needs"):
        log_likelihood(OfNormalData(), torch.zeros(1, 2, 2, 2), Condition(), solving=Solving("sde"))


def test_the_command_measures_a_data_set(small_set: SmallSet, tasks: Tasks, tmp_path: Path) -> None:
    manifest = manifests.load(str(small_set.latents), "latents")
    assert manifest.autoencoder is not None
    model = randomized_dit(DiTConfig(4, 8, 4, 16, 1, 2, num_classes=8, condition_dropout=0.1))
    header = WeightsHeader(model.config, manifest.autoencoder, 16, manifest.classes, 64, manifest.digest, "test")
    save_weights(str(tmp_path / weights_file.WEIGHTS), model.state_dict(), header)
    common = ("likelihood", tmp_path, small_set.latents, "--solver", "heun", "--num-steps", 3, "--rows", "0-4,30")
    found = {}
    for batch_size in (1, 6):
        out = tmp_path / f"{batch_size}.json"
        result = lfm(*common, "--out", out, "--batch-size", batch_size)
        assert result.exit_code == 0 and "bits per dimension, 6 network evaluations" in result.stdout, result.stderr
        found[batch_size] = json.loads(out.read_text())["each"]
    assert list(found[1]) == ["0", "1", "2", "3", "4", "30"]
    assert list(found[1].values()) == pytest.approx(list(found[6].values()), abs=1e-4)
    assert len({round(value, 6) for value in found[1].values()}) == 6
    assert lfm(*common, "--dry-run").exit_code == 0
    assert_one_line(lfm(*common, "--estimator", "x"), "--estimator x: unknown; one of hutchinson, exact")
    assert_one_line(lfm("likelihood", tmp_path, small_set.latents, "--rows", 40), "--rows 40: out of range")
    assert_one_line(
        lfm("likelihood", tmp_path, small_set.latents, "--rows", 40, "--dry-run"), "--rows 40: out of range"
    )
    assert_one_line(lfm("likelihood", tmp_path, small_set.raw), "holds raw shards")
    assert_one_line(lfm(*common, "--out", tmp_path), "--out", "is a folder")
    assert_one_line(lfm("likelihood", tasks.runs / "inpaint", small_set.latents), "no masks")
