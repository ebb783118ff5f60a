"""Training by its command: parity over ranks and ZeRO stages, resuming after kill -9, and what it says to bad input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import REPOSITORY, SmallSet, assert_one_line, lfm
from safetensors.torch import load_file

from pipelines import cli_model
from pipelines.config import TrainConfig
from pipelines.train import learning_rate_at

SCRIPT = REPOSITORY / "launch" / "train.py"

YAML = """
run: {run}
condition: class
class_dropout: 0.1
data:
  shards: {latents}
  window: 2
model:
  hidden_size: 32
  depth: 2
  num_heads: 2
train:
  num_steps: 20
  global_batch: 8
  learning_rate: 1.0e-3
  warmup_steps: 5
  schedule: cosine
  gradient_clipping: 1.0
  ema_decay: 0.99
  checkpoint_every: 5
  log_every: 1
deepspeed: {deepspeed}/zero1.json
"""


@pytest.fixture
def experiment(small_set: SmallSet, tmp_path: Path) -> Path:
    """A small experiment's YAML; its run folder is tmp_path/run."""
    path = tmp_path / "small.yaml"
    folders = {"run": tmp_path / "run", "latents": small_set.latents, "deepspeed": REPOSITORY / "configs" / "deepspeed"}
    path.write_text(YAML.format(**folders))
    return path


def start(config: Path, *overrides: str, ranks: int = 1) -> list[subprocess.Popen[str]]:
    """Start the ranks as torchrun would, without its seconds."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "--config", str(config)]
    command += [part for override in overrides for part in ("--set", override)]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment = {
            **os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"
        }  # fmt: skip
        processes.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> subprocess.CompletedProcess[str]:
    """Wait for all; returns the first rank's result."""
    results = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    return subprocess.CompletedProcess([], results[0][2], results[0][0], "".join(result[1] for result in results))


