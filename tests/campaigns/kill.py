"""Kill every stage again and again, with damage to its files in between, and compare the result with an undisturbed run.

    python -m tests.campaigns.kill --kills 300

An episode starts one command on one or two ranks, kills one or all of them at a random moment (SIGKILL or SIGTERM), may damage
a random file of the result (truncate, zero a page, flip a byte, empty, delete), and starts the same command again, a few times.
The last start is left alone and must end with the result of a run that nobody disturbed. In some episodes an input is damaged
instead, which the command must name.

Two stages begin with a complete data set that grows; nothing is damaged there, and after each kill its files must be as before.

A finished shard with changed bytes may stay as it is, if whoever reads it next refuses it by name, and so may what was noted of
its samples, if that is then read from the shard. Counted are, each of which must be 0:

    lost         missing from the result, or a command that cannot be repeated
    doubled      files besides those of an undisturbed run, temporary ones included
    silent       a result with other content, or a damaged input that was read
    hangs        processes that do not end
    tracebacks   processes that end with a traceback, or by a signal that nobody sent
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import click
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from lfm.autoencoder import import_diffusers
from lfm.data import manifest as manifests
from lfm.errors import LfmError
from lfm.storage.cache import Cache
from pipelines.cli import model_commands
from pipelines.cli.main import main as lfm
from pipelines.data.shard_columns import read_facts
from pipelines.demo import draw_scenes
from tests.support.commands import REPOSITORY, free_port, make_autoencoder
from tests.support.feature_networks import PooledPixels, export_network
from tests.support.forks import Fork, fork
from tests.support.training_runs import YAML

HANG_SECONDS = 180.0
PROBLEMS = ("lost", "doubled", "silent", "hangs", "tracebacks")
DAMAGES = ("truncate", "zero", "flip", "empty", "delete")


@dataclass(frozen=True)
class Stage:
    """A command, the result of an undisturbed run of it, and what it reads."""

    name: str
    arguments: Callable[[Path, int, int], list[object]]  # of the result's folder, the rank, the number of ranks
    same: Callable[[Path, Path], list[str]]  # names of what differs from an undisturbed result
    inputs: tuple[Path, ...] = ()  # folders or files that the command reads whole
    command: click.Command = lfm
    stops_together: bool = False  # a rank that dies ends the others
    before: Path | None = None  # a complete data set, which grows

    def prepare(self, out: Path) -> None:
        """Copy the data set that grows, if there is one, to the folder of the result."""
        if self.before:
            shutil.copytree(self.before, out)

    def changed(self, out: Path) -> list[str]:
        """Return the files of the data set that grows which are not as they were, until its new version is complete."""
        if not self.before or len(manifests.load(str(out)).versions):
            return []
        names = _names(self.before) - {manifests.RECIPE}
        return [name for name in sorted(names) if (self.before / name).read_bytes() != (out / name).read_bytes()]

    def start(self, out: Path, ranks: int, logs: Path) -> list[Fork]:
        """Start the command on some ranks."""
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        forks = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            arguments = list(map(str, self.arguments(out, rank, ranks)))
            is_apart = ranks == 1 or "shard" in self.name
            forks.append(
                fork(
                    lambda arguments=arguments: self.command.main(arguments, "lfm"),  # type: ignore[misc]
                    logs / f"{self.name}-{rank}.log",
                    {} if is_apart and not self.stops_together else shared | place,
                )
            )
        return forks


@dataclass
class Campaign:
    """The stages, what an undisturbed run of each took, and the counts so far."""

    root: Path
    stages: list[Stage]
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def problem(self, kind: str, stage: str, detail: str) -> None:
        """Count a problem and print it."""
        self.counts[stage, kind] += 1
        print(f"{kind.upper()} {stage}: {detail}", flush=True)

    def expected(self, stage: Stage, ranks: int) -> Path:
        """Return the result of an undisturbed run; it depends on the number of ranks in training alone."""
        ranks = ranks if stage.stops_together else 1
        out = self.root / f"expected-{stage.name}-{ranks}"
        if not out.exists():
            stage.prepare(out)
            codes = [process.wait(HANG_SECONDS) for process in stage.start(out, ranks, self.root)]
            assert codes == [0] * ranks, (self.root / f"{stage.name}-0.log").read_text()
        return out

    def duration(self, stage: Stage, ranks: int) -> float:
        """Return the seconds of an undisturbed run on some ranks."""
        if (stage.name, ranks) not in self.seconds:
            self.expected(stage, ranks)
            out = self.root / "timed"
            stage.prepare(out)
            began = time.monotonic()
            for process in stage.start(out, ranks, self.root):
                process.wait(HANG_SECONDS)
            self.seconds[stage.name, ranks] = time.monotonic() - began
            shutil.rmtree(out)
        return self.seconds[stage.name, ranks]

    def end(self, stage: Stage, processes: list[Fork], killed: set[int]) -> list[int | None]:
        """Wait for processes, and count those that hang or end in a way that nobody caused."""
        codes = [process.wait(HANG_SECONDS) for process in processes]
        for process, code in zip(processes, codes, strict=True):
            if code is None:
                self.problem("hangs", stage.name, process.output[-500:])
                process.send(signal.SIGABRT)
                process.wait(5)
                process.send(signal.SIGKILL)
                process.wait(5)
            elif "Traceback (most recent" in process.output:
                self.problem("tracebacks", stage.name, process.output[-3000:])
            elif code < 0 and process.pid not in killed:
                self.problem("tracebacks", stage.name, f"ended by signal {-code}: {process.output[-500:]}")
        return codes


def make_stages(root: Path) -> list[Stage]:
    """Make the inputs of all stages, in a fork, so that this process starts no threads."""
    images, raw, latents, run = (root / name for name in ("scenes/images", "raw", "latents", "run"))
    autoencoder, network, config = root / "autoencoder", root / "small.pt2", root / "small.yaml"
    reference, some = root / "reference.safetensors", root / "some"
    raw_before, raw_grown, latents_before = (root / name for name in ("raw-before", "raw-grown", "latents-before"))
    config.write_text(YAML.format(run="RUN", latents=latents, deepspeed=REPOSITORY / "configs" / "deepspeed"))
    trust = ("--network", network, "--trust-code", "--batch-size", 2)
    shard = ("--image-size", 16, "--samples-per-shard", 4)

    def train(out: Path) -> list[object]:
        return ["--config", config, "--set", f"run={out}"]

    def make() -> None:
        draw_scenes.run(draw_scenes.ScenesConfig(str(root / "scenes"), num=40, image_size=16))
        for path in images.glob("*/0000[01]*.png"):  # the first 20
            (some / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, some / path.parent.name)
        make_autoencoder(autoencoder, seed=0)
        export_network(PooledPixels(), network)
        for arguments in (
            ("shard", images, raw, *shard),
            ("encode", raw, latents, "--autoencoder", autoencoder),
            ("shard", some, raw_before, *shard),
            ("encode", raw_before, latents_before, "--autoencoder", autoencoder),
            ("reference", raw, reference, *trust),
        ):
            lfm.main(list(map(str, arguments)), "lfm", standalone_mode=True)
        shutil.copytree(raw_before, raw_grown)
        lfm.main(list(map(str, ("shard", images, raw_grown, *shard))), "lfm", standalone_mode=True)
        model_commands.train.main(list(map(str, train(run))), "lfm")

    maker = fork(make, root / "make.log")
    assert maker.wait(600) == 0, maker.output
    return [
        Stage(
            "shard",
            lambda out, rank, ranks: ["shard", images, out, *shard, "--part", f"{rank + 1}/{ranks}"],
            same_files,
        ),
        Stage(
            "encode",
            lambda out, *_: ["encode", raw, out, "--autoencoder", autoencoder, "--batch-size", 4],
            same_files,
            (raw,),
        ),
        Stage(
            "grow-shard",
            lambda out, rank, ranks: ["shard", images, out, *shard, "--part", f"{rank + 1}/{ranks}"],
            same_files,
            before=raw_before,
        ),
        Stage(
            "grow-encode",
            lambda out, *_: ["encode", raw_grown, out, "--autoencoder", autoencoder, "--batch-size", 4],
            same_files,
            before=latents_before,
        ),
        Stage("train", lambda out, *_: train(out), same_training, (latents,), model_commands.train, True),
        Stage(
            "sample",
            lambda out, *_: [
                *("sample", run, "--out", out, "--seeds", "0-15", "--num-steps", 4, "--batch-size", 2),
                *("--autoencoder", autoencoder),
            ],
            same_images,
            (run / "weights.safetensors",),
        ),
        Stage(
            "reference",
            lambda out, *_: ["reference", raw, out / "out.safetensors", *trust],
            same_tensors,
            (raw,),
        ),
        Stage(
            "evaluate",
            lambda out, *_: ["evaluate", raw, "--reference", reference, "--out", out, *trust],
            same_report,
            (raw, reference),
        ),
    ]


# --- comparison of results: each returns the names of what differs --------------------------------------------------


def _names(folder: Path, *left_out: str) -> set[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in paths if not re.match("|".join((r"\.work/", r"\.lock", *left_out)), name)}


def same_names(expected: Path, out: Path, *left_out: str) -> list[str]:
    return [f"{name} missing" for name in sorted(_names(expected, *left_out) - _names(out, *left_out))] + [
        f"{name} doubled" for name in sorted(_names(out, *left_out) - _names(expected, *left_out))
    ]


def same_files(expected: Path, out: Path) -> list[str]:
    names = sorted(_names(expected) & _names(out))
    return same_names(expected, out) + [n for n in names if (expected / n).read_bytes() != (out / n).read_bytes()]


def same_images(expected: Path, out: Path) -> list[str]:
    """Compare images to one grey level, since sums of batches of another size differ in the last bit."""
    wrong = same_names(expected, out)
    for name in sorted(_names(expected) & _names(out)):
        if name.endswith(".png"):
            images = [np.asarray(Image.open(folder / name)).astype(int) for folder in (expected, out)]
            if images[0].shape != images[1].shape or abs(images[0] - images[1]).max() > 1 + 254 * (name == "grid.png"):
                wrong.append(name)
    records = [json.loads((folder / "samples.json").read_text()) for folder in (expected, out)]
    if records[0]["pictures"] != records[1]["pictures"]:
        wrong.append("samples.json")
    return wrong


def same_tensors(expected: Path, out: Path) -> list[str]:
    tensors = [load_file(folder / "out.safetensors") for folder in (expected, out)]
    equal = tensors[0].keys() == tensors[1].keys() and all(
        value.allclose(tensors[1][name]) for name, value in tensors[0].items()
    )
    return same_names(expected, out, r".*blocks-") + ([] if equal else ["out.safetensors"])


def same_training(expected: Path, out: Path) -> list[str]:
    wrong = [name for name in _names(out) if ".writing-" in name]
    weights = [load_file(folder / "weights.safetensors") for folder in (expected, out)]
    if any(not value.equal(weights[1][name]) for name, value in weights[0].items()):
        wrong.append("weights.safetensors")
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    return wrong + ([] if sorted(set(steps))[-1] == 20 else ["log.jsonl"])


def same_report(expected: Path, out: Path) -> list[str]:
    reports = [json.loads((folder / "report.json").read_text())["rows"][0]["metrics"] for folder in (expected, out)]
    equal = reports[0].keys() == reports[1].keys() and all(
        np.allclose(value, reports[1][name], rtol=1e-6, equal_nan=True) for name, value in reports[0].items()
    )
    return same_names(expected, out) + ([] if equal else ["report.json"])


# --- episodes ------------------------------------------------------------------------------------------------------


def damage(folder: Path, kind: str, choice: random.Random) -> Path | None:
    """Damage a random file, and return its path; None if there is none."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    files = [path for path in files if path.name != ".lock" and ".work" not in path.parts]
    if not files:
        return None
    path = choice.choice(files)
    content = bytearray(path.read_bytes())
    place = choice.randrange(len(content))
    if kind == "truncate":
        content = content[:place]
    elif kind == "zero":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    elif kind == "flip":
        content[place] ^= 1 << choice.randrange(8)
    elif kind == "empty":
        content = bytearray()
    path.chmod(0o644)
    if kind == "delete":
        path.unlink()
    elif content == path.read_bytes():  # zeroed zeros
        return None
    else:
        path.write_bytes(content)
    return path


