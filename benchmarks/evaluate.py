"""Compare the feature pass with the bare network, and the Frechet distance with scipy's sqrtm.

    python benchmarks/evaluate.py [--images 96] [--dimensions 2048] [--repeats 3] [--dry-run]

Each repeat times, in this process, (a) fd-lite on batches in memory, which is the limit, and (b) `lfm reference` on the same
images as files, which also reads, decodes, hashes and writes; then the Frechet distance of two covariances by symmetric
eigenvalues and by scipy.linalg.sqrtm of their product. Ratios are within a repeat. Finally, a separate process measures the
peak memory of the statistics of 50,000 features of 2,048 dimensions. --dry-run takes each measurement once, in the smallest
size.
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
from lfm import tensor_file
from pipelines.evaluation.feature_files import FeatureFiles
torch.manual_seed(0)
folder, num_blocks = sys.argv[1], int(sys.argv[2])
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's too
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
before = peak()
for block in range(num_blocks):
    tensor_file.save(f"{folder}/{block:06d}.safetensors", {"0.pooled": torch.randn(1000, 2048)}, {})
FeatureFiles(folder, (1000,) * num_blocks).statistics(0)
print(f"{before:.0f} {peak():.0f}")
"""


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def feature_pass(folder: Path, count: int, repeats: int) -> list[float]:
    """Return the time of the pass divided by that of the bare network, for each repeat."""
    images = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    (folder / "images").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{index:06d}.png")
    network = features.load("fd-lite")
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().split(BATCH)
    config = ReferenceConfig(str(folder / "images"), str(folder / "reference.safetensors"), overwrite=True)
    network(batches[0])
    ratios = []
    for _ in range(repeats):
        bare = timed(lambda: [network(batch) for batch in batches])
        complete = timed(lambda: run(config, World()))
        print(f"  network {count / bare:.1f} images/s, pass {count / complete:.1f} images/s", flush=True)
        ratios.append(complete / bare)
    return ratios


def distance(dimensions: int, repeats: int) -> list[float]:
    """Return the time of the Frechet distance divided by that of scipy's, for each repeat."""
    torch.manual_seed(0)
    first, second = (FeatureSums.of(torch.randn(2 * dimensions, dimensions) * scale).gaussian() for scale in (1.0, 1.2))
    product = (first.covariance @ second.covariance).numpy()
    ratios = []
    for _ in range(repeats):
        eigenvalues = timed(lambda: frechet_distance(first, second))
        sqrtm = timed(lambda: scipy.linalg.sqrtm(product))
        print(f"  eigenvalues {eigenvalues:.1f} s, sqrtm {sqrtm:.1f} s", flush=True)
        ratios.append(eigenvalues / sqrtm)
    return ratios


def show(name: str, ratios: list[float]) -> None:
    print(f"{name}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    arguments = parser.parse_args()
    num_blocks = 50
    if arguments.dry_run:
        arguments.images, arguments.dimensions, arguments.repeats, num_blocks = 2, 16, 1, 1
    with tempfile.TemporaryDirectory() as folder:
        ratios = feature_pass(Path(folder), arguments.images, arguments.repeats)
        show("time of `lfm reference` / the bare network", ratios)
    show("time of the Frechet distance / sqrtm", distance(arguments.dimensions, arguments.repeats))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", MEMORY, folder, str(num_blocks)]
        before, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"peak memory of {num_blocks * 1000:,} x 2,048 features: {peak} MB, {before} MB of them before the first")


if __name__ == "__main__":
    main()
