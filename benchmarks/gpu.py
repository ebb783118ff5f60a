"""Rates on one GPU, of lfm and of the same work in plain PyTorch, in one command of at most seven minutes.

    python benchmarks/gpu.py [--out gpu.json] [--sections training sample ...] [--dry-run]

Each section is a process of its own with a limit on its time; what it measured until then is kept:

    products     the rate of large matrix products in each precision: the limit of everything below
    training     steps of DiT models in bfloat16, compiled: ours, and a plain loop (AdamW, clipping, EMA) on the same stream
    attention    the largest of these models with each kind of attention, compiled and not
    zero         ZeRO stages 1 to 3 on one rank: rate and peak memory
    encode       images/s of an autoencoder of Stable Diffusion's architecture in each precision, and of `lfm encode`
    sample       images/s of `model.sample` in each precision, and the share of the autoencoder's decoder
    checkpoint   for how long steps stop while a checkpoint is written
    tests        `pytest -m gpu`

Ours and plain steps alternate, so that ratios are of the same minute. On a GPU times are wall times around
synchronizations. --dry-run runs every section in its smallest size, on any device, and times the CPU; only the first one is a
process of its own then, since starting costs more than measuring.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from lfm.autoencoder import import_diffusers
from lfm.data import manifest as manifests
from lfm.data.raw_shards import read_raw
from lfm.flow.path import path_sample, squared_error
from lfm.inference.trained_model import TrainedModel
from lfm.models import registry
from lfm.precision import PRECISIONS, Precision, float32_arithmetic, precision_on, set_precision
from lfm.training.engine import Engine
from lfm.training.run_folder import RunFolder
from lfm.training.step_guard import StepGuard
from lfm.types import LatentBatch
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment import config_file
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes
from pipelines.training.stop_signals import StopRequest
from pipelines.training.training_loop import TrainingLoop

HERE = Path(__file__).parents[1]
ALONE = World()
DEVICE = factory.device(ALONE)
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large and how often everything is measured."""

    is_dry: bool = False
    product_size: int = 8192
    steps: int = 10
    rounds: int = 3
    num_images: int = 256
    batch: int = 64

    def image_size(self, pixels: int) -> int:
        """Size of the scenes whose latents stand for those of images of `pixels`: the embedded autoencoder divides by 4,
        the usual ones by 8."""
        return 16 if self.is_dry else pixels // 2

    def model(self, size: str) -> str:
        """The options of a DiT, as YAML without its braces."""
        return "hidden_size: 32, depth: 1, num_heads: 2" if self.is_dry else f"size: {size}"

    def batch_of(self, batch: int) -> int:
        """A batch that the device's memory holds: XL/2 with 256 samples takes 101 GB."""
        if self.is_dry:
            return 2
        is_large = torch.cuda.get_device_properties(DEVICE).total_memory > 100e9
        return batch if is_large else min(batch, 128)


FULL = Scale()
DRY = Scale(is_dry=True, product_size=64, steps=1, rounds=1, num_images=4, batch=2)


def clock() -> float:
    """Seconds: wall time after all work of a GPU, CPU time elsewhere."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(work: Callable[[], object], times: int = 1) -> float:
    began = clock()
    for _ in range(times):
        work()
    return (clock() - began) / times


def peak_gigabytes() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 1) if DEVICE.type == "cuda" else None


def free_memory() -> None:
    gc.collect()
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- sections ---------------------------------------------------------------------------------------------------


def products(scale: Scale, data: Path) -> Iterator[Row]:
    size = scale.product_size
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        factor = torch.randn(size, size, device=DEVICE, dtype=dtype)
        with float32_arithmetic(precision, DEVICE):
            for _ in range(3):
                factor @ factor
            seconds = seconds_of(lambda factor=factor: factor @ factor, 10)  # type: ignore[misc]
        yield {"product of": size, "precision": precision, "TFLOP/s": 2 * size**3 / seconds / 1e12}


class PlainLoop:
    """The usual loop: float32 weights, autocast, clipping, fused AdamW and an average of the weights."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network.to(DEVICE)
        self.weights: list[torch.Tensor] = list(self.network.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, batch: LatentBatch) -> None:
        example = path_sample(batch.latents, batch.noise, batch.uniform)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            velocity = self.network(example.state, example.time, batch.condition)
        squared_error(velocity, example.velocity).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1e-4)