def episode(campaign: Campaign, stage: Stage, choice: random.Random, kills: int) -> None:
    """Kill and damage one command, then let it end, and compare the result."""
    ranks = choice.choice((1, 2))
    expected, duration = campaign.expected(stage, ranks), campaign.duration(stage, ranks)
    out = campaign.root / "out"
    story, damaged = [f"{ranks} ranks"], []
    stage.prepare(out)
    for _ in range(kills):
        before = list(out.rglob(".writing-*"))
        processes = stage.start(out, ranks, campaign.root)
        time.sleep(choice.uniform(0.1, 1.1) * duration)
        number = choice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        targets = processes if choice.random() < 0.5 else [choice.choice(processes)]
        for process in targets:
            process.send(number)
        campaign.end(stage, processes, {process.pid for process in targets})
        campaign.counts[stage.name, "kills"] += 1
        story.append(f"{number.name} to {len(targets)}")
        stopped = number == signal.SIGTERM and len(targets) == ranks and not stage.stops_together
        if stopped and not before and (left := list(out.rglob(".writing-*"))):
            campaign.problem("doubled", stage.name, f"{' > '.join(story)}: {left[0].name} left by SIGTERM")
        for name in stage.changed(out):
            campaign.problem("lost", stage.name, f"{' > '.join(story)}: {name} of the version before")
        if not stage.before and out.exists() and choice.random() < 0.6:
            kind = choice.choice(DAMAGES)
            if path := damage(out, kind, choice):
                damaged.append(path)
                campaign.counts[stage.name, "damages"] += 1
                story.append(f"{kind} {path.relative_to(out)}")
    for _ in range(1 + len(damaged)):
        codes = finish(campaign, stage, out, ranks, story, damaged)
        if codes is None:
            break
    else:
        campaign.problem("lost", stage.name, f"{' > '.join(story)}: does not end well")
    if codes is None:
        compare(campaign, stage, expected, out, story)
    shutil.rmtree(out, ignore_errors=True)


