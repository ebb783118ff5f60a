"""Tests of `lfm evaluate`, with a fast feature network."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lfm.data.evaluation_images import open_images
from lfm.data.random_draws import image_noise
from lfm.errors import ConfigError
from lfm.inference import trained_model
from lfm.metrics import features
from lfm.metrics import reference as references
from lfm.metrics.inception import Inception
from lfm.weights_file import WEIGHTS, load_weights, save_weights
from lfm.world import World
from pipelines.evaluation import evaluate as stage
from pipelines.evaluation import metric_table
from pipelines.evaluation.evaluate import EvaluateConfig
from pipelines.evaluation.metric_table import Metric
from tests.support.commands import ALONE, SmallSet, Tasks, assert_one_line
from tests.support.feature_networks import PooledPixels, export_network, trust
from tests.support.feature_networks import trusting_lfm as lfm
from tests.support.images import random_images


class Distance(nn.Module):
    """Mean absolute difference of two images, in place of LPIPS."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.float() - second.float()).abs().mean((1, 2, 3))


def report(out: Path) -> dict[str, Any]:
    """Read the report of an evaluation."""
    return json.loads((out / "report.json").read_text())


def metrics(out: Path) -> dict[str, float]:
    """Read the metrics of the only candidate, without the time that its images took."""
    (row,) = report(out)["rows"]
    return {name: value for name, value in row["metrics"].items() if name != "seconds"}


# --- images ----------------------------------------------------------------------------------------------------


