"""What the feature pass costs on top of the bare network, and the Frechet distance on top of scipy's sqrtm.

    python benchmarks/evaluate.py [--images 96] [--dimensions 2048] [--repeats 3]

Each repeat runs, in turn, in this process: (a) fd-lite on batches that lie in memory, the limit; (b) `lfm reference` on the
same images as files, which reads, decodes, hashes and writes. Then the Frechet distance of two covariances by symmetric
eigenvalues, and the same by scipy.linalg.sqrtm of their product. Ratios are within a repeat. Last, the peak memory of the
statistics of 50,000 features of 2,048 dimensions, in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image

from lfm.metrics import features
from lfm.metrics.frechet import FeatureSums, frechet_distance
from lfm.world import World
from pipelines.evaluation.make_reference import ReferenceConfig, run

SIZE, BATCH = 64, 32
MEMORY = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipelines import features
torch.manual_seed(0)
folder, counts = sys.argv[1], (1000,) * 50
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's too
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
before = peak()
for block in range(50):
    save_file({"0.pooled": torch.randn(1000, 2048)}, f"{folder}/{block:06d}.safetensors")
features.summarise(folder, counts, 0)
print(f"{before:.0f} {peak():.0f}")
"""


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def feature_pass(folder: Path, count: int, repeats: int) -> list[float]:
    """Times of the pass over those of the bare network."""
    images = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    (folder / "pictures").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / "pictures" / f"{index:06d}.png")
    network = features.load("fd-lite")
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().split(BATCH)
    config = ReferenceConfig(str(folder / "pictures"), str(folder / "reference.safetensors"), overwrite=True)
    network(batches[0])
    ratios = []
    for _ in range(repeats):
        bare = timed(lambda: [network(batch) for batch in batches])
        whole = timed(lambda: run(config, World()))
        print(f"  network {count / bare:.1f} images/s, pass {count / whole:.1f} images/s", flush=True)
        ratios.append(whole / bare)
    return ratios


def distance(dimensions: int, repeats: int) -> list[float]:
    """Times of the Frechet distance over those of scipy's."""
    torch.manual_seed(0)
    first, second = (FeatureSums.of(torch.randn(2 * dimensions, dimensions) * scale).gaussian() for scale in (1.0, 1.2))
    product = (first.covariance @ second.covariance).numpy()
    ratios = []
    for _ in range(repeats):
        ours = timed(lambda: frechet_distance(first, second))
        theirs = timed(lambda: scipy.linalg.sqrtm(product))
        print(f"  eigenvalues {ours:.1f} s, sqrtm {theirs:.1f} s", flush=True)
        ratios.append(ours / theirs)
    return ratios


def show(name: str, ratios: list[float]) -> None:
    print(f"{name}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ratios = feature_pass(Path(folder), arguments.images, arguments.repeats)
        show("time of `lfm reference` / the bare network", ratios)
    show("time of the Frechet distance / sqrtm", distance(arguments.dimensions, arguments.repeats))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", MEMORY, folder]
        before, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"peak memory of 50,000 x 2,048 features: {peak} MB, {before} MB of them before the first")


if __name__ == "__main__":
    main()
