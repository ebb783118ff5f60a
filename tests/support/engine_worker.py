"""One rank of the tests of the engine, started with RANK and WORLD_SIZE set; it writes its measurements as JSON.

python engine_worker.py SETTINGS PRECISION OUT [FROM]     SETTINGS: zero_optimization of DeepSpeed, as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm.precision import weights_dtype
from lfm.training import engine as engine_module
from lfm.training.ema import decay_after, power_decay_after
from lfm.training.engine import Engine, HostBuffers, write_parts
from lfm.training.step_guard import StepGuard
from lfm.world import World
from pipelines.common import launcher

HIDDEN_MATRICES = {"2.weight": 3, "0.weight": 1}  # for Muon: 3 blocks of 11 rows, and 1
BATCH, LEARNING_RATE, CLIPPING, DECAY, WIDTH, WEIGHT_DECAY = 16, 3e-3, 1.0, 0.99, 0.1, 0.5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 33), nn.GELU(), nn.Linear(33, 5))


def batch(step: int, samples: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(samples, 7, generator=generator)
    return inputs, inputs[:, :5].sin() * 2


def settings(
    zero: dict[str, Any], precision: str, world: World, accumulation: int = 1, weight_decay: float = 0.0
) -> dict[str, Any]:
    optimizer = {"torch_adam": True, "fused": True, "lr": LEARNING_RATE, "weight_decay": weight_decay}
    return {
        "zero_optimization": {**zero},
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "bf16": {"enabled": precision == "bf16"},
    }


class Run:
    """An engine with a training loop."""

    def __init__(
        self,
        zero: dict[str, Any],
        precision: str,
        world: World,
        accumulation: int = 1,
        ratio: float = 0.0,
        weight_decay: float = 0.0,
        hidden_matrices: dict[str, int] | None = None,
    ) -> None:
        self.accumulation, self.world = accumulation, world
        self.dtype = weights_dtype(precision)
        config = settings(zero, precision, world, accumulation, weight_decay)
        averages, guard = ("ema", "power"), StepGuard(ratio)
        self.engine = Engine(make_model(), config, world, averages, guard, hidden_matrices=hidden_matrices)

    def step(self, step: int, poison: dict[int, float] | None = None) -> float:
        """One step; on the last rank its loss is multiplied by `poison`. Returns the loss over all ranks."""
        inputs, targets = (part[self.world.slice_of(BATCH)] for part in batch(step))
        total = torch.zeros(())
        for some, wanted in zip(inputs.chunk(self.accumulation), targets.chunk(self.accumulation), strict=True):
            loss = (self.engine(some.to(self.dtype)).float() - wanted).square().mean()
            total += loss.detach() / self.accumulation
            if poison and step in poison and self.world.rank == self.world.size - 1:
                loss = loss * poison[step]
            self.engine.backward_and_step(loss)
        self.engine.averages["ema"].update(decay_after(step + 1, DECAY))
        self.engine.averages["power"].update(power_decay_after(step + 1, WIDTH))
        return float(self.engine.sum_over_ranks(total)) / self.world.size

    def masters(self) -> dict[str, Tensor]:
        return {name: whole.clone() for name, whole in self.engine.whole_tensors(self.engine.masters)}

    def carried(self) -> dict[str, Tensor]:
        return {
            f"{kind}/{name}": whole.clone()
            for kind, partitions in self.engine._state().items()
            for name, whole in self.engine.whole_tensors(partitions)
        }

    def output(self) -> Tensor:
        """The output of the model's working weights."""
        with torch.no_grad():
            return self.engine(batch(999)[0].to(self.dtype)).float()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save(engine: Engine, folder: Path) -> dict[str, Any]:
    """Write the state of an engine on all ranks, and return its numbers."""
    copy = engine.copy_state(HostBuffers(), "ema")
    assert len(copy.weights) == engine.world.is_main * len(list(engine.engine.module.parameters()))
    write_parts(folder, engine.world.rank, copy.parts)
    engine.barrier()
    return copy.numbers


