"""Mutate the files that strangers may hand over, and run the commands that read them.

    python -m tests.campaigns.fuzz --cases 2000

Manifests, shard records, recipes, shards, headers of weights, references and autoencoders, and configurations are mutated:
numbers become negative, huge or not numbers; values change their type; keys go, come and repeat; names become URLs, devices,
paths and commands. Checksums are made to fit, so that the content is read. A command must end with exit code 0, or with exit
code 2 and one line. Counted are, each of which must be 0:

    tracebacks   any other end, a crash included
    memory       more than 2 GB
    time         more than 20 seconds of a core
    requests     to a local server that all URLs point to, as do those of the Hugging Face Hub
    commands     that were run: they would leave a marker file
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch

from lfm import storage, tensor_file
from lfm.autoencoder import import_diffusers
from lfm.data import manifest as manifests
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import single_source
from lfm.errors import LfmError
from lfm.storage.cache import Cache
from pipelines.cli import model_commands
from pipelines.cli.main import main as lfm
from pipelines.demo import draw_scenes
from tests.support.commands import ALONE, REPOSITORY, free_port, make_autoencoder
from tests.support.forks import Fork, fork
from tests.support.training_runs import YAML

PORT = free_port()
MOST_BYTES, MOST_SECONDS, HANG_SECONDS = 2 << 30, 20.0, 120.0
PROBLEMS = ("tracebacks", "memory", "time", "requests", "commands")
NUMBERS = (
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    -(10**18),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    65_537,
)
DTYPES = ("|O", "<M8[s]", "|V100000000", ">f4", "<U4", "|S8", "<c16", "|u1", "<f8", "(2,3)<f4", "f2,f2")


def names(marker: Path) -> tuple[str, ...]:
    """Return texts that ask for a request, a file, a device or a command."""
    url = f"http://127.0.0.1:{PORT}/file"
    return (
        *(url, f"{url}.pt2", f"{url}.safetensors", "someone/autoencoder", f"s3://{url[7:]}", f"filecache::{url}"),
        *(f"pipe:touch {marker}", f"!!python/object/apply:os.system ['touch {marker}']", f"$(touch {marker})"),
        *("/dev/zero", "/dev/stdin", "/proc/self/mem", "../../../etc/passwd", "file:///etc/passwd", "\x1b[2J\n", "\0"),
        *("", "x" * 100_000, "000000.tar", "inception:/dev/zero", "a/b\udc80", "{0.__class__}", "%s%s%n"),
    )


@dataclass(frozen=True)
class Target:
    """A file to mutate, and what reads it."""

    name: str
    path: Path
    mutate: Callable[[Path, random.Random], None]  # changes the file
    read: Callable[[Path], object]  # of a folder for results; raises SystemExit as commands do


@dataclass
class Inputs:
    """The folders of a small data set, its model and its reference."""

    root: Path
    marker: Path = field(init=False)

    def __post_init__(self) -> None:
        self.marker = self.root / "marker"

    def __truediv__(self, name: str) -> Path:
        return self.root / name


# --- mutations -----------------------------------------------------------------------------------------------------


def mutated(value: Any, choice: random.Random, marker: Path) -> Any:
    """Return JSON content with one to three changes at random places."""
    value = copy.deepcopy(value)
    for _ in range(choice.choice((1, 1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return _any_value(choice, marker)
        parent, key = choice.choice(places)
        change = choice.random()
        if change < 0.1:
            del parent[key]
        elif change < 0.2 and isinstance(parent, dict):
            parent[choice.choice((str(key) + "x", "__class__", "", "trust_code"))] = _any_value(choice, marker)
        elif change < 0.3 and isinstance(parent, list):
            parent.extend(copy.deepcopy(parent[key]) for _ in range(choice.choice((1, 50, 5000))))
        elif change < 0.4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * choice.choice((-1, 2, 1000, 10**6)) + choice.choice((-1, 0, 1))
        elif isinstance(parent[key], int | float) and change < 0.8:
            parent[key] = choice.choice(NUMBERS)
        elif isinstance(parent[key], str) and change < 0.8:
            parent[key] = choice.choice(names(marker) + DTYPES)
        else:
            parent[key] = _any_value(choice, marker)
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield value, key
        yield from _places(child)


def _any_value(choice: random.Random, marker: Path) -> Any:
    nested: Any = 1
    for _ in range(choice.choice((3, 300))):
        nested = [nested] if choice.random() < 0.5 else {"a": nested}
    return choice.choice(
        (
            None,
            True,
            [],
            {},
            [[]],
            nested,
            {"a": 1},
            list(range(5000)),
            choice.choice(NUMBERS),
            choice.choice(names(marker)),
        )
    )


def damaged(content: bytes, choice: random.Random) -> bytes:
    """Return bytes with a piece changed, doubled or removed."""
    place = choice.randrange(max(1, len(content)))
    size = choice.choice((1, 8, 512))
    piece = choice.choice((b"", choice.randbytes(size), bytes(size), b"\xff" * size, content[place : place + size] * 2))
    return content[:place] + piece + content[place + choice.choice((0, size)) :]


def mutate_json(marker: Path, path: Path, choice: random.Random) -> None:
    """Change a JSON file; one of eight times as text, and one of sixteen to nested brackets."""
    if choice.random() < 1 / 16:
        path.write_text(choice.choice(("[", '{"a":')) * choice.choice((500, 200_000)))
    elif choice.random() < 1 / 8:
        path.write_bytes(damaged(path.read_bytes(), choice))
    else:
        content = json.loads(path.read_text())
        content.pop("lfm_crc32", None)
        path.write_text(json.dumps(mutated(content, choice, marker)))


def mutate_yaml(marker: Path, path: Path, choice: random.Random) -> None:
    """Change a configuration as JSON content, which is YAML, or by lines that only YAML has."""
    from ruamel.yaml import YAML as Parser

    text = path.read_text()
    url = f"http://127.0.0.1:{PORT}/base.yaml"
    lines = (
        *("extends: /dev/zero", f"extends: {url}", "extends: small.yaml", f"extends: [{', '.join(['a.yaml'] * 99)}]"),
        *(f"x: !!python/object/apply:os.system ['touch {marker}']", "? [a, b]\n: 1", "a: &a [*a, *a]", "- 1", "\t"),
        "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
        "run: " + "[" * choice.choice((40, 5000)),
        *(
            f"deepspeed: {url}",
            "deepspeed: /dev/zero",
            "train: !!binary aGVsbG8=",
            "model: !!set {a, b}",
            "run: 2024-13-45",
        ),
    )
    if choice.random() < 0.25:
        path.write_text(f"{text}\n{choice.choice(lines)}\n")
    elif choice.random() < 0.1:
        path.write_bytes(damaged(text.encode(), choice))
    else:
        content = Parser(typ="safe", pure=True).load(text)
        path.write_text(json.dumps(mutated(json.loads(json.dumps(content)), choice, marker)))


def mutate_tensors(marker: Path, path: Path, choice: random.Random) -> None:
    """Change the header or a tensor of a safetensors file of lfm, with a fitting checksum; or its bytes."""
    if choice.random() < 0.15:
        path.write_bytes(damaged(path.read_bytes(), choice))
        return
    tensors, header = tensor_file.load(str(path))
    if choice.random() < 0.7:
        header = mutated(header, choice, marker)
        header = header if isinstance(header, dict) else {}
    else:
        name = choice.choice(sorted(tensors))
        change = choice.randrange(6)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name] = tensors[name].reshape(-1)[:-1]
        elif change == 2:
            tensors[name] = tensors[name].to(choice.choice((torch.int64, torch.float16, torch.bool, torch.uint8)))
        elif change == 3:
            tensors[name] = torch.full_like(tensors[name], choice.choice((0, 1, -1)))
        elif change == 4 and tensors[name].is_floating_point():
            tensors[name] = tensors[name] * choice.choice((float("nan"), float("inf"), 1e30))
        else:
            tensors[name + "x"] = tensors[name].clone()
    try:
        tensor_file.save(str(path), tensors, header or {})
    except Exception:  # what cannot be written need not be read
        path.write_bytes(damaged(path.read_bytes(), choice))


def mutate_shard(path: Path, choice: random.Random) -> None:
    """Change the bytes of a shard, and its checksum in the manifest."""
    content = path.read_bytes()
    for _ in range(choice.randint(1, 3)):
        content = damaged(content, choice)
    path.write_bytes(content)
    manifest = path.with_name("manifest.json")
    values = json.loads(manifest.read_text())
    values.pop("lfm_crc32", None)
    for shard in values["shards"]:
        if shard["name"] == path.name:
            shard |= {"bytes": len(content), "crc32": storage.crc32(content)}
    manifest.write_text(json.dumps(values))


# --- readers -------------------------------------------------------------------------------------------------------


def make_targets(inputs: Inputs) -> list[Target]:
    """Make all files, in a fork, and return them with their readers."""
    shard = ("--image-size", 16, "--samples-per-shard", 8)
    encode = ("--autoencoder", inputs / "autoencoder")
    config = inputs / "small.yaml"
    config.write_text(YAML.format(run=inputs / "run", latents=inputs / "latents", deepspeed="."))
    shutil.copy(REPOSITORY / "configs" / "deepspeed" / "zero1.json", inputs.root)

    def run(*arguments: object) -> None:
        lfm.main(list(map(str, arguments)), "lfm", standalone_mode=True)

    def train(*arguments: object) -> None:
        model_commands.train.main(["--config", str(config), *map(str, arguments)], "lfm")

    def sample(out: Path) -> None:
        run("sample", inputs / "run", "--out", out, "--num-steps", 1, "--seeds", "0-1", *encode)

    def make() -> None:
        draw_scenes.run(draw_scenes.ScenesConfig(str(inputs / "scenes"), num=24, image_size=16))
        make_autoencoder(inputs / "autoencoder", seed=0)
        run("shard", inputs / "scenes/images", inputs / "raw", *shard)
        run("encode", inputs / "raw", inputs / "latents", *encode)
        run("data", "drop", inputs / "latents", "000000000000", "000001000001")
        run("reference", inputs / "raw", inputs / "reference.safetensors")
        train("--set", "train.num_steps=5")
        sample(inputs / "samples")

    maker = fork(make, inputs / "make.log")
    assert maker.wait(600) == 0, maker.output

    def read_batches(_: Path) -> None:
        manifest = manifests.load(str(inputs / "latents"), "latents")
        options = StreamOptions(global_batch=8, conditions=frozenset({"class"}))
        stream = LatentStream(single_source(str(inputs / "latents"), manifest), options, ALONE, Cache(inputs / "cache"))
        for number in range(3):
            stream.batch(8 * number)

    def mutate(kind: Callable[[Path, Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
        return lambda path, choice: kind(inputs.marker, path, choice)

    raw, latents, samples = inputs / "raw", inputs / "latents", inputs / "samples"
    evaluate = ("--reference", inputs / "reference.safetensors", "--dry-run")
    return [
        Target(
            "raw manifest", raw / "manifest.json", mutate(mutate_json), lambda out: run("encode", raw, out, *encode)
        ),
        Target("raw manifest", raw / "manifest.json", mutate(mutate_json), lambda out: run("inspect", raw)),
        Target("latent manifest", latents / "manifest.json", mutate(mutate_json), read_batches),
        Target("latent manifest", latents / "manifest.json", mutate(mutate_json), lambda out: run("inspect", latents)),
        Target("latent manifest", latents / "manifest.json", mutate(mutate_json), lambda out: train("--dry-run")),
        Target("dropped samples", latents / "dropped.json", mutate(mutate_json), lambda out: train("--dry-run")),
        Target("dropped samples", latents / "dropped.json", mutate(mutate_json), lambda out: run("inspect", latents)),
        Target("raw shard", raw / "000001.tar", mutate_shard, lambda out: run("encode", raw, out, *encode)),
        Target("latent shard", latents / "000001.tar", mutate_shard, read_batches),
        Target(
            "record",
            raw / "000001.json",
            mutate(mutate_json),
            lambda out: run("shard", inputs / "scenes/images", raw, *shard),
        ),
        Target(
            "recipe",
            raw / "recipe.json",
            mutate(mutate_json),
            lambda out: run("shard", inputs / "scenes/images", raw, *shard),
        ),
        Target(
            "recipe", latents / "recipe.json", mutate(mutate_json), lambda out: run("encode", raw, latents, *encode)
        ),
        Target("sample recipe", samples / "recipe.json", mutate(mutate_json), lambda out: sample(samples)),
        Target("weights", inputs / "run/weights.safetensors", mutate(mutate_tensors), sample),
        Target(
            "weights",
            inputs / "run/weights.safetensors",
            mutate(mutate_tensors),
            lambda out: run("sample", inputs / "run", "--out", out, "--num-steps", 1),
        ),
        Target(
            "reference",
            inputs / "reference.safetensors",
            mutate(mutate_tensors),
            lambda out: run("evaluate", raw, "--out", out, *evaluate),
        ),
        Target(
            "autoencoder",
            inputs / "autoencoder/config.json",
            mutate(mutate_json),
            lambda out: run("encode", raw, out, *encode),
        ),
        Target("YAML", config, mutate(mutate_yaml), lambda out: train("--dry-run")),
        Target("DeepSpeed JSON", inputs / "zero1.json", mutate(mutate_json), lambda out: train("--dry-run")),
        Target("checkpoint", newest_state(inputs), mutate(mutate_json), lambda out: train("--dry-run")),
    ]


def newest_state(inputs: Inputs) -> Path:
    return sorted((inputs / "run/checkpoints").glob("samples-*/state.json"))[-1]


# --- cases ---------------------------------------------------------------------------------------------------------


def serve(requests: Path) -> None:
    """Answer all requests with 404, and note them in a file."""

    class Handler(BaseHTTPRequestHandler):
        def note(self) -> None:
            with requests.open("a") as file:
                file.write(f"{self.command} {self.path}\n")
            self.send_error(404)

        do_GET = do_HEAD = do_POST = do_PUT = note

    HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()


def limit_memory(function: Callable[[], object]) -> None:
    """Run a function that may map little more memory than it may use: without a limit it could take the machine's."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * MOST_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function()
    except LfmError as error:  # of a reader that is no command
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def problems_of(process: Fork, requests: Path, marker: Path) -> list[str]:
    """Return the problems of a process that has ended; code is None if it was stopped."""
    problems = []
    if process.code is None or process.cpu_seconds > MOST_SECONDS:
        problems.append("time")
    if process.peak_bytes > MOST_BYTES:
        problems.append("memory")
    output = process.output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if (
        "Traceback (most recent" in output
        or process.code not in (None, 0, 2)
        or (process.code == 2) != (len(errors) == 1)
    ):
        problems.append("tracebacks")
    if requests.exists():
        problems.append("requests")
    if marker.exists():
        problems.append("commands")
    return problems


