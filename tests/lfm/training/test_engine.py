"""The engine under every ZeRO stage: parity with plain PyTorch, averages, skipped steps, and what it carries along.

Each run of `engine_worker.py` is 200 steps and more; the tests share them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm.training.step_guard import MEMORY, StepGuard
from tests.support import engine_worker
from tests.support.commands import REPOSITORY, finish, start_ranks


def offload(stage: int) -> dict[str, Any]:
    return json.loads((REPOSITORY / "configs" / "deepspeed" / f"zero{stage}_offload.json").read_text())[
        "zero_optimization"
    ]


SOME_WHOLE = {"stage3_param_persistence_threshold": 40}  # some weights are kept whole, some are not
# name: ranks, ZeRO, precision, whose checkpoint it goes on from
RUNS: dict[str, tuple[int, dict[str, Any], str, str | None]] = {
    "zero1": (1, {"stage": 1}, "fp32", None),
    "zero2": (2, offload(2), "fp32", "zero1"),
    "zero3": (2, {"stage": 3} | SOME_WHOLE, "fp32", "zero2"),
    "zero1-again": (1, {"stage": 1}, "fp32", "zero3"),
    "zero3-bf16": (2, offload(3) | SOME_WHOLE, "bf16", None),
}
FP32 = [name for name, (_, _, precision, _) in RUNS.items() if precision == "fp32"]
WORKER = Path(engine_worker.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the first rank of each run found."""
    root, found = tmp_path_factory.mktemp("engine"), {}
    for name, (ranks, zero, precision, origin) in RUNS.items():
        (root / name).mkdir()
        arguments = [json.dumps(zero), precision, root / name, *([root / origin] if origin else [])]
        result = finish(start_ranks([sys.executable, WORKER, *arguments], ranks))
        assert result.returncode == 0, result.stderr
        found[name] = json.loads((root / name / "measured-0.json").read_text())
    return found


@pytest.fixture(scope="module")
def plain() -> list[float]:
    """The losses of a plain PyTorch loop."""
    model = engine_worker.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=engine_worker.LEARNING_RATE)
    losses = []
    for step in range(200):
        inputs, targets = engine_worker.batch(step)
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), engine_worker.CLIPPING)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32)
def test_the_losses_are_those_of_plain_pytorch(name: str, found: dict[str, dict[str, Any]], plain: list[float]) -> None:
    assert found[name]["losses"] == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32)
def test_accumulation_of_four_is_a_batch_four_times_as_large(
    name: str, found: dict[str, dict[str, Any]], plain: list[float]
) -> None:
    assert found[name]["accumulated"] == pytest.approx(plain[:50], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_both_averages_equal_float64(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["ema_error"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_computing_with_the_average_is_exact_and_leaves_no_trace(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["averaged_error"] < 1e-6 < 0.1 < found[name]["averaged_differs"]
    assert found[name]["restored"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_was_saved_is_loaded_bit_for_bit_and_goes_on_so(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["loaded"] and found[name]["again"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FP32 if RUNS[name][3]])
def test_another_number_of_ranks_at_another_stage_goes_on(
    name: str, found: dict[str, dict[str, Any]], plain: list[float]
) -> None:
    """From 1 rank to 2 and back, through stages 1, 2 and 3."""
    assert found[name]["resumed"] == pytest.approx(plain[50:60], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_one_rank_poisons_is_left_out_on_all(name: str, found: dict[str, dict[str, Any]]) -> None:
    """Not a number, infinite, and 10,000 times too large: weights, moments and their clock stay as they were."""
    assert found[name]["skipped_exact"] == [True, True, True]
    assert found[name]["skipped"] == 3 and found[name]["in_a_row"] == 0 and found[name]["finite"]
    assert found[name]["adam_steps"] == 131 - 3


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_memory_per_rank_follows_the_formula(name: str, found: dict[str, dict[str, Any]]) -> None:
    """4 bytes each of masters, two moments and every average, over the ranks; DeepSpeed pads a little."""
    per_rank = found[name]["parameters"] * 4 * (3 + 2) / RUNS[name][0]
    assert per_rank <= found[name]["bytes"] < 1.15 * per_rank


def test_the_guard_knows_what_is_usual() -> None:
    guard = StepGuard(ratio=10.0)
    for norm in (1e9, float("nan"), 1e-3):  # at first anything that is finite
        guard.count(norm)
    assert (guard.taken, guard.skipped, guard.in_a_row) == (2, 1, 0)
    for _ in range(1500):
        guard.count(1.0)
    assert guard.taken > MEMORY and not guard.refuses(9.0 * guard.mean) and guard.refuses(11.0 * guard.mean)
    for number in range(1, 4):
        guard.count(1e6 * guard.mean)
        assert guard.in_a_row == number
    assert guard.refuses(float("inf")) and not StepGuard(ratio=0.0, taken=10**6, mean=1.0).refuses(1e30)