def finish(
    campaign: Campaign, stage: Stage, out: Path, ranks: int, story: list[str], damaged: list[Path]
) -> list[int | None] | None:
    """Run a command to its end; return None if it ended well, else its exit codes, after a repair that its error names."""
    processes = stage.start(out, ranks, campaign.root)
    codes = campaign.end(stage, processes, set())
    if not any(codes):
        return None
    errors = [line for process in processes for line in process.output.splitlines() if line.startswith("error: ")]
    story.append(errors[0] if errors else f"exit codes {codes}")
    checkpoint = re.search(r"error: (\S*/samples-\d+)\S*: .*(remove that folder|only checkpoint)", "\n".join(errors))
    if checkpoint:  # the only one: its message says to remove it
        campaign.counts[stage.name, "named"] += 1
        shutil.rmtree(checkpoint[1])
    return codes


def compare(campaign: Campaign, stage: Stage, expected: Path, out: Path, story: list[str]) -> None:
    """Count what differs from an undisturbed run."""
    try:
        wrong = stage.same(expected, out)
    except (OSError, ValueError, KeyError, SyntaxError, SafetensorError) as error:
        wrong = [f"cannot be read: {error}"]
    for name in wrong:
        if name.endswith((".tar", ".columns.json", ".columns.json missing")) and is_refused(out, name):
            campaign.counts[stage.name, "named"] += 1
            continue
        kind = "doubled" if name.endswith("doubled") else "lost" if name.endswith("missing") else "silent"
        campaign.problem(kind, stage.name, f"{' > '.join(story)}: {name}")