def run_case(inputs: Inputs, target: Target, choice: random.Random, counts: Counter[tuple[str, str]]) -> None:
    """Mutate one file, run its reader, count its problems, and restore all files."""
    out, backup, requests, folder = inputs / "out", inputs / "backup", inputs / "requests", target.path.parent
    if folder == inputs.root:
        shutil.copy(target.path, backup)
    else:
        shutil.copytree(folder, backup)
    target.mutate(target.path, choice)
    content = target.path.read_bytes()
    process = fork(lambda: limit_memory(lambda: target.read(out)), inputs / "case.log")
    if process.wait(HANG_SECONDS) is None:
        os.kill(process.pid, 9)
        os.waitpid(process.pid, 0)
    counts[target.name, "cases"] += 1
    counts[target.name, "refused" if process.code == 2 else "accepted"] += 1
    for problem in problems_of(process, requests, inputs.marker):
        counts[target.name, problem] += 1
        print(f"{problem.upper()} {target.name}: {content[:1500]!r}\n{process.output[-1500:]}", flush=True)
        if requests.exists():
            print(requests.read_text())
    for path in (requests, inputs.marker):
        path.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    if backup.is_dir():
        shutil.rmtree(folder)
        backup.rename(folder)
    else:
        backup.rename(target.path)


