"""Compiled blocks: one graph each for a training step, without a break, and none compiled anew after the second step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lfm.models import attention, registry
from lfm.models.network import VelocityNetwork
from lfm.types import Condition
from tests.support.models import SMALL_DIT

TASKS: dict[str, dict[str, Any]] = {
    "none": {"num_classes": None, "condition_dropout": 0.0},
    "class": {"num_classes": 3},
    "inpaint": {"num_classes": None, "condition_channels": 5},
    "semantic": {"num_classes": None, "num_labels": 4},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "modern": {"position": "rope", "norm": "rms", "mlp": "swiglu", "qk_norm": True},
    "checkpointing": {"activation_checkpointing": 2},
    "token dropout": {"token_dropout": 0.5},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Let no graph of another test be reused here, and none of these elsewhere."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train_two_steps_and_two_more(model: VelocityNetwork, batch: int = 2) -> tuple[int, int]:
    """Train four steps; return the number of graphs after two of them and after all."""
    graphs = []
    config = model.config
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        state = torch.randn(batch, *config.latent_shape, generator=generator)
        kept = None
        if config.num_kept_tokens < config.num_tokens:
            orders = [torch.randperm(config.num_tokens, generator=generator) for _ in range(batch)]
            kept = torch.stack(orders)[:, : config.num_kept_tokens].sort().values
        predicted = model(state, torch.rand(batch, generator=generator), condition_of(model, batch), kept)
        predicted.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs[1], graphs[-1]


def condition_of(model: VelocityNetwork, batch: int) -> Condition:
    """A condition of the kind that the model takes."""
    config = model.config
    side, pixels = config.latent_size, config.segmentation_size
    return Condition(
        class_index=torch.arange(batch) % config.num_classes if config.num_classes else None,
        spatial=torch.randn(batch, config.condition_channels, side, side) if config.condition_channels else None,
        segmentation=torch.zeros(batch, pixels, pixels, dtype=torch.int64) if config.num_labels else None,
    )


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize(
    ("task", "option"), [*((task, "modern") for task in TASKS), *(("class", option) for option in OPTIONS)]
)
def test_a_training_step_is_compiled_once_without_a_graph_break(task: str, option: str) -> None:
    model = registry.build_network(dataclasses.replace(SMALL_DIT, **TASKS[task], **OPTIONS[option]))
    model.compile_blocks(backend="aot_eager")
    after_two, after_four = train_two_steps_and_two_more(model)
    assert 1 <= after_two <= 3 and after_four == after_two
    assert not counters["graph_break"], dict(counters["graph_break"])


def test_auto_takes_no_xformers_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators are unknown to the compiler and would break the graph."""

    class OnCuda:
        is_cuda, dtype, shape = True, torch.bfloat16, (1, 4, 2, 8)

    monkeypatch.setattr(attention, "xformers_problem", lambda *_: None)
    assert attention._use_xformers(OnCuda(), "auto")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not attention._use_xformers(OnCuda(), "auto")  # type: ignore[arg-type]
    assert attention._use_xformers(OnCuda(), "xformers")  # type: ignore[arg-type]