class OurLoop:
    """The training stage's own loop on the latents in `data`."""

    def __init__(self, data: Path, folder: Path, model: str, batch: int, zero_stage: int = 1) -> None:
        path = folder / "benchmark.yaml"
        path.write_text(
            f"run: {folder / 'run'}\ncondition: class\ndata: {{shards: {data}}}\nmodel: {{{model}}}\n"
            f"train: {{num_steps: 1000, global_batch: {batch}, gradient_clipping: 1.0, precision: bf16}}\n"
            f"deepspeed: {HERE / 'configs' / 'deepspeed' / f'zero{zero_stage}.json'}\n"
        )
        config = config_file.load(str(path))
        mixture = factory.load_mixture(config)
        manifest = mixture.manifest
        self.model = factory.model_config(config, manifest)
        network = registry.build_network(self.model)
        self.plain_network = copy.deepcopy(network)
        self.is_compiled = factory.compiles_blocks(config)
        if self.is_compiled:
            network.compile_blocks()
            self.plain_network.compile_blocks()
        settings = factory.deepspeed_settings(config, ALONE)
        self.engine = Engine(network, settings, ALONE, ("ema",), StepGuard(20.0))
        assert manifest.autoencoder is not None
        self.header = WeightsHeader(
            self.model, manifest.autoencoder, manifest.image_size, manifest.classes, 0, manifest.digest, "benchmark"
        )
        self.loop = TrainingLoop(config, mixture, self.header, self.engine, RunFolder(config.run))
        self.batches = self.loop.stream.batches(0)
        self.stop_request = StopRequest()

    def step(self) -> None:
        self.loop.take_step(next(self.batches), self.stop_request)
        if len(self.loop._in_flight) > 1:  # as the loop does: the host is one step ahead of the device
            self.loop._in_flight.popleft()[1].values()

    def close(self) -> None:
        self.batches.close()
        self.loop.checkpoints.close()


@contextmanager
def our_loop(data: Path, model: str, batch: int, zero_stage: int = 1) -> Iterator[OurLoop]:
    free_memory()
    with tempfile.TemporaryDirectory() as folder:
        loop = OurLoop(data, Path(folder), model, batch, zero_stage)
        try:
            yield loop
        finally:
            loop.close()


def training(scale: Scale, data: Path) -> Iterator[Row]:
    for size, pixels, batch in (
        ("XL", 256, 256),
        ("XL", 256, 64),
        ("XL", 512, 32),
        ("B", 256, 256),
        ("L", 256, 128),
        ("S", 256, 256),
    ):
        batch = scale.batch_of(batch)
        row: Row = {"model": f"{size}/2", "pixels": pixels, "batch": batch}
        try:
            with our_loop(data / f"latents-{pixels}", scale.model(size), batch) as ours:
                row |= compare(scale, ours, batch)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        yield row
        if scale.is_dry:
            return


def compare(scale: Scale, ours: OurLoop, batch: int) -> Row:
    """Rates of our steps and of plain ones, in turn."""
    first = seconds_of(ours.step)
    seconds_of(ours.step, 2)
    ours_peak = peak_gigabytes()
    plain = PlainLoop(ours.plain_network)

    def plain_step() -> None:
        plain.step(next(ours.batches))

    seconds_of(plain_step, 3)
    waited = ours.loop.stream.wait_seconds
    rounds = [(seconds_of(ours.step, scale.steps), seconds_of(plain_step, scale.steps)) for _ in range(scale.rounds)]
    waited = ours.loop.stream.wait_seconds - waited
    our_seconds, plain_seconds = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [one / other for one, other in rounds]
    flops = 3 * (ours.model.flops_per_sample or 0) * batch
    return {
        "compiled": ours.is_compiled,
        "first step, s": first,
        "ours, images/s": batch / our_seconds,
        "plain, images/s": batch / plain_seconds,
        "ours / plain, time": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "ours, TFLOP/s": flops / our_seconds / 1e12,
        "plain, TFLOP/s": flops / plain_seconds / 1e12,
        "data wait": waited / sum(map(sum, rounds)) / scale.steps if rounds else 0.0,
        "our peak, GB": ours_peak,
        "both, peak GB": peak_gigabytes(),
    }


