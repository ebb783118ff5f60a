"""`lfm ema`: weights of another averaging width, made afterwards from a run's snapshots (Karras et al. 2023, 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lfm import storage, weights_file
from lfm.errors import CheckpointError, ConfigError
from lfm.training.ema import combination
from lfm.training.run_folder import RunFolder
from pipelines.common.progress import Progress
from pipelines.training.training_options import EmaConfig

WORST_FIT = 0.1  # of the wanted profile's norm; above it the snapshots cannot make the width


@dataclass(frozen=True)
class EmaResult:
    """Where the weights are; None after a dry run."""

    plan: str
    weights: str | None


def run(config: EmaConfig) -> EmaResult:
    """Combine snapshots to the average of the wanted width.

    Raises:
        CheckpointError: the run has no snapshots up to there, or they cannot make the width.
    """
    snapshots = RunFolder(config.run).snapshots()
    if config.samples_seen is not None:
        snapshots = [each for each in snapshots if each[1] <= config.samples_seen]
    if not snapshots:
        raise CheckpointError(
            f"{config.run}: no snapshots there"
            f"{f' up to {config.samples_seen:,} samples' if config.samples_seen is not None else ''}; train with "
            "train.ema_sigma_rel, such as [0.05, 0.1]"
        )
    paths, times, widths = zip(*snapshots, strict=True)
    end = config.samples_seen or max(times)
    factors, misfit = combination(times, widths, end, config.sigma_rel)
    if misfit > WORST_FIT:
        raise CheckpointError(
            f"{config.run}: the snapshots of widths {', '.join(f'{width:g}' for width in sorted(set(widths)))} make "
            f"{config.sigma_rel:g} with an error of {misfit:.0%}; choose a --sigma-rel nearer to them"
        )
    out = config.out or storage.join(config.run, f"ema-{config.sigma_rel:g}.safetensors")
    if not out.endswith(".safetensors"):
        raise ConfigError(f"--out {out}: must end with .safetensors, by which weights are known")
    plan = (
        f"width {config.sigma_rel:g} at {end:,} samples of {len(paths)} snapshots in {config.run}, "
        f"fitted to {misfit:.2%} -> {out}"
    )
    if config.dry_run:
        return EmaResult(plan, None)
    total: dict[str, torch.Tensor] = {}
    with Progress("ema", len(paths), "snapshots") as bar:
        for path, factor in zip(paths, factors.tolist(), strict=True):
            weights, header = weights_file.load_weights(str(path))
            if total.keys() and total.keys() != weights.keys():
                raise CheckpointError(f"{path}: is of another model than the snapshots before it; remove it")
            for name, tensor in weights.items():
                total[name] = total.get(name, 0.0) + factor * tensor.double()
            bar.advance(1)
    finished = {name: tensor.float() for name, tensor in total.items()}
    weights_file.save_weights(out, finished, replace(header, samples_seen=end))
    return EmaResult(plan, out)
