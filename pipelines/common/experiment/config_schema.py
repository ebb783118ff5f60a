"""The schema of an experiment's YAML file: unknown keys are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import Discriminator, Field, PositiveFloat, Tag, ValidationError

from lfm.errors import ConfigError
from lfm.models.config import BackboneOptions
from lfm.models.registry import BACKBONES, DEFAULT_BACKBONE
from pipelines.common.experiment.data_section import ConfigSection, Count, DataConfig, Index, Name, PositiveInt, Share
from pipelines.common.options import problem

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # types of pydantic errors


def backbone_of(section: Any) -> str:
    """Return the backbone's name of a `model:` section, as parsed from YAML or as options."""
    if isinstance(section, BackboneOptions):
        return section.backbone
    return str(section.get("backbone", DEFAULT_BACKBONE)) if isinstance(section, dict) else DEFAULT_BACKBONE


if TYPE_CHECKING:
    ModelSection = BackboneOptions
else:  # the options of the backbone that the section names
    ModelSection = Annotated[
        Union[tuple(Annotated[backbone.options, Tag(name)] for name, backbone in BACKBONES.items())],  # noqa: UP007
        Discriminator(backbone_of),
    ]


class FlowConfig(ConfigSection):
    """The probability path, the distribution of times, and the loss."""

    sigma_min: float = Field(default=1e-5, ge=0, lt=1)
    """Standard deviation of the noise that remains at time 0."""
    # Beyond the paper:
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training times."""
    time_shift: PositiveFloat = 1.0
    """Shift of the training times; above 1, more of them are near noise, which latents of more tokens need."""
    direction_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss on the direction of the velocity."""
    internal_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss on the velocity of the early blocks, which `model.internal_head` adds."""
    latent_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss on the clean latent that the early blocks predict by the head of `model.latent_head`."""
    layer_sync_weight: float = Field(default=0.0, ge=0)
    """Weight of the alignment of an early block's tokens with a later block's."""
    layer_sync_blocks: tuple[Index, Index] | None = None
    """Numbers of the early and the later block, from 0, which the alignment needs; such as a third and two thirds of them."""
    coupling_group: PositiveInt = 1
    """Number of samples among which noise is assigned by optimal transport; 1 means independent noise."""
    num_noises: int = Field(default=1, ge=1, le=64)
    """Number of noises drawn for each sample, of which the one nearest to its data is used; 1 means independent noise."""


class TrainConfig(ConfigSection):
    """The optimization. A step is one optimizer update of `global_batch` samples."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the data order and all random draws."""
    num_steps: Count
    """Number of optimizer steps of the whole run."""
    global_batch: int = Field(default=256, ge=1, le=2**20)
    """Samples of one optimizer step, on all ranks together."""
    micro_batch: PositiveInt | None = None
    """Samples of one forward pass on one rank; by default all samples of the rank."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW, or Muon for the matrices of the blocks and AdamW for the rest (beyond the paper)."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    reference_width: PositiveInt | None = None
    """Width at which learning_rate was found; it is scaled to the width of the network (muP); by default it is not."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warmup: constant, or a cosine that falls to 0 at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps during which the learning rate rises linearly from 0."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of the moments of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    trainable: tuple[Name, ...] = Field(default=("all",), min_length=1)
    """Parts to train: all, attention, norms_and_biases, conditions, adapters, scales, or patterns of names of weights."""
    adapter_rank: PositiveInt = 8
    """Rank of the adapters (LoRA) that `trainable: [adapters]` adds."""
    gradient_clipping: float = Field(default=0.0, ge=0)
    """Largest norm of the gradient; 0 means no clipping."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Precision of the network; by default bf16 on a GPU and fp32 on a CPU, on which tf32 is fp32, too. Time, noise, loss,
    master weights and the optimizer's state are float32 in each."""
    skip_above: float = Field(default=20.0, ge=0)
    """Skip steps whose gradient norm exceeds the running mean by this factor; 0 means never."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay per step of the exponential moving average of the weights."""
    ema_sigma_rel: tuple[Annotated[float, Field(ge=0.01, le=0.25)], ...] = ()
    """Relative widths of power-function averages (EDM2) to save as snapshots; `lfm ema` makes other widths of them."""
    ema_snapshots: PositiveInt = 16
    """Number of snapshots of each width over the whole run, in float16."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep."""
    log_every: PositiveInt = 10
    """Steps between lines of the log."""
    validate_every: PositiveInt | None = None
    """Steps between validations, which save a grid of images and log the validation loss; by default none."""


