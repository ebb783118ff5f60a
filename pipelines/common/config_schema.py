"""The schema of an experiment: one YAML file -> frozen values, every key known, all arithmetic checked beforehand."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, PositiveInt, Tag, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lfm.errors import ConfigError
from lfm.models.config import BackboneOptions
from lfm.models.registry import BACKBONES, DEFAULT_BACKBONE

# What DeepSpeed's JSON must leave to the YAML, and the YAML's key for it: each number has one owner.
OWNED_BY_YAML = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "optimizer": "train.learning_rate",
    "scheduler": "train.schedule",
    "gradient_clipping": "train.gradient_clipping",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "checkpoint": "train.checkpoint_every",
}

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # types of pydantic errors

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class DataConfig(_Section):
    """Which latents, and how they are shuffled."""

    shards: Name  # folder or URL of latent shards
    window: Count = 8  # shards shuffled together
    cache: str | None = None  # folder for copies of remote shards
    cache_gigabytes: PositiveFloat | None = None  # of 10^9 bytes: how large it may become
    skip_shards: tuple[str, ...] = ()  # names of damaged shards that are left out
    held_back: int = Field(default=0, ge=0)  # the last shards, never trained on: for the validation loss


def _backbone_of(section: Any) -> str:
    """Return the backbone's name of a `model:` section, as parsed from YAML or as options."""
    if isinstance(section, BackboneOptions):
        return section.backbone
    return str(section.get("backbone", DEFAULT_BACKBONE)) if isinstance(section, dict) else DEFAULT_BACKBONE


if TYPE_CHECKING:
    ModelSection = BackboneOptions
else:  # the options of the backbone that the section names
    ModelSection = Annotated[
        Union[tuple(Annotated[backbone.options, Tag(name)] for name, backbone in BACKBONES.items())],  # noqa: UP007
        Discriminator(_backbone_of),
    ]


class FlowConfig(_Section):
    """The probability path, the distribution of times, and the loss."""

    sigma_min: float = Field(default=1e-5, ge=0, lt=1)
    # Beyond the paper:
    time: Literal["uniform", "logit_normal"] = "uniform"
    time_shift: PositiveFloat = 1.0  # above 1 towards noise, as latents of more tokens want
    direction_weight: float = Field(default=0.0, ge=0)  # of the loss of the velocity's direction
    coupling_group: PositiveInt = 1  # samples among which noise is dealt out by optimal transport


class TrainConfig(_Section):
    """The optimization. A step is one optimizer update of `global_batch` samples."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    num_steps: Count
    global_batch: int = Field(default=256, ge=1, le=2**20)
    micro_batch: PositiveInt | None = None  # samples per forward pass of one rank; by default all of its part
    learning_rate: PositiveFloat = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clipping: float = Field(default=0.0, ge=0)  # 0 means none
    precision: Literal["fp32", "bf16"] = "fp32"
    skip_above: float = Field(default=20.0, ge=0)  # times the usual gradient norm: such steps are left out; 0: none
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    # Widths of power-function averages (EDM2), kept as snapshots, from which `lfm ema` makes any other width.
    ema_sigma_rel: tuple[Annotated[float, Field(ge=0.01, le=0.25)], ...] = ()
    ema_snapshots: PositiveInt = 16  # over the whole run, of each width, in float16
    checkpoint_every: PositiveInt = 1000  # steps
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10  # steps
    validate_every: PositiveInt | None = None  # steps: a grid of images, and the validation loss; by default neither


class EvaluationConfig(_Section):
    """The Frechet distance of the EMA's images while it trains; the weights that come nearest are kept beside."""

    reference: str  # what `lfm reference` wrote
    every: PositiveInt  # steps
    num: int = Field(default=1000, ge=2)  # images
    guidance_scale: float = Field(default=1.0, ge=0)


class ExperimentConfig(_Section):
    """One experiment, as its YAML file says."""

    run: Name  # folder for checkpoints, weights and logs
    condition: Literal["none", "class", "inpaint", "semantic", "class+inpaint", "class+semantic"] = "none"
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)  # share of samples that train the null condition
    data: DataConfig
    model: ModelSection
    flow: FlowConfig = FlowConfig()
    train: TrainConfig
    evaluation: EvaluationConfig | None = None
    deepspeed: str | dict[str, Any]  # a JSON file relative to the YAML, and then its content

    @property
    def conditions(self) -> set[str]:
        """What the model is told: none or some of class, inpaint, semantic."""
        return set(self.condition.split("+")) - {"none"}


