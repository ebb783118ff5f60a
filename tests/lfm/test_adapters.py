"""Tests of layers beside frozen ones: they begin as these, and merging them changes nothing."""

from __future__ import annotations

import pytest
import torch

from lfm.adapters import add_adapters, freeze_others, merge_adapters
from lfm.models import registry
from lfm.types import Condition
from tests.support.models import SMALL_DIT, dit_inputs, randomized_dit

NAMES = (("adapters",), ("scales",), ("adapters", "scales"))


@pytest.mark.parametrize("trainable", NAMES)
def test_adapters_begin_as_the_network_and_merged_compute_the_same(trainable: tuple[str, ...]) -> None:
    source = randomized_dit(SMALL_DIT).eval()
    state, time, classes = dit_inputs()
    condition = Condition(classes)
    before = source(state, time, condition).detach()
    frozen = {name: value.clone() for name, value in source.state_dict().items()}
    add_adapters(source, trainable, rank=3)
    assert torch.equal(source(state, time, condition), before)
    num_trained = freeze_others(source, trainable)
    trained = {name: value for name, value in source.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == num_trained and not trained.keys() & frozen.keys()
    with torch.no_grad():
        for value in trained.values():
            value.add_(0.3 * torch.randn_like(value))
    after = source(state, time, condition).detach()
    assert (after - before).abs().max() > 1e-2
    merged = registry.build_network(source.config).eval()
    merged.load_state_dict(merge_adapters(source.state_dict()))
    torch.testing.assert_close(merged(state, time, condition).detach(), after, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(source.state_dict()[name], value) for name, value in frozen.items())