class EvaluationConfig(ConfigSection):
    """What is measured on images of the EMA weights during training: a Frechet distance, a task's score, or both."""

    reference: str | None = None
    """Reference file made by `lfm reference`, for the Frechet distance; the weights with the smallest one are saved, too.
    By default no distance."""
    network: str | None = None
    """Feature network of the reference, unless it is fd-lite: inception:WEIGHTS.pth, or a MODULE.pt2."""
    trust_code: bool = False
    """Load a MODULE.pt2, which runs code that it contains."""
    every: PositiveInt
    """Steps between evaluations."""
    num: int = Field(default=1000, ge=2)
    """Number of generated images."""
    num_steps: PositiveInt = 25
    """Steps of the heun solver, each of two network evaluations."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance scale; 1 means none."""
    autoguidance: Name | None = None
    """Run to guide away from in place of the null condition: a weaker model, or of other classes, at its null condition."""
    task_score: Literal["scenes"] | None = None
    """Whether the images show their condition, logged as `recognised`; scenes: classes of `lfm scenes`. By default none."""


class ExperimentConfig(ConfigSection):
    """The configuration of one experiment, as in its YAML file."""

    run: Name
    """Folder for checkpoints, weights and logs, or its URL in object storage."""
    licence: Name | None = None
    """Licence of the weights for the model card, such as cc-by-4.0 (an identifier of the Hugging Face Hub or SPDX)."""
    condition: Literal["none", "class", "inpaint", "semantic", "class+inpaint", "class+semantic"] = "none"
    """Conditions of the model."""
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the samples that train the null condition, which guidance needs."""
    data: DataConfig
    """The training data."""
    model: ModelSection
    """The network; its other keys depend on `model.backbone`."""
    flow: FlowConfig = FlowConfig()
    """The probability path and the loss."""
    train: TrainConfig
    """The optimization."""
    evaluation: EvaluationConfig | None = None
    """Evaluation during training; by default none."""
    deepspeed: str | dict[str, Any]
    """DeepSpeed's JSON file, relative to the YAML file; in a loaded configuration its content."""

    @property
    def conditions(self) -> set[str]:
        """The conditions of the model: a subset of class, inpaint and semantic."""
        return set(self.condition.split("+")) - {"none"}


def validate(content: Any, name: str) -> ExperimentConfig:
    """Return a parsed YAML or JSON value as an experiment.

    Raises:
        ConfigError: names the first wrong key.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: must be a mapping of keys to values")
    try:
        return ExperimentConfig.model_validate(content)
    except ValidationError as error:
        # A misspelled key is reported as unknown and as missing; the first is the clearer message.
        first = min(error.errors(), key=lambda item: item["type"] not in UNKNOWN_KEY)
        raise ConfigError(f"{name}: {_explain(first)}") from error


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key at which two configurations differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
    elif before != after:
        yield path, before, after


def _explain(error: Any) -> str:
    """Return key, value and repair of one pydantic error."""
    where = [str(part) for part in error["loc"] if part not in ("str", "dict[str,any]")]
    backbone = where.pop(1) if where[:1] == ["model"] and len(where) > 1 else DEFAULT_BACKBONE
    key = ".".join(where)
    if error["type"] in UNKNOWN_KEY:
        known = _known_keys(where[:-1], backbone)
        near = difflib.get_close_matches(where[-1], known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    if error["type"] == "union_tag_invalid":
        return f"{key}.backbone: {error['ctx']['tag']}: unknown; one of {', '.join(BACKBONES)}"
    if error["type"] == "value_error":
        return f"{key}: {problem(error)}"
    return f"{key}: {error['input']!r}: {problem(error)}"


def _known_keys(sections: list[str], backbone: str) -> list[str]:
    """Return the keys of a section, which is named by the keys that lead to it."""
    if sections == ["model"]:
        return [field.name for field in fields(BACKBONES[backbone].options)]
    section: Any = ExperimentConfig
    for key in sections:
        if not key.isdigit():  # the number of an item of a list
            annotation = section.model_fields[key].annotation
            section = next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    return list(section.model_fields)
