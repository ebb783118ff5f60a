"""`lfm compare`: train configurations on the same samples, noise and times, several seeds each, and report how they differ.

Samples, noise and times are functions of the seed and the sample number alone, so trainings of one seed on the same latents
are pairs, and their difference varies less than that of trainings with other draws. Each training is a run of its own and
resumes; what is measured during it (train.validate_every, evaluation) is read from its log.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lfm.errors import LfmError, hide_credentials
from pipelines.common import launcher
from pipelines.common.progress import Progress
from pipelines.comparison import comparison_report
from pipelines.comparison.comparison_options import CompareConfig
from pipelines.comparison.paired_trainings import Training, check_same_run, describe, plan_trainings

OUTPUT = "output.txt"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class CompareResult:
    """What was compared, and the report as a table; None after a dry run."""

    plan: str
    table: str | None = None


def run(config: CompareConfig) -> CompareResult:
    """Train what is not yet trained, and write compare.json, compare.txt and compare.png.

    Raises:
        ConfigError: a configuration is wrong, measures nothing, or differs from that of an existing run.
        LfmError: a training failed; names its output.
        KeyboardInterrupt: the trainings have saved a checkpoint and stopped.
    """
    trainings = plan_trainings(config)
    plan = describe(trainings, config)
    if config.dry_run:
        return CompareResult(plan)
    for training in trainings:
        check_same_run(training)
    print(hide_credentials(plan), flush=True)
    _train_all(trainings, config)
    report = comparison_report.build(trainings)
    return CompareResult(plan, comparison_report.write(report, Path(config.out)))


def _train_all(trainings: list[Training], config: CompareConfig) -> None:
    """Run the trainings, `config.jobs` at a time, under one progress bar."""
    waiting = [training for training in trainings if not training.is_complete]
    finished = sum(training.num_samples for training in trainings if training.is_complete)
    running: list[tuple[Training, subprocess.Popen[bytes]]] = []
    total = sum(training.num_samples for training in trainings)
    started = finished + sum(training.samples_seen for training in waiting)
    with Progress("compare", total, "samples", done=started) as bar, ExitStack() as stack:
        stack.callback(_stop, running)
        while waiting or running:
            while waiting and len(running) < config.jobs:
                training = waiting.pop(0)
                running.append((training, _start(training, config)))
            time.sleep(POLL_SECONDS)
            for training, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((training, process))
                if process.returncode:
                    raise LfmError(_failure(training))
                finished += training.num_samples
            seen = finished + sum(training.samples_seen for training, _ in running)
            seen += sum(training.samples_seen for training in waiting)
            bar.advance(max(0, seen - bar.done))


def _start(training: Training, config: CompareConfig) -> subprocess.Popen[bytes]:
    """Start a training, whose messages go into a file of its folder."""
    import torch

    num_ranks = config.num_gpus or torch.cuda.device_count() or 1
    launched = num_ranks if num_ranks > 1 else None
    command = launcher.training_command(training.file, training.overrides, launched)
    training.folder.mkdir(parents=True, exist_ok=True)
    with (training.folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            command,
            env=launcher.environment(num_ranks * config.jobs),
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that Ctrl-C reaches a training once, by `_stop`; a second signal would kill it
        )


def _stop(running: list[tuple[Training, subprocess.Popen[bytes]]]) -> None:
    """Let the running trainings save a checkpoint and exit."""
    for _, process in running:
        process.terminate()
    for _, process in running:
        process.wait()


def _failure(training: Training) -> str:
    """Return the message of a training that failed."""
    output = training.folder / OUTPUT
    errors = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    reason = errors[-1].removeprefix("error: ") if errors else "failed"
    return f"{training.name}, seed {training.seed}: {reason} (see {output}); run the same command to resume"