def train(config: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return finish(start(config, *overrides, ranks=ranks))


def plan(config: Path, *overrides: str) -> Result:
    """A dry run in this process."""
    settings = [part for override in overrides for part in ("--set", override)]
    return lfm("--config", config, "--dry-run", *settings, command=cli_model.train)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(run / "weights.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.slow
def test_the_loss_curve_is_the_same_on_one_and_two_ranks_under_every_zero_stage(
    experiment: Path, tmp_path: Path
) -> None:
    curves = {}
    for stage in (1, 2, 3):
        for ranks in (1, 2):
            run = tmp_path / f"zero{stage}-{ranks}"
            settings = REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json"
            result = train(experiment, f"run={run}", f"deepspeed={settings}", "train.micro_batch=2", ranks=ranks)
            assert result.returncode == 0, result.stderr
            curves[stage, ranks] = torch.tensor(losses(run))
    reference = curves[1, 1]
    assert len(reference) == 20
    for curve in curves.values():
        torch.testing.assert_close(curve, reference, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(experiment: Path, tmp_path: Path, stage: int) -> None:
    settings = f"deepspeed={REPOSITORY / 'configs' / 'deepspeed' / f'zero{stage}.json'}"
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert train(experiment, f"run={undisturbed}", settings, ranks=2).returncode == 0
    for least_steps in (7, 13):
        processes = start(experiment, f"run={killed}", settings, ranks=2)
        log = killed / "log.jsonl"
        while processes[0].poll() is None:
            if log.exists() and len(log.read_text().splitlines()) >= least_steps:
                break
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert not (killed / "checkpoints" / "samples-000000000160").exists(), "it was killed too late to show anything"
    result = train(experiment, f"run={killed}", settings, ranks=2)
    assert result.returncode == 0 and "from samples-" in result.stdout, result.stderr
    assert_same_weights(undisturbed, killed)
    assert losses(undisturbed) == losses(killed)
    assert not list((killed / "checkpoints").glob(".writing*"))


@pytest.mark.slow
def test_bf16_follows_fp32_and_its_average_moves(experiment: Path, tmp_path: Path) -> None:
    """An average kept in bf16 would not move at this decay."""
    for precision in ("fp32", "bf16"):
        overrides = (f"run={tmp_path / precision}", f"train.precision={precision}", "train.ema_decay=0.999")
        assert train(experiment, *overrides).returncode == 0
    fp32, bf16 = (torch.tensor(losses(tmp_path / precision)) for precision in ("fp32", "bf16"))
    torch.testing.assert_close(bf16, fp32, atol=0.02, rtol=0)
    first, second = (load_file(tmp_path / precision / "weights.safetensors") for precision in ("fp32", "bf16"))
    assert {tensor.dtype for tensor in second.values()} == {torch.float32}
    modulations = [tensor for name, tensor in second.items() if name.endswith("modulation.1.weight")]  # zero at first
    assert modulations and all(tensor.std() > 0 for tensor in modulations)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=5e-3, rtol=0)


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_it(experiment: Path, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_gpus", "2", "--master_port", str(port), SCRIPT, "--config", experiment]
    command += ["--set", "train.num_steps=2", "--set", "train.warmup_steps=0"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "run")) == 2


def test_every_mistake_is_one_line_before_training(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    for overrides, *said in (
        (("train.learing_rate=1",), "small.yaml: train.learing_rate: unknown key", "learning_rate"),
        (("trian.num_steps=1",), "unknown key", "train"),
        (("train.num_steps=0",), "train.num_steps"),
        (("train.num_steps=x",), "train.num_steps"),
        (("train.learning_rate=.inf",), "train.learning_rate"),
        (("train.betas=[2, 3]",), "train.betas"),
        ((f"train.seed={10**30}",), "train.seed"),
        (("model.depth=99999999999",), "model.depth"),
        (("run=[",), "--set run=["),
        (("train.micro_batch=3",), "train.global_batch", "train.micro_batch"),
        (("train.warmup_steps=30",), "train.warmup_steps", "train.num_steps"),
        (("model.size=S",), "model", "size", "hidden_size"),
        (("model.num_heads=5",), "hidden_size", "num_heads"),
        (("model.patch_size=3",), "latent_size", "patch_size"),
        (("condition=none",), "class_dropout"),
        ((f"data.shards={small_set.raw}",), "raw shards", "lfm encode"),
        ((f"data.shards={tmp_path}",), "lfm encode"),
        (("deepspeed=nowhere.json",), "nowhere.json"),
        (("run=s3://bucket/run",), "s3://bucket/run"),
        (("nonsense",), "key=value"),
    ):
        result = plan(experiment, *overrides)
        assert_one_line(result, *said)
    assert not (tmp_path / "run").exists()


def test_a_launcher_without_an_address_or_a_broken_deepspeed_file_is_one_line(experiment: Path, tmp_path: Path) -> None:
    for content in (
        "3",
        "null",
        "[]",
        "{}",
        '{"zero_optimization": []}',
        '{"zero_optimization": {"stage": true}}',
        "{",
    ):
        (tmp_path / "ds.json").write_text(content)
        assert_one_line(plan(experiment, "deepspeed=ds.json"), "deepspeed" if content == "{" else "zero_optimization")


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[" * 3000, b"a: b: c", b"- a", b"x: 2020-13-45", b"\t- x", b"run: !x y"]
)
def test_a_yaml_that_is_none_is_one_line(experiment: Path, text: bytes) -> None:
    experiment.write_bytes(text)
    assert_one_line(plan(experiment), "small.yaml")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(experiment: Path, tmp_path: Path) -> None:
    result = train(experiment, "train.learning_rate=1e30", "train.gradient_clipping=0")
    assert result.returncode == 2 and "error: the loss is" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_a_number_with_two_owners_is_refused_naming_both_keys(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}')
    result = plan(experiment, "deepspeed=ds.json")
    assert_one_line(result, "gradient_clipping", "train.gradient_clipping")


@pytest.mark.slow
def test_a_changed_configuration_is_shown_and_refused(experiment: Path) -> None:
    assert train(experiment, "train.num_steps=5").returncode == 0
    other_stage = f"deepspeed={REPOSITORY / 'configs' / 'deepspeed' / 'zero3.json'}"
    assert_one_line(plan(experiment, "train.num_steps=5", other_stage), "a run keeps its ZeRO stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert_one_line(plan(experiment, "train.num_steps=5"), "was written by 1 ranks, now there are 2")
    refused = plan(experiment, "train.num_steps=5", "train.learning_rate=2e-3", "model.depth=3")
    assert_one_line(refused, "train.learning_rate (0.001, now 0.002)", "model.depth (2, now 3)", "--allow-changes")


def test_yaml_reads_1e4_as_a_number_and_refuses_a_key_given_twice(experiment: Path) -> None:
    text = experiment.read_text()
    experiment.write_text(text.replace("1.0e-3", "1e-4"))
    assert plan(experiment).exit_code == 0
    experiment.write_text(text + "condition: none\n")
    assert_one_line(plan(experiment), "small.yaml", "condition")


def test_the_schedule_follows_the_samples_seen_alone() -> None:
    train = TrainConfig(num_steps=100, global_batch=10, learning_rate=1.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate_at(step * 10, train) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)
    twice = TrainConfig(num_steps=50, global_batch=20, learning_rate=1.0, warmup_steps=5, schedule="cosine")
    assert learning_rate_at(500, train) == pytest.approx(learning_rate_at(500, twice))
