"""Tests of the engine under every ZeRO stage: parity with plain PyTorch, averages, skipped steps, saving and loading.

Each run of `engine_worker.py` takes more than 200 steps; the tests share the runs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from lfm.training.engine import start_processes
from lfm.training.muon import MuonWithAdamW, orthogonal_update
from lfm.training.parameter_groups import parameter_groups
from lfm.training.step_guard import MEMORY, MOST_SKIPPED_IN_A_ROW, StepGuard
from lfm.world import World
from tests.support import engine_worker
from tests.support.commands import REPOSITORY, finish, start_ranks


@pytest.mark.parametrize("num_gpus", [0, 1, 4])
def test_the_process_group_names_the_device_of_each_rank(monkeypatch: pytest.MonkeyPatch, num_gpus: int) -> None:
    """Else NCCL guesses it, and warns."""
    groups: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **options: groups.append((backend, options["device_id"])),
    )
    deepspeed = MagicMock()
    deepspeed.ops.__compatible_ops__ = {}
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    for variable in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(variable, "0")
    for rank in range(4):
        start_processes(World(rank, rank, 4), store=object())
    devices = {1: [0, 0, 0, 0], 4: [0, 1, 2, 3]}
    if num_gpus:
        assert groups == [("nccl", torch.device("cuda", index)) for index in devices[num_gpus]]
    else:
        assert groups == [("gloo", None)] * 4


def offload(stage: int) -> dict[str, Any]:
    return json.loads((REPOSITORY / "configs" / "deepspeed" / f"zero{stage}_offload.json").read_text())[
        "zero_optimization"
    ]


SOME_WHOLE = {"stage3_param_persistence_threshold": 40}  # some weights are whole on every rank, others are partitioned
# name: ranks, ZeRO, precision, and the run whose checkpoint is loaded
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
def measurements(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The measurements of the first rank of each run."""
    root, measurements = tmp_path_factory.mktemp("engine"), {}
    for name, (ranks, zero, precision, origin) in RUNS.items():
        (root / name).mkdir()
        arguments = [json.dumps(zero), precision, root / name, *([root / origin] if origin else [])]
        result = finish(start_ranks([sys.executable, WORKER, *arguments], ranks))
        assert result.returncode == 0, result.stderr
        measurements[name] = json.loads((root / name / "measured-0.json").read_text())
    return measurements


def plain_losses(weight_decay: float = 0.0) -> list[float]:
    """Return the losses of a plain PyTorch loop, with weight decay on the matrices alone."""
    model = engine_worker.make_model()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=engine_worker.LEARNING_RATE)
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


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return plain_losses()


def test_weight_decay_applies_to_matrices_alone() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(3, 4),
            "norm": nn.LayerNorm(4),
            "linear": nn.Linear(4, 2),
            "conv": nn.Conv2d(4, 2, 1),
        }
    )
    decayed, others = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decayed["params"]] == ["linear.weight", "conv.weight"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    (everything,) = parameter_groups(model, 0.0)
    assert [id(parameter) for parameter in everything["params"]] == list(names), "one group in the model's own order"


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32)
def test_the_losses_are_those_of_plain_pytorch(
    name: str, measurements: dict[str, dict[str, Any]], plain: list[float]
) -> None:
    assert measurements[name]["losses"] == pytest.approx(plain, abs=1e-5)