def print_table(counts: Counter[tuple[str, str]]) -> None:
    """Print the counts of every kind of file."""
    columns = ("cases", "accepted", "refused", *PROBLEMS)
    print(f"{'':16}" + "".join(f"{column:>11}" for column in columns))
    for name in (*dict.fromkeys(name for name, _ in counts), "all"):
        sums = [
            sum(n for (which, kind), n in counts.items() if kind == column and name in (which, "all"))
            for column in columns
        ]
        print(f"{name:16}" + "".join(f"{value:11}" for value in sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run the case of this number alone")
    options = parser.parse_args()
    assert "huggingface_hub" not in sys.modules, "it reads the variable when it is imported"
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{PORT}"
    import_diffusers()
    import pipelines.data.encode
    import pipelines.data.inspect_shards
    import pipelines.data.shard
    import pipelines.evaluation.evaluate
    import pipelines.evaluation.make_reference
    import pipelines.sampling.sample
    import pipelines.training.train  # noqa: F401

    root = Path(tempfile.mkdtemp(prefix="lfm-fuzz-"))  # not a TemporaryDirectory, which a fork would remove at its exit
    counts: Counter[tuple[str, str]] = Counter()
    server = None
    try:
        inputs = Inputs(root)
        targets = make_targets(inputs)
        server = fork(lambda: serve(inputs / "requests"), root / "server.log")
        for number in range(options.cases) if options.only is None else [options.only]:
            print(f"case {number}", flush=True)
            run_case(inputs, targets[number % len(targets)], random.Random(f"{options.seed} {number}"), counts)
        print_table(counts)
    finally:
        if server:
            server.send(9)
            server.wait(5)
        shutil.rmtree(root)
    problems = sum(n for (_, kind), n in counts.items() if kind in PROBLEMS)
    sys.exit(f"{problems} problems" if problems else 0)


if __name__ == "__main__":
    main()