def is_refused(folder: Path, name: str) -> bool:
    """Return whether reading a shard names it as damaged, or what was noted of its samples is not used."""
    shard_name = f"{name.partition('.')[0]}.tar"
    record = next(shard for shard in manifests.load(str(folder)).shards if shard.name == shard_name)
    if ".columns.json" in name:
        return read_facts(str(folder), record) is None
    try:
        Cache().open(str(folder / name), record.bytes, record.crc32).close()
    except LfmError as error:
        return name in str(error)
    return False


def damaged_input(campaign: Campaign, stage: Stage, choice: random.Random) -> None:
    """Damage one input of a command, which must name it, or read what it was, and restore it."""
    ranks = choice.choice((1, 2))
    expected, path = campaign.expected(stage, ranks), choice.choice(stage.inputs)
    backup = campaign.root / "backup"
    (shutil.copytree if path.is_dir() else shutil.copy)(path, backup)
    kind = choice.choice(DAMAGES)
    changed = damage(path, kind, choice)
    out = campaign.root / "out"
    processes = stage.start(out, ranks, campaign.root)
    codes = campaign.end(stage, processes, set())
    campaign.counts[stage.name, "inputs"] += 1
    output = "".join(process.output for process in processes)
    if not any(codes):
        compare(campaign, stage, expected, out, [f"{kind} of the input {changed}"])
    elif changed and changed.name not in output and changed.parent.name not in output:
        campaign.problem("silent", stage.name, f"{kind} of the input {changed} is not named: {output[-400:]}")
    elif 2 not in codes:
        campaign.problem("lost", stage.name, f"{kind} of the input {changed}: exit codes {codes}: {output[-400:]}")
    else:
        campaign.counts[stage.name, "named"] += 1
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    backup.rename(path)
    shutil.rmtree(out, ignore_errors=True)


