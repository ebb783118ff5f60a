"""Tests of the start from a source by the training command: names of classes, the plan, imported models and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm as library
from lfm import weights_file
from lfm.conversion.to_diffusers import STRIDE
from lfm.data import manifest as manifests
from lfm.models.dit import DiT
from lfm.models.dit_config import DiTConfig
from lfm.models.noise_prediction import NUM_DIFFUSION_STEPS, NoisePrediction
from lfm.types import Condition
from lfm.weights_file import WeightsHeader, load_weights, save_weights
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.published import published_state
from tests.support.sources import save_source
from tests.support.training_runs import assert_same_weights, plan, train, zero


def own_names(small_set: SmallSet) -> list[str]:
    return [entry.name for entry in manifests.load(str(small_set.latents), "latents").classes]


def first_table(experiment: Path, source: Path, *options: object) -> torch.Tensor:
    """Train one step at a rate of almost 0, and return the class table."""
    still = ("train.num_steps=1", "train.warmup_steps=0", "train.learning_rate=1e-12")
    result = train(experiment, *still, options=("--initialize-from", source, *options))
    assert result.returncode == 0, result.stderr
    table: torch.Tensor = load_file(experiment.parent / "run" / "weights.safetensors")["class_embedding.table.weight"]
    return table


@pytest.mark.slow
def test_classes_are_taken_by_name_or_by_the_class_map(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    own = own_names(small_set)
    source = save_source(small_set, tmp_path / "source", ("other", own[1], "third"))
    table = load_weights(str(source))[0]["class_embedding.table.weight"]
    (tmp_path / "map.csv").write_text(f"{own[0]},third\n{own[2]},0,third\n")
    ours = first_table(experiment, source, "--class-map", tmp_path / "map.csv")
    expected = [table[2], table[1], (table[0] + table[2]) / 2, *[table[:3].mean(0)] * (len(own) - 3), table[3]]
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-6, rtol=0)
    _, header = load_weights(str(tmp_path / "run"))
    assert header.initialized_from is not None
    assert header.initialized_from.name == str(source) and header.initialized_from.samples_seen == 64
    assert header.initialized_from.digest == weights_file.digest(load_weights(str(source))[0])


def test_the_plan_says_what_becomes_of_each_part(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    own = own_names(small_set)
    source = save_source(small_set, tmp_path / "source", (own[0], "other"))
    names = json.dumps({own[1]: ["other", 0], own[2]: 1})
    for file, text in (("map.json", names), ("map.yaml", names)):
        (tmp_path / file).write_text(text)
        result = plan(experiment, options=("--initialize-from", source, "--class-map", tmp_path / file))
        assert result.exit_code == 0, result.stderr
        lines = [line.split() for line in result.stdout.splitlines()]
        assert [*next(line for line in lines if line[:1] == ["class_embedding.table.weight"])[:7]] == [
            "class_embedding.table.weight",
            "adapted",
            "288",
            "8",
            "classes:",
            "2",
            "taken,",
        ]
        assert "1 averaged from several, 5 new, at the mean row; the null row begins at the null row" in result.stdout
        assert next(line for line in lines if line[:1] == ["blocks"])[:5] == ["blocks", "taken", "as", "it", "is"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "content", "words"),
    [
        (("--class-map", "map.json"), '{"no such": 0}', "map.json: no such: is no class of the latents"),
        (
            ("--class-map", "map.json"),
            '{"0": "othr"}',
            "map.json: othr: is no class of the source; did you mean other?",
        ),
        (("--class-map", "map.json"), '{"0": 7}', "map.json: 7: is no class of the source; there are 2"),
        (("--class-map", "map.json"), '{"0": []}', "names no class of the source"),
        (("--class-map", "map.json"), "[]", "must be a mapping"),
        (("--class-map", "nowhere.json"), "", "nowhere.json: cannot be read"),
        (("--set", "model.depth=3"), "", "its depth is 2, and 3 here"),
        (("--set", "model.time_scale=1"), "", "its time_scale is 1000.0, and 1.0 here"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(
    experiment: Path,
    small_set: SmallSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    content: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.json").write_text(content)
    source = save_source(small_set, tmp_path / "source", ("first", "other"))
    assert_one_line(plan(experiment, options=("--initialize-from", source, *options)), words)


def test_options_of_a_source_need_one_and_its_latents_must_be_the_same(
    experiment: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    assert_one_line(plan(experiment, options=("--other-latents",)), "--initialize-from")
    source = save_source(small_set, tmp_path / "source", ("first", "other"))
    tensors, header = load_weights(str(source))
    autoencoder = header.autoencoder.model_copy(update={"content_hash": "another", "name": "elsewhere"})
    save_weights(
        str(source / weights_file.WEIGHTS),
        tensors,
        WeightsHeader(header.model, autoencoder, 16, header.classes, 64, "digest", "test"),
    )
    refused = plan(experiment, options=("--initialize-from", source))
    assert_one_line(refused, "latents of elsewhere, another autoencoder", "--other-latents")
    assert plan(experiment, options=("--initialize-from", source, "--other-latents")).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_published_model_is_tuned_to_few_classes_at_another_size_and_exported(
    experiment: Path, small_set: SmallSet, tmp_path: Path, family: str
) -> None:
    """A thousand classes at 4 x 4 elements, to the eight of 8 x 8; resumed, sampled, and loaded by diffusers."""
    torch.manual_seed(0)
    published = DiT(DiTConfig(4, 4, 2, 32, 2, 2, num_classes=1000, condition_dropout=0.1, time_scale=1.0))
    save_file(published_state(published, variance=True), tmp_path / "published.safetensors")
    imported = lfm(
        *("import", tmp_path / "published.safetensors", tmp_path / "source", "--from", family),
        *("--num-heads", 2, "--autoencoder", small_set.autoencoder),
    )
    assert imported.exit_code == 0, imported.output
    names = own_names(small_set)
    (tmp_path / "map.json").write_text(json.dumps({name: 100 + index for index, name in enumerate(names)}))
    settings = ("model.time_scale=1", "model.frequency_shift=0", "train.schedule=constant", "train.learning_rate=1e-5")
    options = ("--initialize-from", tmp_path / "source", "--class-map", tmp_path / "map.json")
    shown = plan(experiment, *settings, options=options)
    assert "sincos computed for 4 x 4 tokens in place of 2 x 2" in shown.stdout, shown.output
    assert "set flow.time_shift=2, now 1" in shown.stdout
    assert train(experiment, *settings, "train.num_steps=5", options=options).returncode == 0
    if family == "dit":  # resumed without naming the source
        assert train(experiment, *settings, "train.num_steps=10", zero(1)).returncode == 0
        whole = (f"run={tmp_path / 'whole'}", *settings, "train.num_steps=10")
        assert train(experiment, *whole, options=options).returncode == 0
        assert_same_weights(tmp_path / "whole", tmp_path / "run")
    _, header = load_weights(str(tmp_path / "run"))
    assert header.prediction == ("noise" if family == "dit" else "velocity")
    assert header.initialized_from is not None and header.initialized_from.name == str(tmp_path / "source")
    sampled = lfm("sample", tmp_path / "run", "--out", tmp_path / "samples", "--seeds", "0-1", "--num-steps", 2)
    assert sampled.exit_code == 0, sampled.output
    exported = lfm("export", tmp_path / "run", tmp_path / "pipeline", "--to", "diffusers")
    assert exported.exit_code == 0, exported.output
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline(class_labels=[0], num_inference_steps=10, output_type="np").images.shape == (1, 16, 16, 3)
    network, steps = library.load(str(tmp_path / "run")).network, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    if family == "dit":  # a function of diffusion steps, of which the pipeline takes every twentieth
        assert isinstance(network, NoisePrediction)
        network, steps = network.network, torch.arange(0, NUM_DIFFUSION_STEPS, STRIDE)[[0, 1, 20, 44, 49]]
    state, classes = torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 2, 0, 2])
    with torch.no_grad():
        ours = network(state, steps.float(), Condition(classes))
        theirs = pipeline.transformer(state, timestep=steps, class_labels=classes).sample
    torch.testing.assert_close(theirs, ours.reshape(theirs.shape), atol=2e-5, rtol=0)
