"""The experiment's schema: every shipped configuration loads, every mistake names file and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.manifest import Member
from lfm.errors import ConfigError
from lfm.models.config import ModelConfig
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment import config_file
from pipelines.common.experiment import config_schema as configs
from tests.support.commands import REPOSITORY
from tests.support.experiments import SHIPPED, latents_manifest


def test_each_condition_shapes_its_model_and_needs_its_members() -> None:
    config = config_file.load(str(SHIPPED[0])).model_copy(update={"condition_dropout": 0.0})
    latents = latents_manifest(64, 10)

    def model(condition: str, *suffixes: str, labels: dict[int, str] | None = None) -> ModelConfig:
        members = tuple(Member(suffix=suffix, dtype="u1", shape=(), offset=0) for suffix in suffixes)
        content = latents.model_copy(update={"members": members, "labels": labels or {}})
        return factory.model_config(config.model_copy(update={"condition": condition}), content)

    assert not model("none").is_conditional
    assert model("class").num_classes == 10 and model("class").condition_channels == 0
    inpaint = model("class+inpaint", "mask.npy", "masked.npy")
    assert (inpaint.num_classes, inpaint.condition_channels, inpaint.num_labels) == (10, 5, None)
    semantic = model("semantic", "seg.npy", labels={0: "sky", 7: "sea"})
    assert (semantic.num_classes, semantic.num_labels, semantic.downsample_factor) == (None, 8, 4)
    for condition, missing in (("inpaint", "masks"), ("class+semantic", "segmentations")):
        with pytest.raises(ConfigError, match=rf"^condition: {re.escape(condition)}: the latents have no {missing}; "):
            model(condition)


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = config_file.load(str(SHIPPED[0]))
    again = tmp_path / "again.yaml"
    again.write_text(config_file.as_yaml(config))
    assert config_file.load(str(again)) == config


@settings(max_examples=30, deadline=None)
@given(global_batch=st.integers(1, 64), micro_batch=st.none() | st.integers(1, 16), ranks=st.integers(1, 9))
def test_batches_add_up_or_are_refused_naming_the_keys(global_batch: int, micro_batch: int | None, ranks: int) -> None:
    config = config_file.load(str(SHIPPED[0]))
    train = config.train.model_copy(update={"global_batch": global_batch, "micro_batch": micro_batch})
    try:
        found = factory.deepspeed_settings(config.model_copy(update={"train": train}), World(size=ranks))
    except ConfigError as error:
        assert "train.global_batch" in str(error)
        assert global_batch % ranks or (micro_batch and (global_batch // ranks) % micro_batch)
    else:
        micro, steps = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
        assert micro * steps * ranks == global_batch


def test_differences_name_every_changed_key() -> None:
    before, after = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4}, "e": 5}
    assert list(configs.differences(before, after)) == [("b.c", 2, 4), ("b.d", 3, None), ("e", None, 5)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.position=alibi", "model.position"),
        ("model.token_dropout=1", "model.token_dropout"),
        ("model.activation_checkpointing=-1", "model.activation_checkpointing"),
        ("flow.time_shift=0", "flow.time_shift"),
        ("flow.direction_weight=-1", "flow.direction_weight"),
        ("flow.coupling_group=4", "flow.coupling_group: makes the noise depend on the condition"),
        ("flow.num_noises=0", "flow.num_noises"),
    ],
)
def test_an_option_beyond_its_range_names_its_key(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_file.load(str(REPOSITORY / "configs" / "demo.yaml"), [change])


def test_two_ways_to_assign_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"flow.coupling_group, flow.num_noises: are two ways"):
        config_file.load(
            str(REPOSITORY / "configs" / "pictures_256.yaml"), ["flow.coupling_group=4", "flow.num_noises=2"]
        )


def test_groups_that_do_not_fit_a_ranks_part_are_refused_naming_the_key() -> None:
    config = config_file.load(str(REPOSITORY / "configs" / "pictures_256.yaml"), ["flow.coupling_group=32"])
    assert factory.micro_batch(config, World(size=8)) == 32
    with pytest.raises(ConfigError, match=r"flow.coupling_group 32: does not divide the 16 samples"):
        factory.micro_batch(config, World(size=16))


def test_every_option_of_the_model_is_a_key_and_reaches_it() -> None:
    changes = {"position": "rope", "norm": "rms", "mlp": "swiglu", "qk_norm": True, "token_dropout": 0.5}
    changes |= {"activation_checkpointing": 2, "attention": "sdpa", "time_scale": 1.0, "mlp_ratio": 2.0}
    config = config_file.load(str(SHIPPED[0]), [f"model.{key}={str(value).lower()}" for key, value in changes.items()])
    model = factory.model_config(config, latents_manifest(64, 10))
    assert {key: getattr(model, key) for key in changes} == changes
    options = factory.stream_options(config, model)
    assert options.num_kept_tokens == model.num_kept_tokens < options.num_tokens == model.num_tokens


def test_a_configuration_that_names_no_backbone_is_of_the_dit(experiment: Path) -> None:
    """Run folders from before there was more than one backbone do not name it."""
    config = config_file.load(str(experiment))
    content = config.model_dump(mode="json")
    assert content["model"].pop("backbone") == "dit"
    assert configs.validate(content, "old") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone=vgg", "model.backbone: vgg: unknown; one of dit"),
        ("model.hiden_size=8", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("model.patch_size=0", "model.patch_size: 0: must be greater than 0"),
        ("model.size=S", "model: set either size, or all of hidden_size, depth and num_heads"),
        ("model=S", "model: 'S': must be a mapping of keys to values"),
    ],
)
def test_a_mistake_in_the_model_section_names_its_key(experiment: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.load(str(experiment), [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