def print_table(campaign: Campaign) -> None:
    """Print the counts of every stage."""
    columns = ("kills", "damages", "inputs", "named", *PROBLEMS)
    print(f"{'':12}" + "".join(f"{column:>11}" for column in columns))
    for stage in (*[stage.name for stage in campaign.stages], "all"):
        sums = [
            sum(n for (name, kind), n in campaign.counts.items() if kind == column and stage in (name, "all"))
            for column in columns
        ]
        print(f"{stage:12}" + "".join(f"{value:11}" for value in sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="", help="comma-separated; all by default")
    options = parser.parse_args()
    import_diffusers()
    import pipelines.data.encode
    import pipelines.data.shard
    import pipelines.evaluation.evaluate
    import pipelines.evaluation.make_reference
    import pipelines.sampling.sample
    import pipelines.training.train  # noqa: F401

    root = Path(tempfile.mkdtemp(prefix="lfm-kill-"))  # not a TemporaryDirectory, which a fork would remove at its exit
    try:
        campaign = Campaign(root, make_stages(root))
        if options.stages:
            campaign.stages = [stage for stage in campaign.stages if stage.name in options.stages.split(",")]
        number = 0
        while sum(n for (_, kind), n in campaign.counts.items() if kind == "kills") < options.kills:
            stage = campaign.stages[number % len(campaign.stages)]
            choice = random.Random(f"{options.seed} {number}")
            number += 1
            episode(campaign, stage, choice, choice.randint(1, 4))
            if stage.inputs:
                damaged_input(campaign, stage, choice)
            if number % 10 == 0:
                print_table(campaign)
        print_table(campaign)
    finally:
        shutil.rmtree(root)
    problems = sum(n for (_, kind), n in campaign.counts.items() if kind in PROBLEMS)
    sys.exit(f"{problems} problems" if problems else 0)


if __name__ == "__main__":
    main()
