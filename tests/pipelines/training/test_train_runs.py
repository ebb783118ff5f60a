"""Tests of training by its command: parity over ranks and ZeRO stages, resuming, measurements and stopping."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lfm.models.registry import BACKBONES
from lfm.weights_file import load_weights
from tests.support.commands import REPOSITORY, SmallSet, assert_one_line, finish, free_port, lfm
from tests.support.feature_networks import PooledPixels, export_network, make_small_reference
from tests.support.models import SMALL_OPTIONS
from tests.support.training_runs import SCRIPT, assert_same_weights, losses, plan, start, train, zero


def network(backbone: str) -> str:
    """Return the override that chooses a small network of a backbone."""
    return f"model={json.dumps(SMALL_OPTIONS[backbone])}"


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_loss_curve_is_the_same_on_one_and_two_ranks_under_every_zero_stage(
    experiment: Path, tmp_path: Path, backbone: str
) -> None:
    curves = {}
    for stage, ranks in ((1, 1), (1, 2), (2, 2), (3, 2)):
        run = tmp_path / f"zero{stage}-{ranks}"
        settings = REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json"
        result = train(
            experiment, f"run={run}", f"deepspeed={settings}", network(backbone), "train.micro_batch=2", ranks=ranks
        )
        assert result.returncode == 0, result.stderr
        curves[stage, ranks] = torch.tensor(losses(run))
    reference = curves[1, 1]
    assert len(reference) == 20
    for curve in curves.values():
        torch.testing.assert_close(curve, reference, atol=1e-4, rtol=0)


def wait_for_lines(run: Path, least: int, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until the log has so many lines, or the run has ended."""
    log = run / "log.jsonl"
    while processes[0].poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= least):
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "kills", "num_steps"), [("dit", 2, 60), ("unet", 1, 24)])
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_one_that_was_not(
    experiment: Path, tmp_path: Path, backbone: str, kills: int, num_steps: int
) -> None:
    """Saving takes most of the time of these runs, so that kills fall into it."""
    settings = (
        zero(3),
        network(backbone),
        f"train.num_steps={num_steps}",
        "train.checkpoint_every=2",
        "train.ema_sigma_rel=[0.1]",
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert train(experiment, f"run={undisturbed}", *settings, ranks=2).returncode == 0
    moments = random.Random(kills)
    for number in range(kills):
        processes = start(experiment, f"run={killed}", *settings, ranks=2)
        wait_for_lines(killed, 12 * (number + 1), processes)
        time.sleep(moments.uniform(0, 0.1))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert not (killed / "checkpoints" / f"samples-{8 * num_steps:012d}").exists(), (
        "it was killed too late to show anything"
    )
    result = train(experiment, f"run={killed}", *settings, ranks=2)
    assert result.returncode == 0 and "from samples-" in result.stdout, result.stderr
    assert_same_weights(undisturbed, killed)
    assert losses(undisturbed) == losses(killed)
    snapshots = [sorted((run / "snapshots").iterdir()) for run in (undisturbed, killed)]
    assert [path.name for path in snapshots[0]] == [path.name for path in snapshots[1]]
    for one, other in zip(*snapshots, strict=True):
        first, second = load_file(one), load_file(other)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(killed.rglob(".writing*"))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_run_resumes_with_other_ranks_at_other_stages(experiment: Path, tmp_path: Path, backbone: str) -> None:
    steady = ("train.schedule=constant", network(backbone))
    undisturbed, moved = tmp_path / "undisturbed", tmp_path / "moved"
    assert train(experiment, f"run={undisturbed}", *steady).returncode == 0
    for num_steps, stage, ranks in ((6, 1, 2), (10, 3, 1), (15, 2, 2), (20, 3, 2)):
        result = train(experiment, f"run={moved}", *steady, zero(stage), f"train.num_steps={num_steps}", ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert losses(moved) == pytest.approx(losses(undisturbed), abs=1e-5)
    for name, tensor in load_file(undisturbed / "weights.safetensors").items():
        torch.testing.assert_close(load_file(moved / "weights.safetensors")[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_network_with_dropout_resumes_bit_for_bit(experiment: Path, tmp_path: Path) -> None:
    network = "{backbone: unet, model_channels: 32, channel_multipliers: [1, 2], attention_resolutions: [4], "
    model = network + "head_channels: 32, num_blocks: 1, dropout: %s}"
    steady = ("train.schedule=constant", "train.global_batch=8", "train.micro_batch=2")
    resumed, runs = tmp_path / "resumed", {dropout: tmp_path / dropout for dropout in ("0.5", "0.0")}
    for dropout, run in runs.items():
        assert (
            train(experiment, f"run={run}", f"model={model % dropout}", *steady, "train.num_steps=10").returncode == 0
        )
    for num_steps in (5, 10):
        settings = (f"run={resumed}", f"model={model % '0.5'}", *steady, f"train.num_steps={num_steps}")
        assert train(experiment, *settings).returncode == 0
    assert_same_weights(runs["0.5"], resumed)
    assert losses(runs["0.5"]) == losses(resumed) != losses(runs["0.0"])


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_and_resumes(experiment: Path, tmp_path: Path) -> None:
    """One rank receives SIGTERM; all stop at the same step, with a checkpoint of it."""
    settings = ("train.num_steps=200", "train.checkpoint_every=100")
    undisturbed, left = tmp_path / "undisturbed", tmp_path / "left"
    assert train(experiment, f"run={undisturbed}", *settings, ranks=2).returncode == 0
    processes = start(experiment, f"run={left}", *settings, ranks=2)
    wait_for_lines(left, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    result = finish(processes)
    assert result.returncode == 130 and result.stderr.count("interrupted; run the same command to resume") == 2
    assert "Traceback" not in result.stderr
    seen = len(losses(left)) * 8
    assert seen < 800 and (left / "checkpoints" / f"samples-{seen:012d}").exists()
    assert train(experiment, f"run={left}", *settings, ranks=2).returncode == 0
    assert_same_weights(undisturbed, left)


@pytest.mark.slow
def test_a_run_can_start_from_the_weights_of_another(experiment: Path, tmp_path: Path) -> None:
    assert train(experiment).returncode == 0
    still = (f"run={tmp_path / 'other'}", "train.num_steps=1", "train.warmup_steps=0", "train.learning_rate=1e-12")
    result = train(experiment, *still, zero(3), ranks=2, options=("--initialize-from", tmp_path / "run"))
    assert result.returncode == 0 and f"from {tmp_path / 'run'}" in result.stdout, result.stderr
    first, second = (load_file(tmp_path / run / "weights.safetensors") for run in ("run", "other"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-9, rtol=0)
    other = ("--set", f"run={tmp_path / 'third'}", "--set", "model.depth=3", "--initialize-from", tmp_path / "run")
    assert_one_line(plan(experiment, options=other), "--initialize-from", "its depth is 2, and 3 here")


@pytest.mark.slow
def test_measurements_change_no_weights(experiment: Path, tmp_path: Path) -> None:
    """Stage 3 on 2 ranks: previews, validation loss, monitors, plot and snapshots; then `lfm ema` on these."""
    monitors = json.dumps({"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "run"})
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": 3}}, "csv_monitor": {monitors}}}')
    settings = ("data.held_back=1", "train.num_steps=20", "train.global_batch=8", "train.ema_sigma_rel=[0.05, 0.1]")
    measured, unmeasured = tmp_path / "measured", tmp_path / "unmeasured"
    result = train(
        experiment,
        f"run={measured}",
        *settings,
        "deepspeed=ds.json",
        "train.validate_every=5",
        "train.log_every=5",
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    assert (
        train(experiment, f"run={unmeasured}", *settings, zero(3), "train.validate_every=1000", ranks=2).returncode == 0
    )
    assert_same_weights(measured, unmeasured)
    lines = [json.loads(line) for line in (measured / "log.jsonl").read_text().splitlines()]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(validation) == 4 and validation == sorted(validation, reverse=True), "the EMA learns"
    assert all(0 < line["model_flop_utilisation"] < 1 and 0 <= line["data_wait"] < 1 for line in lines)
    assert all(line["peak_memory_bytes"] > 1e7 and line["skipped_steps"] == 0 for line in lines)
    grids = sorted((measured / "previews").iterdir())
    assert [grid.stem for grid in grids] == [f"samples-{40 * number:012d}" for number in range(1, 5)]
    assert grids[0].read_bytes() != grids[-1].read_bytes()
    for path, size in ((grids[0], (8 * (8 * 18 - 2), 8 * (4 * 18 - 2))), (measured / "loss.png", (640, 360))):
        with Image.open(path) as image:
            assert image.size == size
    for name in ("train_loss", "loss_velocity", "validation_loss"):
        assert len(list((tmp_path / "csv").rglob(f"*{name}.csv"))) == 1, name
    assert all(line["loss_velocity"] == line["loss"] for line in lines), "the only term, of weight 1"

    result_of_ema = lfm("ema", measured, "--sigma-rel", "0.08")
    assert result_of_ema.exit_code == 0 and "fitted to" in result_of_ema.stdout
    assert lfm("ema", measured, "--sigma-rel", "0.1", "--out", tmp_path / "same.safetensors").exit_code == 0
    stored = load_file(measured / "snapshots" / "samples-000000000160-0.1.safetensors")
    for name, tensor in load_file(tmp_path / "same.safetensors").items():
        torch.testing.assert_close(tensor, stored[name].float(), atol=2e-3, rtol=0)
    assert (
        lfm("sample", measured / "ema-0.08.safetensors", "--out", tmp_path / "samples", "--seeds", "0-1").exit_code == 0
    )
    assert_one_line(lfm("ema", measured, "--sigma-rel", "0.01"), "error of", "--sigma-rel")
    assert_one_line(lfm("ema", measured, "--sigma-rel", "0.1", "--out", tmp_path / "e.txt"), "e.txt", ".safetensors")
    assert_one_line(lfm("ema", tmp_path, "--sigma-rel", "0.1"), "no snapshots", "train.ema_sigma_rel")


@pytest.mark.slow
def test_the_best_weights_are_the_same_on_any_ranks(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    """One rank, two ranks at stage 3, and one rank that resumes in the middle, with a record of later weights."""
    network = export_network(PooledPixels(), tmp_path / "small.pt2")
    reference = make_small_reference(small_set, network, tmp_path)
    trusted = f"reference: {reference}, network: {network}, trust_code: true"
    evaluation = f"evaluation={{{trusted}, every: 5, num: 20, guidance_scale: 2, task_score: scenes}}"
    runs = [tmp_path / name for name in ("alone", "two", "plain", "resumed")]
    shared = ("train.checkpoint_every=10", "train.learning_rate=2.0e-2")
    assert train(experiment, f"run={runs[0]}", evaluation, *shared).returncode == 0
    assert train(experiment, f"run={runs[1]}", evaluation, *shared, zero(3), ranks=2).returncode == 0
    score_alone = "evaluation={every: 10, num: 20, num_steps: 3, task_score: scenes}"
    assert train(experiment, f"run={runs[2]}", score_alone, *shared).returncode == 0
    shutil.copytree(runs[0], runs[3])
    shutil.rmtree(runs[3] / "checkpoints" / "samples-000000000160")
    assert train(experiment, f"run={runs[3]}", evaluation, *shared).returncode == 0

    distances_of_runs = []
    for run in (runs[0], runs[1], runs[3]):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        distances_of_runs.append([(line["fd-small"], line["samples_seen"]) for line in lines if "fd-small" in line])
        assert all(0 <= line["recognised"] <= 1 for line in lines if "fd-small" in line)
        best = json.loads((run / "best.json").read_text())
        assert [seen for _, seen in distances_of_runs[-1]] == [40, 80, 120, 160]
        assert (best["fd-small"], best["samples_seen"]) == min(distances_of_runs[-1]) and best["reference"] == str(
            reference
        )
        _, header = load_weights(str(run / "best.safetensors"))
        assert header.samples_seen == best["samples_seen"]
        with Image.open(run / "fd-small.png") as image:
            assert image.size == (640, 360)
    distances = torch.tensor([[distance for distance, _ in run] for run in distances_of_runs], dtype=torch.float64)
    assert distances[0].unique().numel() == 4 and distances.min() > 0
    torch.testing.assert_close(distances[1], distances[0], rtol=1e-2, atol=0)  # a grey level, here and there
    assert distances[2].tolist() == distances[0].tolist()
    lines = [json.loads(line) for line in (runs[2] / "log.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines if "recognised" in line] == [80, 160]
    assert not (runs[2] / "best.json").exists() and not (runs[2] / "best.safetensors").exists()
    assert_same_weights(runs[0], runs[2])
    assert_same_weights(runs[0], runs[3])


@pytest.mark.slow
def test_images_are_measured_with_the_guidance_of_another_run(
    experiment: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    """On one rank and on two at stage 3; without a null condition of its own, since the other run has one."""
    network = export_network(PooledPixels(), tmp_path / "small.pt2")
    reference = make_small_reference(small_set, network, tmp_path)
    measured = f"reference: {reference}, network: {network}, trust_code: true, every: 10, num: 20, num_steps: 3"
    weak, settings = tmp_path / "weak", ("train.learning_rate=2.0e-2", "condition_dropout=0")
    assert train(experiment, f"run={weak}", "train.num_steps=8").returncode == 0
    curves = []
    for name, guidance, ranks in (
        ("plain", "", 1),
        ("one", ", autoguidance: {weak}", 1),
        ("two", ", autoguidance: {weak}", 2),
    ):
        scale = "guidance_scale: 3" if guidance else "guidance_scale: 1"
        evaluation = f"evaluation={{{measured}, {scale}{guidance.format(weak=weak)}}}"
        result = train(experiment, f"run={tmp_path / name}", evaluation, *settings, zero(3), ranks=ranks)
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        curves.append(torch.tensor([line["fd-small"] for line in lines if "fd-small" in line], dtype=torch.float64))
    plain, one, two = curves
    torch.testing.assert_close(two, one, rtol=1e-2, atol=0)
    assert len(one) == 2 and ((one - plain).abs() / plain > 0.02).all()


@pytest.mark.slow
def test_runs_with_coupled_noise_and_small_micro_batches_are_measured(
    experiment: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    reference = make_small_reference(
        small_set, (network := export_network(PooledPixels(), tmp_path / "small.pt2")), tmp_path
    )
    settings = ("condition=none", "condition_dropout=0", "flow.coupling_group=4", "train.micro_batch=2")
    measured = (
        f"evaluation={{reference: {reference}, network: {network}, trust_code: true, every: 5, num: 7}}",
        "train.validate_every=5",
        "data.held_back=1",
    )
    assert train(experiment, *settings, *measured, "train.num_steps=5").returncode == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["fd-small"] > 0 and last["validation_loss"] > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_blocks_learn_alike(experiment: Path, tmp_path: Path) -> None:
    runs = {flag: tmp_path / flag for flag in ("true", "false")}
    for flag, run in runs.items():
        settings = (f"run={run}", f"model.compile={flag}", "train.num_steps=6", "model.depth=1")
        result = train(experiment, *settings, "train.validate_every=3")
        assert result.returncode == 0
        assert ("with compiling" in result.stderr) == (flag == "true")
    first, second = (torch.tensor(losses(run)) for run in runs.values())
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert first.unique().numel() == 6


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
def test_the_deepspeed_launcher_starts_training(experiment: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = launch(experiment, port)
        assert result.returncode and result.stderr.count(f"error: 127.0.0.1:{port}: the port is taken") == 1
        assert "Error:" not in result.stderr, result.stderr
    result = launch(experiment, free_port(), "train.num_steps=2", "train.warmup_steps=0")
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "run")) == 2


def launch(config: Path, port: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_gpus", "2", "--master_port", str(port), SCRIPT, "--config", config]
    command += [part for override in overrides for part in ("--set", override)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_saves_nothing(experiment: Path, tmp_path: Path) -> None:
    """Going back and repeating the same data, noise and weights would diverge in the same way."""
    ruinous = ("train.learning_rate=1e30", "train.gradient_clipping=0", "train.schedule=constant")
    result = train(experiment, *ruinous)
    assert result.returncode == 2 and "diverged at step" in result.stderr, result.stderr
    assert "start again, since there is no checkpoint yet" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run" / "weights.safetensors").exists()
    assert train(experiment, "train.num_steps=5").returncode == 0
    result = train(experiment, *ruinous, options=("--allow-changes",))
    assert result.returncode == 2 and "resume from samples-000000000040" in result.stderr, result.stderr
    assert result.stderr.count("error: ") == 1
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["samples-000000000040"]