def main() -> None:
    zero, precision, out = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    world = launcher.world()
    measured: dict[str, Any] = {}

    # 200 steps: losses, and the averages compared with float64.
    run = Run(zero, precision, world)
    if len(sys.argv) > 4:  # first resume from another number of ranks or another stage
        numbers = json.loads((Path(sys.argv[4]) / "numbers.json").read_text())
        run.engine.load(Path(sys.argv[4]), numbers, 0)
        measured["resumed"] = [run.step(step) for step in range(50, 60)]
        run = Run(zero, precision, world)
    measured["losses"] = []
    reference = {name: {"ema": weight.double(), "power": weight.double()} for name, weight in run.masters().items()}
    for step in range(200):
        measured["losses"].append(run.step(step))
        ema, power = decay_after(step + 1, DECAY), power_decay_after(step + 1, WIDTH)
        for name, weight in run.masters().items():
            for kind, decay in (("ema", ema), ("power", power)):
                reference[name][kind].mul_(decay).add_(weight.double(), alpha=1 - decay)
        if step == 49:
            numbers = save(run.engine, out)
            saved = run.carried()
            if world.is_main:
                (out / "numbers.json").write_text(json.dumps(numbers))
    measured["ema_error"] = max(
        float((whole.double() - reference[name][kind]).norm() / reference[name][kind].norm())
        for kind in ("ema", "power")
        for name, whole in run.engine.whole_tensors(run.engine.averages[kind].average)
    )

    # Computing with the average, and the state afterwards.
    before, output = run.carried(), run.output()
    with run.engine.averaged("ema"):
        averaged = run.output()
    average = make_model()
    average.load_state_dict({n: w.clone() for n, w in run.engine.whole_tensors(run.engine.averages["ema"].average)})
    expected = average.to(run.dtype)(batch(999)[0].to(run.dtype)).float().detach()
    measured["averaged_error"] = float((averaged - expected).abs().max())
    measured["averaged_differs"] = float((averaged - output).abs().max())
    measured["restored"] = same(before, run.carried()) and torch.equal(output, run.output())

    # Loading step 50 in place, and repeating from there: bit for bit.
    run.engine.load(out, numbers, 0)
    measured["loaded"] = same(saved, run.carried())
    measured["again"] = [run.step(step) for step in range(50, 200)] == measured["losses"][50:]
    measured["bytes"] = sum(t.numel() * 4 for partitions in run.engine._state().values() for t in partitions)
    measured["parameters"] = sum(weight.numel() for weight in saved.values()) // 5

    # Accumulation.
    run = Run(zero, precision, world, accumulation=4)
    measured["accumulated"] = [run.step(step) for step in range(50)]

    # Weight decay, and resuming with its two groups of parameters.
    run = Run(zero, precision, world, weight_decay=WEIGHT_DECAY)
    measured["decayed"] = [run.step(step) for step in range(25)]
    (out / "decayed").mkdir(exist_ok=True)
    run.engine.barrier()
    numbers = save(run.engine, out / "decayed")
    measured["decayed"] += [run.step(step) for step in range(25, 50)]
    run.engine.load(out / "decayed", numbers, 0)
    measured["decayed_again"] = [run.step(step) for step in range(25, 50)] == measured["decayed"][25:]

    # Muon: losses, the number of orthogonalizations over all ranks, resuming, and a step that is skipped.
    numbers_of_blocks: list[int] = []
    orthogonal_update = engine_module.orthogonal_update

    def counted(update: Tensor, num_blocks: int) -> Tensor:
        numbers_of_blocks.append(num_blocks)
        return orthogonal_update(update, num_blocks)

    engine_module.orthogonal_update = counted
    run = Run(zero, precision, world, weight_decay=WEIGHT_DECAY, hidden_matrices=HIDDEN_MATRICES)
    measured["muon"] = [run.step(step) for step in range(25)]
    counts = run.engine.sum_over_ranks(torch.tensor([len(numbers_of_blocks), sum(numbers_of_blocks)]))
    measured["orthogonalized"] = counts.tolist()
    (out / "muon").mkdir(exist_ok=True)
    run.engine.barrier()
    numbers, saved = save(run.engine, out / "muon"), run.carried()
    if world.is_main:
        (out / "muon" / "numbers.json").write_text(json.dumps(numbers))
    measured["muon"] += [run.step(step) for step in range(25, 50)]
    before_step = {name: whole for name, whole in run.carried().items() if not name.startswith(("ema", "power"))}
    run.step(50, {50: float("nan")})
    measured["muon_skipped"] = same(before_step, {name: run.carried()[name] for name in before_step})
    run.engine.load(out / "muon", numbers, 0)
    measured["muon_loaded"] = same(saved, run.carried())
    measured["muon_again"] = [run.step(step) for step in range(25, 50)] == measured["muon"][25:]
    if len(sys.argv) > 4:  # resume from another number of ranks or another stage
        numbers = json.loads((Path(sys.argv[4]) / "muon" / "numbers.json").read_text())
        run.engine.load(Path(sys.argv[4]) / "muon", numbers, 0)
        measured["muon_resumed"] = [run.step(step) for step in range(25, 50)]

    # A step that one rank spoils is skipped on all ranks: nothing but the averages changes.
    run = Run(zero, precision, world, ratio=20.0)
    poison = {3: float("nan"), 4: float("inf"), 130: 1e4}
    before_step, measured["skipped_exact"] = {}, []
    for step in range(135):
        if step in poison:
            before_step = {
                name: whole for name, whole in run.carried().items() if not name.startswith(("ema", "power"))
            }
            output = run.output()
        run.step(step, poison)
        if step in poison:
            now = {name: whole for name, whole in run.carried().items() if name in before_step}
            measured["skipped_exact"].append(same(before_step, now) and torch.equal(output, run.output()))
            measured["adam_steps"] = run.engine._adam_steps
    measured["skipped"], measured["in_a_row"] = run.engine.guard.num_skipped, run.engine.guard.num_skipped_in_a_row
    measured["finite"] = all(bool(whole.isfinite().all()) for whole in run.masters().values())

    run.engine.barrier()
    (out / f"measured-{world.rank}.json").write_text(json.dumps(measured))
    run.engine.close()


if __name__ == "__main__":
    main()
