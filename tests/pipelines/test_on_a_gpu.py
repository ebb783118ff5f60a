"""The stages on one GPU: what differs from a CPU, in under two minutes. Each test prints what it measured.

LFM_GPU_TESTS=cpu runs them on a CPU, to try the tests themselves.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lfm as library
from tests.support.commands import REPOSITORY, SmallSet, Tasks, lfm
from tests.support.feature_networks import PooledPixels, export_network, make_small_reference, trusting_lfm
from tests.support.training_runs import losses, start, train, zero

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() and os.environ.get("LFM_GPU_TESTS") != "cpu":
    pytest.skip("no CUDA device", allow_module_level=True)
QUICK = ("model.compile=false", "train.checkpoint_every=10", "train.schedule=constant")


def loss_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference of two loss curves of the same length."""
    assert len(one) == len(other)
    return max(abs(first - second) for first, second in zip(one, other, strict=True))


def test_a_killed_training_resumes(experiment: Path, tmp_path: Path) -> None:
    """Bit for bit, where two uninterrupted trainings are equal: some kernels of backward passes add in any order."""
    settings = (*QUICK, "train.num_steps=200", "train.checkpoint_every=50")
    runs = [tmp_path / name for name in ("one", "other", "killed")]
    for run in runs[:2]:
        assert train(experiment, f"run={run}", *settings).returncode == 0
    processes = start(experiment, f"run={runs[2]}", *settings)
    while processes[0].poll() is None and not list((runs[2] / "checkpoints").glob("samples-*")):
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (runs[2] / "checkpoints" / "samples-000000001600").exists(), "it was killed too late to show anything"
    resumed = train(experiment, f"run={runs[2]}", *settings)
    assert resumed.returncode == 0 and "from samples-" in resumed.stdout, resumed.stderr
    spread = loss_difference(losses(runs[0]), losses(runs[1]))
    difference = loss_difference(losses(runs[0]), losses(runs[2]))
    print(f"losses of equal trainings differ by {spread:.3g}, after a kill by {difference:.3g}")
    assert difference <= 4 * spread
    if spread == 0:
        weights = [load_file(run / "weights.safetensors") for run in runs]
        assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("name", ["zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_zero_stages_train_alike(experiment: Path, tmp_path: Path, name: str) -> None:
    settings = ("train.precision=bf16", *QUICK)
    assert train(experiment, f"run={tmp_path / 'zero1'}", *settings, zero(1)).returncode == 0
    deepspeed = f"deepspeed={REPOSITORY / 'configs' / 'deepspeed' / name}.json"
    result = train(experiment, f"run={tmp_path / name}", *settings, deepspeed)
    assert result.returncode == 0, result.stderr
    difference = loss_difference(losses(tmp_path / "zero1"), losses(tmp_path / name))
    print(f"{name}: largest difference of the loss to ZeRO 1 in {len(losses(tmp_path / name))} steps {difference:.2g}")
    assert difference < 0.02


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_compiled_blocks_train_as_eager_ones(experiment: Path, tmp_path: Path, precision: str) -> None:
    rates = {}
    for compiles in ("false", "true"):
        run = tmp_path / compiles
        result = train(
            experiment, f"run={run}", f"train.precision={precision}", f"model.compile={compiles}", "train.log_every=1"
        )
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rates[compiles] = lines[-1]["samples_per_second"]
    difference = loss_difference(losses(tmp_path / "false"), losses(tmp_path / "true"))
    print(
        f"{precision}: eager {rates['false']:.0f}, compiled {rates['true']:.0f} samples/s; losses {difference:.2g} apart"
    )
    assert difference < (0.05 if precision == "bf16" else 0.01)


def test_latents_are_those_of_fp32(small_set: SmallSet, tmp_path: Path) -> None:
    means = {}
    for precision in ("fp32", "tf32", "bf16"):
        out = tmp_path / precision
        encode = ("encode", small_set.raw, out, "--autoencoder", small_set.autoencoder)
        result = lfm(*encode, "--precision", precision)
        assert result.exit_code == 0, result.stderr
        with tarfile.open(out / "000000.tar") as tar:
            files = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".latent.npy")]
            latents = np.stack([np.load(io.BytesIO(file.read())) for file in files if file])  # (N, 2C, h, w)
        means[precision] = np.split(latents.astype(np.float32), 2, 1)[0]
    for precision, limit in (("tf32", 0.005), ("bf16", 0.05)):
        difference = means[precision] - means["fp32"]
        error = float(np.sqrt((difference**2).mean()) / means["fp32"].std())
        print(f"{precision}: root mean square difference to fp32 {error:.2g} of the spread of the latents")
        assert error < limit


def test_images_depend_on_seed_and_batch_size_alone(tasks: Tasks) -> None:
    model = library.load(str(tasks.runs / "class"))
    one = model.sample(range(10), class_index=0, batch_size=8, num_steps=4).images
    for seeds in ([0], [9], [3, 4, 5]):
        other = model.sample(seeds, class_index=0, batch_size=8, num_steps=4).images
        np.testing.assert_array_equal(other, one[seeds])
    batches = model.sample(range(10), class_index=0, batch_size=3, num_steps=4).images
    difference = np.abs(batches.astype(int) - one.astype(int)).max()
    print(f"batches of 3 and 8: images differ by at most {difference} grey levels")
    assert difference <= 2


def test_precisions_of_sampling_give_one_image(tasks: Tasks) -> None:
    images = {}
    for precision in ("fp32", "tf32", "bf16"):
        model = library.load(str(tasks.runs / "class"), precision=precision)
        images[precision] = model.sample(range(4), class_index=0, num_steps=4).images.astype(int)
    for precision in ("tf32", "bf16"):
        difference = np.abs(images[precision] - images["fp32"]).mean()
        print(f"{precision}: mean difference to fp32 {difference:.2g} grey levels")
        assert difference < 4


def test_evaluation_runs(small_set: SmallSet, weights: Path, tmp_path: Path) -> None:
    network = export_network(PooledPixels(), tmp_path / "network.pt2")
    reference = make_small_reference(small_set, network, tmp_path)
    out = tmp_path / "report"
    result = trusting_lfm("evaluate", weights, "--reference", reference, "--num", 16, "--out", out, "--num-steps", 2)
    assert result.exit_code == 0, result.stderr
    print(result.output.splitlines()[-1])
