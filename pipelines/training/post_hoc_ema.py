"""`lfm ema`: EMA weights of another width, computed from the snapshots of a run (post-hoc EMA, Karras et al. 2023, 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lfm import storage, weights_file
from lfm.errors import CheckpointError, ConfigError
from lfm.training.ema import combination
from lfm.training.run_folder import RunFolder
from pipelines.common.progress import Progress
from pipelines.training.training_options import EmaConfig

WORST_FIT = 0.1  # largest error of the fitted profile, relative to the norm of the target profile


@dataclass(frozen=True)
class EmaResult:
    """The plan, and the path of the weights; None after a dry run."""

    plan: str
    weights: str | None


def run(config: EmaConfig) -> EmaResult:
    """Combine the snapshots of a run to weights of another averaging width.

    Raises:
        CheckpointError: the run has no snapshots of that time, or their widths are too different.
        ConfigError: the output is no safetensors file.
    """
    if not Path(config.run).is_dir():
        raise CheckpointError(f"{config.run}: no such folder; name the run folder of a training")
    limit = math.inf if config.samples_seen is None else config.samples_seen
    snapshots = [snapshot for snapshot in RunFolder(config.run).snapshots() if snapshot[1] <= limit]
    if not snapshots:
        up_to = "" if config.samples_seen is None else f" up to {config.samples_seen:,} samples"
        raise CheckpointError(
            f"{config.run}: has no snapshots{up_to}; train with train.ema_sigma_rel, such as [0.05, 0.1]"
        )
    paths, times, widths = zip(*snapshots, strict=True)
    end = config.samples_seen or max(times)
    factors, error = combination(times, widths, end, config.sigma_rel)
    if error > WORST_FIT:
        raise CheckpointError(
            f"{config.run}: its snapshots of widths {', '.join(f'{width:g}' for width in sorted(set(widths)))} can be combined "
            f"to {config.sigma_rel:g} with an error of {error:.0%} only; choose a `sigma_rel` nearer to them"
        )
    out = config.out or storage.join(config.run, f"ema-{config.sigma_rel:g}.safetensors")
    if not out.endswith(".safetensors"):
        raise ConfigError(f"`out` {out}: must end with .safetensors")
    plan = (
        f"width {config.sigma_rel:g} at {end:,} samples of {len(paths)} snapshots in {config.run}, "
        f"fitted to {error:.2%} -> {out}"
    )
    if config.dry_run:
        return EmaResult(plan, None)
    total: dict[str, Tensor] = {}
    with Progress("ema", len(paths), "snapshots") as bar:
        for path, factor in zip(paths, factors.tolist(), strict=True):
            weights, header = weights_file.load_weights(str(path))
            if total.keys() and total.keys() != weights.keys():
                raise CheckpointError(f"{path}: is of another model than the snapshots before it; remove it")
            for name, tensor in weights.items():
                total[name] = total.get(name, 0.0) + factor * tensor.double()
            bar.advance(1)
    average = {name: tensor.float() for name, tensor in total.items()}
    weights_file.save_weights(out, average, replace(header, samples_seen=end))
    return EmaResult(plan, out)
