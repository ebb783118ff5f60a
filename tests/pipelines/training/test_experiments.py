"""Tests of the shipped experiments: they load, describe themselves at their head, and build the published networks."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lfm.data import manifest as manifests
from lfm.data.manifest import ShardRecord
from lfm.errors import ConfigError
from lfm.models import registry
from lfm.models.dit_config import DiTOptions
from lfm.training.run_folder import RunFolder
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment import config_file
from pipelines.common.experiment import config_schema as configs
from pipelines.training import train
from tests.support.commands import REPOSITORY
from tests.support.experiments import SHIPPED, latents_manifest

# Of each experiment of the paper: pixels, classes, GPUs, and millions of parameters as published for DiT-B/2 and L/2
# (Peebles & Xie 2022 count 458 for L/2, with a head that predicts a variance too; Dao et al. 2023 count 457).
PAPER = {
    "celeba_hq_256": (256, 0, 1, 457),
    "celeba_hq_512": (512, 0, 8, 457),
    "celeba_hq_1024": (1024, 0, 8, 457),
    "ffhq_256": (256, 0, 1, 457),
    "lsun_church_256": (256, 0, 2, 457),
    "lsun_bedroom_256": (256, 0, 1, 457),
    "imagenet_256": (256, 1000, 8, 130),
    "imagenet_256_l2": (256, 1000, 8, 457),
    "celeba_hq_256_inpaint": (256, 0, 2, 457),
    "celebamask_hq_256_semantic": (256, 0, 2, 457),
}
MODERN = "_modern"
# GPUs, millions of parameters and channels of the input of the paper's U-Nets. No count of these networks is published: the
# numbers are ours, of networks that tests compare with the published layers and with published counts at other sizes.
UNETS = {
    "celeba_hq_256_unet": (1, 153.1, 4),
    "celeba_hq_512_unet": (8, 352.2, 4),
    "celeba_hq_1024_unet": (8, 531.8, 4),
    "ffhq_256_unet": (1, 406.4, 4),
    "lsun_church_256_unet": (1, 356.1, 4),
    "lsun_bedroom_256_unet": (1, 406.4, 4),
    "imagenet_256_unet": (8, 407.4, 4),
    "celeba_hq_256_inpaint_unet": (2, 356.1, 9),
    "celebamask_hq_256_semantic_unet": (2, 356.1, 12),  # theirs 8: our embedding of a map has 8 channels, theirs 4
}
UNET = "_unet"
PRESETS = {"small": 32, "base": 130, "large": 457}  # millions of parameters, as stated in their heads


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_experiment_dry_runs_and_its_head_says_command_hardware_and_expectation(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, command, hardware = path.read_text().splitlines()[:3]
    assert schema == "# yaml-language-server: $schema=schema.json"
    assert re.fullmatch(rf"# deepspeed (--num_gpus \d+ )?launch/train\.py --config configs/{path.name}", command)
    assert hardware.startswith("# ") and any(line.startswith("# Expected: ") for line in path.read_text().splitlines())
    image_size, classes, *_ = PAPER.get(path.stem.removesuffix(MODERN).removesuffix(UNET), (128, 10))
    shard = ShardRecord(name="000000.tar", samples=1000, bytes=1, sha256="", crc32=0)
    latents = latents_manifest(image_size, classes, 8).model_copy(update={"shards": (shard,)})
    manifests.publish(str(tmp_path / "latents"), latents)
    monkeypatch.setattr(RunFolder, "require_space", lambda *sizes: None)  # checkpoints of several GB
    monkeypatch.setattr(factory, "compiles_blocks", lambda config: False)
    data = f"data.shards={tmp_path / 'latents'}"
    if sources := config_file.load(str(path)).data.sources:
        each = ({**source.model_dump(exclude_none=True), "shards": str(tmp_path / "latents")} for source in sources)
        data = f"data.sources={json.dumps(list(each))}"
    config = config_file.load(str(path), [data, f"run={tmp_path / 'run'}"])
    with torch.device("meta"):
        plan = train.run(config, World(), dry_run=True, rate=100.0).plan
    assert f"{config.train.num_steps:,} steps of {config.train.global_batch} " in plan
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [stem + suffix for stem in PAPER for suffix in ("", MODERN)])
def test_the_networks_are_of_the_published_size_and_the_batch_divides_over_the_stated_gpus(name: str) -> None:
    image_size, classes, gpus, millions = PAPER[name.removesuffix(MODERN)]
    path = REPOSITORY / "configs" / f"{name}.yaml"
    config = config_file.load(str(path))
    with torch.device("meta"):
        model = registry.build_network(factory.model_config(config, latents_manifest(image_size, classes, 8)))
    assert model.num_parameters / 1e6 == pytest.approx(millions, rel=0.01 if name.endswith(MODERN) else 0.004)
    assert f"--num_gpus {gpus} " in path.read_text()
    assert factory.micro_batch(config, World(size=gpus)) >= 1
    assert config.run == f"runs/{name}", "each experiment has a run folder of its own"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_stated_size_and_trains_on_one_gpu_or_eight(name: str) -> None:
    path = REPOSITORY / "configs" / f"{name}.yaml"
    config = config_file.load(str(path))
    with torch.device("meta"):
        model = registry.build_network(factory.model_config(config, latents_manifest(256, 0, 8)))
    assert round(model.num_parameters / 1e6) == PRESETS[name]
    assert f", {PRESETS[name]} million parameters" in path.read_text() and config.run == f"runs/{name}"
    for size in (1, 2, 8):
        assert factory.micro_batch(config, World(size=size)) >= 1


@pytest.mark.parametrize("name", UNETS)
def test_the_papers_unets_train_on_the_data_of_the_experiment_that_they_vary(name: str) -> None:
    gpus, millions, channels = UNETS[name]
    image_size, classes, *_ = PAPER[name.removesuffix(UNET)]
    path = REPOSITORY / "configs" / f"{name}.yaml"
    config, varied = config_file.load(str(path)), config_file.load(str(path).replace(UNET, ""))
    with torch.device("meta"):
        model = registry.build_network(factory.model_config(config, latents_manifest(image_size, classes, 8)))
    assert round(model.num_parameters / 1e6, 1) == millions
    assert model.config.input_channels == channels
    assert f"--num_gpus {gpus} " in path.read_text()
    assert factory.micro_batch(config, World(size=gpus)) >= 1
    assert config.run == f"runs/{name}" and config.flow == configs.FlowConfig()
    assert (config.data, config.condition) == (varied.data, varied.condition)
    assert config.train.precision == varied.train.precision


def test_every_experiment_of_the_paper_has_two_variants_and_the_first_has_no_option_beyond_the_paper() -> None:
    others = {
        "demo",
        "demo_quick",
        "demo_unet",
        "mixture_64",
        "pictures_64",
        "pictures_256",
        "pictures_256_finetune",
        *PRESETS,
        *UNETS,
    }
    assert {path.stem for path in SHIPPED} == others | {stem + suffix for stem in PAPER for suffix in ("", MODERN)}
    for stem in PAPER:
        paper, modern = (config_file.load(str(REPOSITORY / "configs" / f"{stem}{x}.yaml")) for x in ("", MODERN))
        free = {"activation_checkpointing", "attention"}
        defaults = asdict(DiTOptions(size="B"))
        changed = {name for name, value in asdict(paper.model).items() if value != defaults[name]}
        assert changed <= {"size", "patch_size"} | free
        assert paper.flow == configs.FlowConfig()
        assert (modern.model.position, modern.model.norm, modern.model.mlp) == ("rope", "rms", "swiglu")
        assert modern.model.size == paper.model.size and modern.data == paper.data
        assert modern.train.num_steps == paper.train.num_steps


def test_experiments_share_parts_and_extend_no_other_experiment_but_the_one_they_vary() -> None:
    for path in SHIPPED:
        extended = re.findall(r"[\w/]+\.yaml", "".join(re.findall(r"^extends: (.*)$", path.read_text(), re.M)))
        original = f"{path.stem.removesuffix(MODERN).removesuffix(UNET)}.yaml"
        parts = {
            f"parts/{part}.yaml"
            for part in ("paper", "modern", "blocks", "images", "unet_edm", "unet_guided", "finetune")
        }
        allowed = parts | ({original} if path.stem.endswith((MODERN, UNET)) else set())
        assert set(extended) <= allowed, path.name


def test_a_file_overrides_those_that_it_extends_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "base" / "first.yaml").write_text(
        "run: a\ndata: {shards: b}\nmodel: {size: S, patch_size: 4}\ntrain: {num_steps: 5}\ndeepspeed: ../zero.json\n"
    )
    (tmp_path / "base" / "second.yaml").write_text("extends: first.yaml\nmodel: {patch_size: 8, qk_norm: true}\n")
    (tmp_path / "part.yaml").write_text("model: {qk_norm: false, norm: rms}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: [base/second.yaml, part.yaml]\nrun: c\n")
    config = config_file.load(str(top), ["model.size=B"])
    assert (config.run, config.data.shards, config.train.num_steps) == ("c", "b", 5)
    model = config.model
    assert (model.size, model.patch_size, model.qk_norm, model.norm) == ("B", 8, False, "rms")
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}


def test_a_model_section_of_another_backbone_replaces_the_one_below(tmp_path: Path) -> None:
    (tmp_path / "dit.yaml").write_text(
        "run: a\ndata: {shards: b}\nmodel: {size: L}\ntrain: {num_steps: 5}\ndeepspeed: {zero_optimization: {stage: 1}}\n"
    )
    (tmp_path / "unet.yaml").write_text("extends: dit.yaml\nmodel: {backbone: unet, model_channels: 32}\n")
    (tmp_path / "wide.yaml").write_text("extends: unet.yaml\nmodel: {num_blocks: 1}\n")
    (tmp_path / "same.yaml").write_text("extends: dit.yaml\nmodel: {backbone: dit, patch_size: 4}\n")
    model = config_file.load(str(tmp_path / "wide.yaml")).model
    assert (model.backbone, model.model_channels, model.num_blocks) == ("unet", 32, 1)
    same = config_file.load(str(tmp_path / "same.yaml")).model
    assert (same.size, same.patch_size) == ("L", 4)


@pytest.mark.parametrize("names", ["self.yaml", "[other.yaml]", "3", "[[self.yaml]]", "{a: b}", "nowhere.yaml"])
def test_extending_itself_or_nothing_is_one_line_naming_the_file(tmp_path: Path, names: str) -> None:
    (tmp_path / "self.yaml").write_text(f"extends: {names}\n")
    (tmp_path / "other.yaml").write_text("extends: self.yaml\n")
    with pytest.raises(ConfigError, match=r"(self|nowhere)\.yaml: ") as caught:
        config_file.load(str(tmp_path / "self.yaml"))
    assert "\n" not in str(caught.value)