def attention(scale: Scale, data: Path) -> Iterator[Row]:
    backends = ("sdpa",) if scale.is_dry else ("sdpa", "xformers")
    for is_compiled in (False,) if scale.is_dry else (False, True):
        for backend in backends:
            batch = scale.batch_of(64)
            options = f"{scale.model('XL')}, attention: {backend}, compile: {str(is_compiled).lower()}"
            with our_loop(data / "latents-256", options, batch) as ours:
                seconds_of(ours.step, 3)
                rate = batch / seconds_of(ours.step, scale.steps)
            yield {
                "model": "XL/2",
                "batch": batch,
                "attention": backend,
                "compiled": is_compiled,
                "ours, images/s": rate,
            }


def zero(scale: Scale, data: Path) -> Iterator[Row]:
    for stage in (1, 2, 3):
        batch = scale.batch_of(128)
        with our_loop(data / "latents-256", scale.model("B"), batch, stage) as ours:
            seconds_of(ours.step, 3)
            rate = batch / seconds_of(ours.step, scale.steps)
        yield {"model": "B/2", "batch": batch, "ZeRO": stage, "images/s": rate, "peak, GB": peak_gigabytes()}


def encode_images(scale: Scale, data: Path) -> Iterator[Row]:
    """Encode with an autoencoder of Stable Diffusion's architecture; its time does not depend on its weights."""
    widths = (8, 8, 8, 8) if scale.is_dry else (128, 256, 512, 512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_diffusers().AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=8, sample_size=256,
            scaling_factor=0.18215,
        ).save_pretrained(folder / "sd")  # fmt: skip
        raw = data / "raw-512"  # scenes of half that size
        manifest = manifests.load(str(raw), "raw")
        batch = min(scale.batch, manifest.num_samples)

        def decode_all() -> list[Any]:
            images = []
            for entry in manifest.shards:
                with (raw / entry.name).open("rb") as stream:
                    images += [sample.image for sample in read_raw(stream, entry.name)]
            return images

        began = time.perf_counter()
        images = torch.stack([torch.from_numpy(image) for image in decode_all()]).permute(0, 3, 1, 2)
        decoding = time.perf_counter() - began
        for precision in PRECISIONS:
            autoencoder = factory.autoencoder(str(folder / "sd"), ALONE, precision_on(DEVICE, precision))
            autoencoder.encode(images[:batch])
            bare = seconds_of(lambda a=autoencoder: [a.encode(part) for part in images.split(batch)])  # type: ignore[misc]
            config = encode.EncodeConfig(
                str(raw),
                str(folder / precision),
                str(folder / "sd"),
                batch_size=batch,
                precision=cast(Precision, precision),
            )
            stage = seconds_of(lambda c=config: encode.run(c, ALONE))  # type: ignore[misc]
            yield {
                "pixels": manifest.image_size,
                "images": len(images),
                "precision": precision,
                "network alone, images/s": len(images) / bare,
                "lfm encode with its start, images/s": len(images) / stage,
                "decoding of the files / network, time": decoding / bare,
            }


def sample(scale: Scale, data: Path) -> Iterator[Row]:
    num_steps = 2 if scale.is_dry else 10
    with our_loop(data / "latents-256", scale.model("B"), scale.batch_of(64)) as ours:
        header, batch = ours.header, scale.batch
        for precision in PRECISIONS:
            precision = precision_on(DEVICE, precision)
            network = set_precision(registry.build_network(ours.model), precision).to(DEVICE).eval()
            decoder = factory.autoencoder("embedded", ALONE, "fp32" if precision == "fp32" else "tf32")
            model = TrainedModel(network, replace(header), decoder, precision=precision)

            def draw(model: TrainedModel = model) -> Any:
                return model.sample(range(batch), class_index=0, solver="heun", num_steps=num_steps, batch_size=batch)

            latents = draw().latents
            total = seconds_of(draw, scale.rounds)
            decoding = seconds_of(lambda m=model, z=latents: m.decode(z, batch), scale.rounds)  # type: ignore[misc]
            yield {
                "model": "B/2",
                "precision": precision,
                "heun steps": num_steps,
                "images/s": batch / total,
                "share of the decoder": decoding / total,
            }


