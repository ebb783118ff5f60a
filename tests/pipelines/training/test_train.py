"""Tests of the checks before training, and of the learning rate."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lfm.data import manifest as manifests
from pipelines.common.experiment.config_schema import TrainConfig
from pipelines.training.training_loop import learning_rate_at
from tests.support.commands import SmallSet, assert_one_line
from tests.support.training_runs import plan, train, zero


def test_every_mistake_is_one_line_before_training(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    for overrides, *words in (
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
        (("condition=none",), "condition_dropout"),
        ((f"data.shards={small_set.raw}",), "raw shards", "lfm encode"),
        ((f"data.shards={tmp_path}",), "lfm encode"),
        (("deepspeed=nowhere.json",), "nowhere.json"),
        (("run=s3://bucket/run",), "s3://bucket/run"),
        (("nonsense",), "key=value"),
        (("data.held_back=1",), "data.held_back", "train.validate_every"),
        (("data.held_back=3", "train.validate_every=5"), "data.held_back 3", "3 shards"),
        (("train.ema_sigma_rel=[0.1, 0.1]",), "train.ema_sigma_rel"),
        (("train.ema_sigma_rel=[0.5]",), "train.ema_sigma_rel"),
        (("run=''",), "run"),
        ((f"run={experiment}",), str(experiment), "is a file"),
        (("train.global_batch=1000000000000",), "train.global_batch"),
        ((f"data.window={10**21}",), "data.window"),
        (("data.skip_shards=[nope.tar]",), "nope.tar"),
        (("data.skip_shards=[000000.tar, 000001.tar, 000002.tar]",), "data.skip_shards leaves nothing"),
        (("evaluation={reference: nowhere.safetensors, every: 5}",), "nowhere.safetensors"),
        (("evaluation={reference: a, every: 5, guidence_scale: 2}",), "evaluation.guidence_scale", "'guidance_scale'"),
        (("evaluation.every=5",), "evaluation: measures nothing", "reference", "task_score"),
    ):
        result = plan(experiment, *overrides)
        assert_one_line(result, *words)
    assert not (tmp_path / "run").exists()


def test_a_launcher_without_an_address_or_a_broken_deepspeed_file_is_one_line(experiment: Path, tmp_path: Path) -> None:
    for content in (
        "3",
        "null",
        "[]",
        "{}",
        '{"zero_optimization": []}',
        '{"zero_optimization": {"stage": true}}',
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
        "{",
    ):
        (tmp_path / "ds.json").write_text(content)
        assert_one_line(plan(experiment, "deepspeed=ds.json"), "deepspeed" if content == "{" else "zero_optimization")


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[" * 3000, b"a: b: c", b"- a", b"x: 2020-13-45", b"\t- x", b"run: !x y"]
)
def test_text_that_is_no_yaml_mapping_is_one_line(experiment: Path, text: bytes) -> None:
    experiment.write_bytes(text)
    assert_one_line(plan(experiment), "small.yaml")


def test_a_number_with_two_owners_is_refused_naming_both_keys(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}')
    result = plan(experiment, "deepspeed=ds.json")
    assert_one_line(result, "gradient_clipping", "train.gradient_clipping")


@pytest.mark.slow
def test_a_changed_configuration_is_shown_and_refused(experiment: Path) -> None:
    assert train(experiment, "train.num_steps=5").returncode == 0
    assert plan(experiment, "train.num_steps=5", zero(3)).exit_code == 0
    refused = plan(experiment, "train.num_steps=5", "train.learning_rate=2e-3", "model.depth=3")
    assert_one_line(refused, "train.learning_rate (0.001, now 0.002)", "model.depth (2, now 3)", "--allow-changes")
    assert (
        plan(experiment, "train.num_steps=5", "train.learning_rate=2e-3", options=("--allow-changes",)).exit_code == 0
    )


@pytest.mark.slow
def test_changes_that_cannot_be_allowed_are_refused(experiment: Path, tmp_path: Path) -> None:
    """Half a batch, a step in the past, another network; and weights of the same shapes for another function."""
    assert train(experiment, "train.num_steps=5", "train.schedule=constant").returncode == 0
    allowed = ("--allow-changes",)
    for change, *words in (
        (("train.global_batch=12",), "train.global_batch 12", "40 samples", "--initialize-from"),
        (("train.num_steps=4", "train.warmup_steps=0"), "train.num_steps 4", "at step 5", "raise it"),
        (("model.num_heads=4",), "samples-000000000040", "its num_heads is 2, and 4 here"),
    ):
        assert_one_line(
            plan(experiment, "train.schedule=constant", "train.num_steps=5", *change, options=allowed), *words
        )
    changed = ("train.schedule=constant", "train.num_steps=10", "condition_dropout=0.2")
    assert plan(experiment, *changed, options=allowed).exit_code == 0
    other = (f"run={tmp_path / 'other'}", "model.time_scale=1")
    refused = plan(experiment, *other, options=("--initialize-from", str(tmp_path / "run")))
    assert_one_line(refused, "--initialize-from", "its time_scale is 1000.0, and 1.0 here")


@pytest.mark.slow
def test_a_run_whose_every_step_is_skipped_is_one_line(experiment: Path, tmp_path: Path) -> None:
    result = train(experiment, "train.num_steps=2", "train.warmup_steps=0", "model.time_scale=1e308")
    assert (
        result.returncode == 2
        and "diverged at step 2: the gradient norms of the last 2 steps" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_disk_without_room_for_the_next_checkpoint_is_one_line(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert_one_line(plan(experiment), "/run: 0.0 GB are free", "needed", "train.keep_checkpoints")


def test_a_condition_that_is_not_in_the_latents_is_one_line(
    experiment: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    bare = shutil.copytree(small_set.latents, tmp_path / "bare")
    manifest = manifests.load(str(bare), "latents")
    manifests.publish(str(bare), manifest.model_copy(update={"classes": ()}))
    for condition, repair in (("class", "class folders"), ("inpaint", "--masks"), ("class+semantic", "segmentations")):
        shards = bare if condition == "class" else small_set.latents
        refused = plan(experiment, f"condition={condition}", f"data.shards={shards}")
        assert_one_line(refused, f"condition: {condition}", repair)
    assert not (tmp_path / "run").exists()


def test_yaml_reads_1e4_as_a_number_and_refuses_a_repeated_key(experiment: Path) -> None:
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
