"""Tests of Muon on whole matrices: the orthogonalization, and the update of torch's own Muon."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from lfm.models import registry
from lfm.models.unet_config import UNetConfig
from lfm.training.muon import MuonWithAdamW, orthogonal_update, orthogonalized
from lfm.training.parameter_groups import parameter_groups
from tests.support.models import SMALL_DIT

LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1


@pytest.mark.parametrize("shape", [(6, 6), (4, 24), (24, 4)])
def test_singular_values_become_nearly_equal_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalized(matrix)
    rotated = u.T @ result @ v.T
    assert values.max() / values.min() > 1.3
    assert rotated.diagonal().min() > 0.6 and rotated.diagonal().max() < 1.3
    torch.testing.assert_close(rotated, rotated.diagonal().diag(), atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalized(1000 * matrix), result, atol=1e-4, rtol=0)


def test_stacked_matrices_are_orthogonalized_each_alone() -> None:
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    together = orthogonal_update(torch.cat([first, 100 * second]), 2)
    assert torch.equal(together, torch.cat([orthogonal_update(first), orthogonal_update(100 * second)]))


def test_updates_are_those_of_torch() -> None:
    """torch computes the iteration in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(6, 9)) for _ in range(2))
    optimizer = MuonWithAdamW([{"params": [ours], "muon": True}], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer.orthogonalize = lambda parameter, update: orthogonal_update(update)
    other = torch.optim.Muon(
        [theirs], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        ours.grad = torch.randn(6, 9, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    moved = (ours - 1).norm()
    assert moved > 0.01 and (ours - theirs).norm() < 0.02 * moved


def test_kernels_are_rows_of_a_matrix() -> None:
    kernels = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = orthogonal_update(kernels.reshape(6, 36)).reshape(6, 4, 3, 3)
    assert torch.equal(orthogonal_update(kernels), expected)


@pytest.mark.parametrize("resampling", ["residual", "convolution"])
def test_the_matrices_of_the_unet_are_its_convolutions_and_attention(
    resampling: Literal["residual", "convolution"],
) -> None:
    config = UNetConfig(
        4,
        8,
        model_channels=16,
        channel_multipliers=(1, 2),
        attention_resolutions=(4,),
        head_channels=16,
        resampling=resampling,
    )
    model = registry.build_network(config)
    names = model.hidden_matrices()
    kinds = {
        id(module.weight): type(module) for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    weights = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {weights[key] for key in kinds if weights[key].split(".")[0] in ("encoder", "middle", "decoder")}
    assert hidden - {*names} == {name for name in hidden if name.endswith(".modulation.weight")}
    assert {*names} <= hidden and [name for name in names if names[name] == 3] == [
        name for name in names if name.endswith("attention.qkv.weight")
    ]


def test_the_matrices_of_the_dit_are_those_of_its_blocks() -> None:
    model = registry.build_network(SMALL_DIT)
    names = model.hidden_matrices()
    assert len(names) == 4 * SMALL_DIT.depth and sum(names.values()) == 6 * SMALL_DIT.depth
    parameters = dict(model.named_parameters())
    assert all(parameters[name].ndim == 2 and name.startswith("blocks.") for name in names)
    *others, muon = parameter_groups(model, 0.1, names)
    assert [group["muon"] for group in others] == [False, False] and muon["muon"]
    counted = sum(len(group["params"]) for group in (*others, muon))
    assert counted == len(parameters) and len(muon["params"]) == len(names)