def test_images_equal_to_the_reference_have_perfect_scores(
    small_set: SmallSet, reference: Path, tmp_path: Path
) -> None:
    result = lfm("evaluate", small_set.raw, "--reference", reference, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    values = metrics(tmp_path)
    assert values["fd-small"] == pytest.approx(0, abs=1e-9)
    assert (values["precision"], values["recall"], values["coverage"]) == (1, 1, 1)
    assert "fd-small" in (tmp_path / "report.txt").read_text()
    with Image.open(tmp_path / "report.png") as image:
        assert image.height > 2 * 16


def test_the_report_records_what_determines_its_numbers(small_set: SmallSet, reference: Path, tmp_path: Path) -> None:
    folder = random_images(tmp_path / "images")
    lfm("evaluate", folder, "--reference", reference, "--out", tmp_path / "out")
    content = report(tmp_path / "out")
    header = references.load(str(reference)).header
    assert content["settings"]["references"] == [json.loads(header.model_dump_json())]
    assert content["settings"]["networks"][0]["content_hash"] == header.network_hash
    assert content["rows"][0]["data_digest"]
    assert {"lfm", "torch", "torchmetrics"} <= set(content["versions"])
    assert any("30 images against 40 real ones" in warning for warning in content["rows"][0]["warnings"])


def test_a_reference_of_another_size_or_rule_is_refused(
    small_set: SmallSet, reference: Path, network: Path, tmp_path: Path
) -> None:
    folder = random_images(tmp_path / "large", 4, 24)
    result = lfm("evaluate", folder, "--reference", reference, "--out", tmp_path / "out")
    assert_one_line(result, reference, "16 pixels", "24")
    other = tmp_path / "squash.safetensors"
    lfm("reference", folder, other, "--network", network, "--image-size", 16, "--crop", "squash")
    result = lfm("evaluate", small_set.raw, "--reference", other, "--out", tmp_path / "out")
    assert_one_line(result, other, "squash", "centre")
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be_met_are_refused_before_any_work(
    small_set: SmallSet, reference: Path, network: Path, tmp_path: Path
) -> None:
    for options, parts in (
        (["--metrics", "fid"], ["fid", "Inception"]),
        (["--metrics", "fidd"], ["fidd", "unknown"]),
        (["--metrics", "p-ids"], ["p-ids", "--pairs"]),
        (["--metrics", "nfe"], ["nfe", "a run"]),
        (["--num", 10], ["--num", "is for runs"]),
        (["--pairs", small_set.raw], ["--pairs", "name a folder"]),
        (["--network", "fd-lite"], ["--network fd-lite", "no reference"]),
        (["--lpips", network], ["--lpips", "--pairs"]),
        (["--reference", tmp_path / "none"], ["none", "no such file"]),
    ):
        result = lfm("evaluate", small_set.raw, "--reference", reference, "--out", tmp_path / "out", *options)
        assert_one_line(result, *parts)
    assert not (tmp_path / "out").exists()


def test_a_changed_network_is_refused(small_set: SmallSet, reference: Path, tmp_path: Path) -> None:
    other = export_network(nn.Sequential(PooledPixels(), nn.ReLU()), tmp_path / "small.pt2")
    result = lfm("evaluate", small_set.raw, "--reference", reference, "--out", tmp_path / "out", "--network", other)
    assert_one_line(result, reference, "--network")


def test_changed_images_are_measured_again(reference: Path, tmp_path: Path) -> None:
    folder, out = random_images(tmp_path / "images"), tmp_path / "out"
    lfm("evaluate", folder, "--reference", reference, "--out", out)
    before = metrics(out)
    Image.new("RGB", (16, 16)).save(folder / "000.png")
    assert_one_line(lfm("evaluate", folder, "--reference", reference, "--out", out), "--overwrite")
    assert metrics(out) == before
    lfm("evaluate", folder, "--reference", reference, "--out", out, "--overwrite")
    assert metrics(out) != before


@pytest.mark.slow
def test_published_statistics_and_weights_give_a_fid(
    small_set: SmallSet, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights stand in for the published ones."""
    weights, statistics = tmp_path / "weights.pth", tmp_path / "adm.safetensors"
    torch.save(Inception().state_dict(), weights)
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", **arrays)
    lfm("reference", tmp_path / "adm.npz", statistics, "--image-size", 16)
    folder = random_images(tmp_path / "images", 4)
    command = ("evaluate", folder, "--reference", statistics, "--reference", reference, "--out", tmp_path / "out")
    assert_one_line(lfm(*command), "set --network to inception:WEIGHTS.pth")
    command = (*command, "--network", f"inception:{weights}")
    assert_one_line(lfm(*command, "--metrics", "fid"), "fid", "published")
    monkeypatch.setattr("lfm.metrics.features.PUBLISHED", features.file_hash(str(weights)))
    assert lfm(*command).exit_code == 0
    values = metrics(tmp_path / "out")
    assert {"inception: fid", "inception: sfid", "inception: is", "small: fd-small", "small: kid"} <= set(values)
    assert values["inception: is"] >= 1
    assert any("4 images in 2,048 dimensions" in line for line in report(tmp_path / "out")["rows"][0]["warnings"])


# --- pairs -------------------------------------------------------------------------------------------------------


def test_pairs_are_matched_by_key(small_set: SmallSet, reference: Path, network: Path, tmp_path: Path) -> None:
    """The lexical order of the names is not their numeric order, and the suffixes differ."""
    real, fake = tmp_path / "real", tmp_path / "fake"
    for folder, suffix in ((real, "png"), (fake, "bmp")):
        folder.mkdir()
        for index in range(120):
            pixels = np.random.default_rng(index).integers(40, 200, (16, 16, 3), np.uint8)
            Image.fromarray(pixels + (5 if suffix == "bmp" else 0)).save(folder / f"{index}.{suffix}")
    distance = export_network(Distance(), tmp_path / "distance.pt2", inputs=2)
    command = ("evaluate", fake, "--reference", reference, "--pairs", real, "--lpips", distance)
    assert lfm(*command, "--out", tmp_path / "out").exit_code == 0
    values = metrics(tmp_path / "out")
    assert report(tmp_path / "out")["rows"][0]["count"] == 120
    assert values["psnr"] == pytest.approx(10 * np.log10(255**2 / 25), abs=1e-4)
    assert values["lpips"] == pytest.approx(5, abs=1e-4)
    assert values["ssim"] > 0.99
    assert 0 <= values["p-ids"] <= 1

    (fake / "7.bmp").rename(fake / "missing.bmp")
    assert_one_line(lfm(*command, "--out", tmp_path / "two"), "no image of the key 7")
    (fake / "missing.bmp").unlink()
    assert_one_line(lfm(*command, "--out", tmp_path / "two"), "119 images", "120")


class Brightness(nn.Module):
    """A segmenter that assigns label 0 to dark pixels and label 1 to bright ones."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.float().mean(1) / 255
        return torch.stack([1 - bright, bright], 1)


def test_segmentation_maps_are_compared_with_a_segmenters_prediction(reference: Path, tmp_path: Path) -> None:
    """Images that agree with their map except in one row."""
    (tmp_path / "source" / "images").mkdir(parents=True)
    (tmp_path / "source" / "annotations").mkdir()
    (tmp_path / "fake").mkdir()
    ids = np.zeros((16, 16), np.uint8)
    ids[:, 8:] = 1
    shown = ids.copy()
    shown[0] = 1 - shown[0]
    for index in range(6):
        Image.fromarray(np.full((16, 16, 3), 40 * index, np.uint8)).save(tmp_path / "source/images" / f"{index}.png")
        Image.fromarray(ids).save(tmp_path / "source/annotations" / f"{index}.png")
        Image.fromarray(np.repeat(shown[..., None] * 255, 3, 2)).save(tmp_path / "fake" / f"{index:012d}.png")
    raw, segmenter = tmp_path / "raw", export_network(Brightness(), tmp_path / "brightness.pt2")
    assert lfm("shard", tmp_path / "source", raw, "--layout", "paired", "--image-size", 16).exit_code == 0
    command = ("evaluate", tmp_path / "fake", "--reference", reference, "--segmenter", segmenter)
    assert_one_line(lfm(*command, "--out", tmp_path / "out"), "--segmenter", "--pairs with segmentation maps")
    assert lfm(*command, "--out", tmp_path / "out", "--pairs", raw, "--metrics", "miou,pixel-accuracy").exit_code == 0
    assert metrics(tmp_path / "out") == {"pixel-accuracy": 15 / 16, "miou": pytest.approx(120 / 136)}


def test_an_inpainting_model_is_evaluated_on_pairs(tasks: Tasks, reference: Path, tmp_path: Path) -> None:
    """Each image of the shards is inpainted once, under its own mask; the batch size has no influence."""
    options = ("--pairs", tasks.raw, "--num-steps", 1, "--autoencoder", tasks.autoencoder, "--reference", reference)
    for name, size in (("one", 32), ("two", 3)):
        command = ("evaluate", tasks.runs / "both", *options, "--out", tmp_path / name, "--batch-size", size)
        assert lfm(*command).exit_code == 0
    assert report(tmp_path / "one")["rows"][0]["count"] == 20
    values = metrics(tmp_path / "one")
    assert values == pytest.approx(metrics(tmp_path / "two"), rel=1e-3)
    assert {"p-ids", "u-ids", "ssim", "nfe"} <= set(values)
    assert values["psnr"] > 8, "known pixels are those of the image"
    refused = lfm("evaluate", tasks.runs / "class", *options, "--out", tmp_path / "three")
    assert_one_line(refused, "--pairs", "neither masks nor segmentation maps")
    assert_one_line(lfm(*command, "--num", 5), "--num", "--pairs")


# --- the table of metrics ---------------------------------------------------------------------------------------


def test_an_entry_of_the_table_is_all_that_a_metric_needs(
    small_set: SmallSet, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest_difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.float() - second.float()).abs().flatten(1).amax(1)

    entry = Metric(
        "largest-difference",
        "lower",
        {"pairs"},
        lambda comparison: float(comparison.files.column("largest-difference").max()),
        unit="levels",
        per_network=False,
        per_pair=largest_difference,
    )
    monkeypatch.setattr(metric_table, "TABLE", (*metric_table.TABLE, entry))
    real, fake = random_images(tmp_path / "real"), random_images(tmp_path / "fake")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(fake / "007.png")
    with Image.open(real / "007.png") as image:
        expected = float(np.asarray(image).max())
    result = lfm("evaluate", fake, "--reference", reference, "--pairs", real, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert metrics(tmp_path / "out")["largest-difference"] == expected
    assert report(tmp_path / "out")["metrics"]["largest-difference"] == {"unit": "levels", "better": "lower"}
    assert "largest-difference (levels)" in result.stdout
    alone = ("--pairs", real, "--out", tmp_path / "alone", "--metrics", "largest-difference")
    assert lfm("evaluate", fake, "--reference", reference, *alone).exit_code == 0
    assert metrics(tmp_path / "alone") == {"largest-difference": expected}


# --- runs --------------------------------------------------------------------------------------------------------


def config(run: Path, reference: Path, small_set: SmallSet, out: Path, **changes: Any) -> EvaluateConfig:
    settings = {"num": 21, "num_steps": 2, "autoencoder": str(small_set.autoencoder)} | changes
    return EvaluateConfig((str(run),), (str(reference),), str(out), **trust(reference), **settings)


def test_numbers_of_ranks_and_batches_have_no_influence(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm.data.evaluation_images.FILES_PER_BLOCK", 4)
    alone = stage.run(config(weights, reference, small_set, tmp_path / "one"), ALONE)
    for rank in range(3):
        result = stage.run(
            config(weights, reference, small_set, tmp_path / "three", batch_size=3), World(rank, rank, 3)
        )
        assert bool(result.table) == (rank == 2), "the rank that finds all files complete writes the report"
    assert alone.report["rows"][0]["count"] == 21
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "three")
    assert first == pytest.approx(second, rel=1e-6)
    assert first["nfe"] == 4


@pytest.mark.slow
def test_one_and_two_processes_measure_the_same(
    weights: Path, network: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    for count in (1, 2):
        out = tmp_path / str(count)
        command = ("reference", small_set.raw, out / "r.safetensors", "--network", network, "--num-gpus", count)
        assert lfm(*command).exit_code == 0
        options = ("--autoencoder", small_set.autoencoder, "--num", 1100, "--solver", "euler", "--num-steps", 1)
        files = ("--reference", out / "r.safetensors", "--out", out / "report")
        result = lfm("evaluate", weights, *files, "--num-gpus", count, *options)
        assert result.exit_code == 0 and "1,100" in result.stdout, result.output
    assert len(list((tmp_path / "2" / "report").glob("blocks-*/*"))) == 2, "one of each process"
    first, second = metrics(tmp_path / "1" / "report"), metrics(tmp_path / "2" / "report")
    assert first == pytest.approx(second, rel=1e-6)


def test_a_run_of_another_crop_rule_is_refused(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    loaded, header = load_weights(str(weights))
    save_weights(str(weights / WEIGHTS), loaded, dataclasses.replace(header, crop="pad"))
    with pytest.raises(ConfigError, match=r"by the rule centre.*by pad"):
        stage.run(config(weights, reference, small_set, tmp_path / "out"), ALONE)


def test_an_interrupted_evaluation_resumes(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm.data.evaluation_images.FILES_PER_BLOCK", 8)
    whole = config(weights, reference, small_set, tmp_path / "whole")
    stage.run(whole, ALONE)
    killed = config(weights, reference, small_set, tmp_path / "killed")
    blocks = tmp_path / "killed" / next((tmp_path / "whole").glob("blocks-*")).name
    blocks.mkdir(parents=True)
    shutil.copy(next((tmp_path / "whole").glob("blocks-*")) / "000001.safetensors", blocks)
    generated: list[int] = []
    monkeypatch.setattr(
        "lfm.inference.trained_model.image_noise",
        lambda seeds, *rest: generated.extend(seeds) or image_noise(seeds, *rest),
    )
    stage.run(killed, ALONE)
    assert generated == [*range(8), *range(16, 21)]
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    generated.clear()
    stage.run(killed, ALONE)
    assert generated == []


def test_several_guidance_scales_give_a_curve(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    command = ("evaluate", weights, "--reference", reference, "--out", tmp_path, "--num", 5, "--num-steps", 1)
    options = (
        "--autoencoder",
        small_set.autoencoder,
        "--solver",
        "euler",
        "--guidance-scale",
        1,
        "--guidance-scale",
        2,
    )
    result = lfm(*command, *options)
    assert result.exit_code == 0, result.stderr
    rows = report(tmp_path)["rows"]
    assert [(row["guidance_scale"], row["metrics"]["nfe"]) for row in rows] == [(1, 1), (2, 2)]
    settings = {"samples_seen", "weights_hash", "autoencoder", "solving", "first_seed", "trained_by"}
    assert settings <= set(rows[0])
    assert rows[0]["autoencoder"]["content_hash"]
    assert "guidance 2" in result.output
    with Image.open(tmp_path / "report.png") as image:
        assert image.width >= 2 * 640, "plots of the metrics in two columns"


def test_a_curve_of_autoguidance(weights: Path, reference: Path, tmp_path: Path) -> None:
    """Guided by itself, a model makes the images of scale 1; by another one, others; the report names both."""
    strong, weak = (randomized_run(weights, tmp_path / name, seed) for seed, name in enumerate(("strong", "weak")))
    command = ("evaluate", strong, "--reference", reference, "--num", 5, "--num-steps", 2)
    scales = ("--guidance-scale", 1, "--guidance-scale", 3)
    distances = {}
    for name in (strong, weak):
        out = tmp_path / f"{name.name}-report"
        assert lfm(*command, *scales, "--autoguidance", name, "--out", out).exit_code == 0
        rows = report(out)["rows"]
        assert [row["autoguidance"]["run"] for row in rows] == [str(name)] * 2
        assert [row["metrics"]["nfe"] for row in rows] == [4, 8]
        distances[name.name] = [row["metrics"]["kid"] for row in rows]
    assert distances["strong"][1] == pytest.approx(distances["strong"][0], rel=1e-4)
    assert distances["weak"][0] == distances["strong"][0] and distances["weak"][1] != distances["strong"][1]
    images = lfm("evaluate", tmp_path, "--reference", reference, "--autoguidance", weak, "--out", tmp_path / "other")
    assert images.exit_code == 2 and "--autoguidance" in images.stderr


def randomized_run(weights: Path, folder: Path, seed: int = 0, precision: str = "fp32") -> Path:
    """Write a run whose weights have no zeros, and which is recorded as trained in `precision`."""
    tensors, header = load_weights(str(weights))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    folder.mkdir()
    header = dataclasses.replace(header, config={"train": {"precision": precision}})
    save_weights(str(folder / WEIGHTS), tensors, header)
    return folder


def test_a_curve_holds_one_model_at_a_time(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three checkpoints at two scales: no more than one network and one autoencoder are alive after each loading."""
    runs = [randomized_run(weights, tmp_path / f"run-{seed}", seed) for seed in range(3)]
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    counts = []
    load = trained_model.load

    def counted_load(*arguments: Any, **options: Any) -> trained_model.TrainedModel:
        gc.collect()
        counts.append(len(alive))
        model = load(*arguments, **options)
        alive.update((model.network, model.autoencoder.model))
        return model

    monkeypatch.setattr("lfm.inference.trained_model.load", counted_load)
    settings = {"num": 3, "num_steps": 1, "guidance_scale": (1.0, 2.0), "autoencoder": str(small_set.autoencoder)}
    result = stage.run(
        EvaluateConfig(tuple(map(str, runs)), (str(reference),), str(tmp_path / "out"), **trust(reference), **settings),
        ALONE,
    )
    assert [row["guidance_scale"] for row in result.report["rows"]] == [1, 2] * 3
    assert counts == [0] * 6, "each run is loaded once for its checks and once to generate images"


def test_on_a_gpu_every_batch_of_images_is_filled_up(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = randomized_run(weights, tmp_path / "random-run")
    sizes: set[int] = set()
    load = trained_model.load

    def load_counting(*arguments: Any, **options: Any) -> trained_model.TrainedModel:
        model = load(*arguments, **options)
        model.network.register_forward_pre_hook(lambda module, inputs: sizes.add(len(inputs[0])))
        return model

    monkeypatch.setattr("lfm.inference.trained_model.load", load_counting)
    settings = {"num": 5, "num_steps": 1, "batch_size": 3, "autoencoder": str(small_set.autoencoder)}
    for name, fills, expected in (("plain", False, {2, 3}), ("filled", True, {3})):
        monkeypatch.setattr(trained_model.TrainedModel, "fills_batches", fills)
        sizes.clear()
        stage.run(
            EvaluateConfig((str(run),), (str(reference),), str(tmp_path / name), **trust(reference), **settings), ALONE
        )
        assert sizes == expected
    assert metrics(tmp_path / "plain") == pytest.approx(metrics(tmp_path / "filled"), rel=0.01)


def test_the_precision_is_that_of_training_or_the_option(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    run = randomized_run(weights, tmp_path / "bf16-run", precision="bf16")
    options = ("--autoencoder", small_set.autoencoder, "--num", 5, "--num-steps", 2, "--reference", reference)
    for name, precision in (("default", ()), ("bf16", ("--precision", "bf16")), ("fp32", ("--precision", "fp32"))):
        result = lfm("evaluate", run, *options, *precision, "--out", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        assert report(tmp_path / name)["rows"][0]["precision"] == ("fp32" if name == "fp32" else "bf16")
    assert metrics(tmp_path / "default") == metrics(tmp_path / "bf16")
    assert metrics(tmp_path / "default") != metrics(tmp_path / "fp32")
    other = lfm("evaluate", run, *options, "--precision", "fp32", "--out", tmp_path / "bf16")
    assert_one_line(other, "report of other images, settings or metrics", "--overwrite")
    images = lfm("evaluate", small_set.raw, "--reference", reference, "--out", tmp_path / "x", "--precision", "bf16")
    assert_one_line(images, "--precision", "is for runs")
    bound = lfm("evaluate", run, "--bound", small_set.raw, "--out", tmp_path / "x", "--precision", "bf16")
    assert_one_line(bound, "--precision", "--bound")


def test_a_report_without_a_precision_is_of_fp32(
    weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    """Reports from before the precision was recorded; the same command resumes."""
    stage.run(config(weights, reference, small_set, tmp_path), ALONE)
    content = report(tmp_path)
    del content["settings"]["targets"][0]["precision"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="report of other images, settings or metrics"):
        stage.run(config(weights, reference, small_set, tmp_path, precision="bf16"), ALONE)
    stage.run(config(weights, reference, small_set, tmp_path), ALONE)
    assert report(tmp_path)["settings"]["targets"][0]["precision"] == "fp32"


def test_a_dry_run_does_nothing(weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--autoencoder", small_set.autoencoder, "--num", 1000)
    result = lfm("evaluate", weights, "--reference", reference, "--out", out, "--dry-run", *options)
    assert "1,000 images of 16 x 16 pixels" in result.output
    assert not out.exists()


def test_runs_and_images_are_not_mixed(weights: Path, reference: Path, small_set: SmallSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one kind at a time"):
        stage.run(
            EvaluateConfig(
                (str(weights), str(small_set.raw)), (str(reference),), str(tmp_path / "o"), **trust(reference)
            ),
            ALONE,
        )


def test_no_images_are_opened_because_a_reference_names_them(
    small_set: SmallSet, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest real images are shown from the folder that the user names, if it holds those of the reference."""
    opened: list[str] = []

    def recorded(path: str, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        return open_images(path, *args, **kwargs)

    monkeypatch.setattr(stage, "open_images", recorded)
    folder = random_images(tmp_path / "images")
    command = ("evaluate", folder, "--reference", reference, "--out", tmp_path / "out")
    assert lfm(*command).exit_code == 0
    assert opened == [str(folder)]
    with Image.open(tmp_path / "out" / "report.png") as image:
        height = image.height
    assert lfm(*command, "--neighbours", small_set.raw).exit_code == 0
    with Image.open(tmp_path / "out" / "report.png") as image:
        assert image.height > height
    assert_one_line(lfm(*command, "--neighbours", folder), "--neighbours", "other images")


@pytest.mark.parametrize("content", ['{"pictures": [{"file": "../a.png"}]}', '{"pictures": 3}', "[]"])
def test_a_record_of_samples_names_images_of_its_folder(reference: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.json").write_text(content)
    command = ("evaluate", tmp_path, "--reference", reference, "--out", tmp_path / "out")
    assert_one_line(lfm(*command), tmp_path / "samples.json")