def load(path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The experiment of a YAML file, over those it extends, with `--set key.key=value` put over it.

    Raises:
        ConfigError: names file and key and the repair.
    """
    content = _read_yaml(Path(path))
    for override in overrides:
        _put(content, override)
    config = validate(content, Path(path).name)
    settings = config.deepspeed
    if isinstance(settings, str):
        settings = _read_json(Path(path).parent / settings)
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"{config.deepspeed}: zero_optimization: missing; add it, with a stage of 1, 2 or 3")
    for key, owner in OWNED_BY_YAML.items():
        if key in settings:
            raise ConfigError(f"{config.deepspeed}: {key}: belongs to the YAML; remove it here and set {owner} there")
    config = config.model_copy(update={"deepspeed": settings})
    _check(config, settings, Path(path).name)
    return config


def validate(content: Any, name: str) -> ExperimentConfig:
    """A parsed YAML or JSON value as an experiment.

    Raises:
        ConfigError: the first wrong key.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: must hold keys and values")
    try:
        return ExperimentConfig.model_validate(content)
    except ValidationError as error:
        # An unknown key explains a missing one better than the other way round.
        first = min(error.errors(), key=lambda item: item["type"] not in UNKNOWN_KEY)
        raise ConfigError(f"{name}: {_explain(first)}") from error


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys at which two configurations differ, with both values."""
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
        section: Any = ExperimentConfig
        for part in where[:-1]:
            kind = section.model_fields[part].annotation
            section = next(one for one in (*get_args(kind), kind) if one is not type(None))
        if where[:-1] == ["model"]:
            known = [field.name for field in fields(BACKBONES[backbone].options)]
        else:
            known = list(section.model_fields)
        near = difflib.get_close_matches(where[-1], known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    if error["type"] == "union_tag_invalid":
        return f"{key}.backbone: {error['ctx']['tag']}: unknown; one of {', '.join(BACKBONES)}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _read_yaml(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a file, over that of each file it `extends` (a name, or a list); names are relative to the file."""
    try:
        content = _parse_yaml(path.read_text(), str(path)) or {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values")
    if isinstance(content.get("deepspeed"), str):
        content["deepspeed"] = str(path.parent.absolute() / content["deepspeed"])
    names = content.pop("extends", None) or []
    names = names if isinstance(names, list) else [names]
    if path.absolute() in extending or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends: must name other files, and none that comes back to itself")
    below: dict[str, Any] = {}
    for name in names:
        below = _merged(below, _read_yaml(path.parent / name, (*extending, path.absolute())))
    return _merged(below, content)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(text))
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"deepspeed: {path}: {str(error.strerror).lower()}") from error
    except ValueError as error:
        raise ConfigError(f"deepspeed: {path}: not valid JSON ({error})") from error


def _put(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: must be key=value, as in --set train.num_steps=10")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override}: {section} holds a value, no keys")
    content[last] = _parse_yaml(value, f"--set {override}")


def _check(config: ExperimentConfig, settings: dict[str, Any], name: str) -> None:
    """What one key alone cannot tell."""
    train = config.train
    if train.warmup_steps > train.num_steps:
        raise ConfigError(
            f"{name}: train.warmup_steps {train.warmup_steps} is more than train.num_steps {train.num_steps}; "
            f"change either, as in --set train.warmup_steps={train.num_steps // 10}"
        )
    if train.micro_batch and train.global_batch % train.micro_batch:
        raise ConfigError(
            f"{name}: train.global_batch {train.global_batch} is no multiple of train.micro_batch {train.micro_batch}"
        )
    if config.flow.coupling_group > 1 and config.conditions:
        raise ConfigError(
            f"{name}: flow.coupling_group: gives each condition a noise of its own, which sampling does not; "
            "set it to 1, or condition: none"
        )
    if config.condition_dropout and config.condition == "none":
        raise ConfigError(f"{name}: condition_dropout: needs a condition, as in condition: class")
    if config.data.held_back and not train.validate_every:
        raise ConfigError(f"{name}: data.held_back: needs train.validate_every, the steps between validation losses")
    if len(set(train.ema_sigma_rel)) != len(train.ema_sigma_rel):
        raise ConfigError(f"{name}: train.ema_sigma_rel: names a width twice")
    for offload in ("offload_optimizer", "offload_param"):
        where = settings["zero_optimization"].get(offload)
        if isinstance(where, dict) and where.get("device") == "nvme":
            raise ConfigError(
                f"{name}: deepspeed: zero_optimization.{offload}: nvme is not offered; set its device to cpu"
            )
    stage = settings["zero_optimization"].get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(f"{name}: deepspeed: zero_optimization.stage is {stage}; choose 1, 2 or 3")


def as_yaml(config: ExperimentConfig) -> str:
    """The resolved experiment as YAML."""
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(config.model_dump(mode="json"), text)
    return text.getvalue().rstrip()