def muon_losses() -> list[float]:
    """Return the losses of a plain loop of Muon and AdamW in one process, on whole matrices."""
    model = engine_worker.make_model()
    parameters = dict(model.named_parameters())
    num_blocks = {parameters[name]: count for name, count in engine_worker.HIDDEN_MATRICES.items()}
    groups = parameter_groups(model, engine_worker.WEIGHT_DECAY, engine_worker.HIDDEN_MATRICES)
    optimizer = MuonWithAdamW(groups, lr=engine_worker.LEARNING_RATE)
    optimizer.orthogonalize = lambda parameter, update: orthogonal_update(update, num_blocks[parameter])
    losses = []
    for step in range(50):
        inputs, targets = engine_worker.batch(step)
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), engine_worker.CLIPPING)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_muon_is_that_of_one_process_and_resumes(name: str, measurements: dict[str, dict[str, Any]]) -> None:
    """Each matrix is orthogonalized once in each step, on one rank, and a skipped step changes nothing."""
    measured, expected = measurements[name], muon_losses()
    tolerance = 1e-4 if name in FP32 else 0.05
    assert measured["muon"] == pytest.approx(expected, abs=tolerance)
    assert abs(expected[-1] - plain_losses(engine_worker.WEIGHT_DECAY)[49]) > 1e-3, "it differs from AdamW"
    num_matrices, num_blocks = len(engine_worker.HIDDEN_MATRICES), sum(engine_worker.HIDDEN_MATRICES.values())
    assert measured["orthogonalized"] == [25 * num_matrices, 25 * num_blocks]
    assert measured["muon_skipped"] and measured["muon_loaded"] and measured["muon_again"]
    if RUNS[name][3]:
        assert measured["muon_resumed"] == pytest.approx(measured["muon"][25:], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_weight_decay_is_that_of_plain_pytorch_and_resumes(name: str, measurements: dict[str, dict[str, Any]]) -> None:
    expected = plain_losses(engine_worker.WEIGHT_DECAY)
    assert abs(expected[49] - plain_losses()[49]) > 1e-3, "the decay is large enough to matter"
    if name in FP32:
        assert measurements[name]["decayed"] == pytest.approx(expected[:50], abs=1e-5)
    assert measurements[name]["decayed_again"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32)
def test_accumulation_of_four_is_a_batch_four_times_as_large(
    name: str, measurements: dict[str, dict[str, Any]], plain: list[float]
) -> None:
    assert measurements[name]["accumulated"] == pytest.approx(plain[:50], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_both_averages_equal_float64(name: str, measurements: dict[str, dict[str, Any]]) -> None:
    assert measurements[name]["ema_error"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_computing_with_the_average_is_exact_and_changes_nothing(
    name: str, measurements: dict[str, dict[str, Any]]
) -> None:
    assert measurements[name]["averaged_error"] < 1e-6 < 0.1 < measurements[name]["averaged_differs"]
    assert measurements[name]["restored"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_saved_state_is_loaded_bit_for_bit_and_continues_alike(
    name: str, measurements: dict[str, dict[str, Any]]
) -> None:
    assert measurements[name]["loaded"] and measurements[name]["again"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FP32 if RUNS[name][3]])
def test_another_number_of_ranks_at_another_stage_resumes(
    name: str, measurements: dict[str, dict[str, Any]], plain: list[float]
) -> None:
    """From 1 rank to 2 and back, through stages 1, 2 and 3."""
    assert measurements[name]["resumed"] == pytest.approx(plain[50:60], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_one_rank_poisons_is_skipped_on_all(name: str, measurements: dict[str, dict[str, Any]]) -> None:
    """Not a number, infinite, and 10,000 times too large: weights, moments and their clock stay as they were."""
    assert measurements[name]["skipped_exact"] == [True, True, True]
    assert measurements[name]["skipped"] == 3 and measurements[name]["in_a_row"] == 0 and measurements[name]["finite"]
    assert measurements[name]["adam_steps"] == 131 - 3


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_memory_per_rank_follows_the_formula(name: str, measurements: dict[str, dict[str, Any]]) -> None:
    """4 bytes each of masters, two moments and every average, over the ranks; DeepSpeed pads a little."""
    per_rank = measurements[name]["parameters"] * 4 * (3 + 2) / RUNS[name][0]
    assert per_rank <= measurements[name]["bytes"] < 1.15 * per_rank


def refuses(guard: StepGuard, norm: float) -> bool:
    return bool(guard.refuse(torch.tensor(norm)))


def test_the_guard_refuses_norms_far_above_the_running_mean() -> None:
    guard = StepGuard(ratio=10.0)
    # At first any finite norm is accepted.
    assert [refuses(guard, norm) for norm in (1e9, float("nan"), 1e-3)] == [False, True, False]
    assert (guard.num_accepted, guard.num_skipped, guard.num_skipped_in_a_row) == (2, 1, 0)
    assert not any(refuses(guard, 1.0) for _ in range(1500))
    assert guard.num_accepted > MEMORY and not refuses(guard, 9.0 * guard.mean) and refuses(guard, 11.0 * guard.mean)
    mean = guard.mean
    for number in range(2, 5):
        assert refuses(guard, 1e6 * guard.mean) and guard.num_skipped_in_a_row == number
    assert refuses(guard, float("inf")) and guard.mean == mean
    without_limit = StepGuard(ratio=0.0)
    assert not any(refuses(without_limit, 10.0**power) for power in range(30)) and refuses(without_limit, -math.inf)


def test_after_too_many_refusals_in_a_row_the_guard_refuses_every_step() -> None:
    """So the host may read the count later, and no step is taken in between."""
    guard = StepGuard(ratio=10.0)
    for _ in range(MOST_SKIPPED_IN_A_ROW):
        assert refuses(guard, math.nan)
    accepted = StepGuard(ratio=10.0)
    accepted.load_state_dict(guard.state_dict())
    assert not refuses(accepted, 1.0) and accepted.num_skipped_in_a_row == 0
    assert refuses(guard, math.nan) and refuses(guard, 1.0)
    assert guard.num_skipped_in_a_row == MOST_SKIPPED_IN_A_ROW + 2


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp32"), (3, "fp32")])
def test_a_step_launches_few_operations_for_each_parameter_tensor(stage: int, precision: str) -> None:
    """DeepSpeed's copies into its buffers; with its own norm and overflow check there were 17 at stage 1."""
    command = [sys.executable, "-m", "tests.support.count_operations", str(stage), precision]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert 0 < float(result.stdout.splitlines()[-1]) <= 3


def test_the_state_of_the_guard_is_restored_except_for_its_ratio() -> None:
    guard = StepGuard(ratio=10.0)
    for norm in (1.0, 3.0, float("nan")):
        guard.refuse(torch.tensor(norm))
    resumed = StepGuard(ratio=5.0)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.state_dict() == {"ratio": 5.0, "mean": 2.0, "taken": 2, "skipped": 1, "in_a_row": 1}
    # As checkpoints of the first version hold it.
    resumed.load_state_dict({"ratio": 20.0, "mean": 0.5, "taken": 7, "skipped": 2, "in_a_row": 0})
    assert resumed.state_dict() == {"ratio": 5.0, "mean": 0.5, "taken": 7, "skipped": 2, "in_a_row": 0}