def checkpoint(scale: Scale, data: Path) -> Iterator[Row]:
    with our_loop(data / "latents-256", scale.model("B"), scale.batch_of(128)) as ours:
        seconds_of(ours.step, 3)
        plain = seconds_of(ours.step, scale.steps)
        for number in range(3):  # the first one allocates the host's memory, which is kept
            ours.loop.checkpoints.finish()
            began = clock()
            ours.loop.checkpoints.start(replace(ours.header, samples_seen=ours.loop.samples_seen))
            stall = clock() - began
            during = seconds_of(ours.step, scale.steps)
            wall = time.perf_counter()
            ours.loop.checkpoints.finish()
            yield {
                "checkpoint": number + 1,
                "stall, s": stall,
                "step / step without, while it is written": during / plain,
                "left to write after these steps, s": time.perf_counter() - wall,
            }


def tests(scale: Scale, data: Path) -> Iterator[Row]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["--version"] if scale.is_dry else ["tests"]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    yield {"pytest -m gpu": lines[-1] if lines else result.stderr[-200:], "exit code": result.returncode}


SECTIONS: dict[str, tuple[Callable[[Scale, Path], Iterator[Row]], int]] = {  # with the most seconds that each may take
    "products": (products, 25),
    "training": (training, 150),
    "tests": (tests, 110),
    "attention": (attention, 40),
    "zero": (zero, 30),
    "encode": (encode_images, 30),
    "sample": (sample, 30),
    "checkpoint": (checkpoint, 30),
}
BUDGET = 420


# --- processes --------------------------------------------------------------------------------------------------


def prepare(scale: Scale, data: Path) -> None:
    """Raw shards and latents of drawn scenes, for images of 256 and 512 pixels."""
    for pixels in (256, 512):
        size, scenes = scale.image_size(pixels), data / f"scenes-{pixels}"
        draw_scenes.run(draw_scenes.ScenesConfig(str(scenes), num=scale.num_images, image_size=size))
        shard.run(shard.ShardConfig(str(scenes / "images"), str(data / f"raw-{pixels}"), image_size=size))
        encode.run(encode.EncodeConfig(str(data / f"raw-{pixels}"), str(data / f"latents-{pixels}")), ALONE)


def run_section(name: str, data: Path, is_dry: bool, limit: float) -> Iterator[Row]:
    """Run a section in a process of its own, and yield its rows as they come; one that says how it ended, if it failed."""
    command = [sys.executable, __file__, "--section", name, "--data", str(data), *(["--dry-run"] if is_dry else [])]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith('{"row": '):
                yield json.loads(line)["row"]
        has_time_left = timer.is_alive()
        timer.cancel()
        if process.wait():
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            yield {"error": last if has_time_left else f"stopped after {limit:.0f} s"}


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}" if isinstance(
            value, float
        ) else "" if value is None else str(value)  # fmt: skip

    lines = [columns, ["---"] * len(columns), *[[cell(row.get(column)) for column in columns] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None, help="JSON file for all figures")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    options = parser.parse_args()
    scale = DRY if options.dry_run else FULL
    if options.section:
        for row in SECTIONS[options.section][0](scale, Path(options.data)):
            print(json.dumps({"row": row}), flush=True)
        return
    if DEVICE.type != "cuda" and not options.dry_run:
        sys.exit("no CUDA device; --dry-run runs everything in its smallest size on a CPU")
    began = time.perf_counter()
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{card}; {versions}", flush=True)
    report: dict[str, Any] = {"card": card, "versions": versions}
    with tempfile.TemporaryDirectory() as name:
        prepare(scale, Path(name))
        for section in options.sections:
            measure, limit = SECTIONS[section]
            left = BUDGET - (time.perf_counter() - began)
            if options.dry_run and section != options.sections[0]:
                rows = list(measure(scale, Path(name)))
            else:
                rows = list(run_section(section, Path(name), options.dry_run, min(limit, left))) if left > 5 else []
            report[section] = rows or [{"error": "no time left"}]
            print(f"\n## {section}\n\n{table(report[section])}", flush=True)
            if options.out:
                Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
