"""The schema of an experiment's YAML file, and its reader: unknown keys and contradictions are refused."""

from __future__ import annotations

import difflib
import functools
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, Tag, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lfm import storage
from lfm.errors import ConfigError, StorageError
from lfm.models.config import BackboneOptions
from lfm.models.registry import BACKBONES, DEFAULT_BACKBONE
from pipelines.common.options import problem

# Keys that belong to the YAML file and not to DeepSpeed's JSON file, with the key of the YAML file.
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

LARGEST_BYTES, MOST_FILES, MOST_NODES, DEEPEST = 128 << 10, 50, 10_000, 30  # of what is read
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # types of pydantic errors

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
PositiveInt = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class SourceConfig(_Section):
    """One data set of a mixture."""

    shards: Name
    """Folder or URL of the latent shards."""
    name: str = ""
    """Name in the plan, in stages and in messages; by default the last part of `shards`."""
    weight: PositiveFloat | None = None
    """Share of the samples, relative to the other sources; if one has a weight, all must."""
    repeat: PositiveFloat | None = None
    """How often the source is read while a source of `repeat` 1 is read once; by default 1."""
    num_samples: Count | None = None
    """Samples to read while a source of `repeat` 1 is read once."""
    classes: dict[str, str] = {}
    """The mixture's names of this source's classes; classes of one name are one class, others keep their name."""
    flips: bool = True
    """Whether mirrored latents are used, where the shards have them."""
    skip_shards: tuple[str, ...] = ()
    """Names of damaged shards to leave out."""

    @model_validator(mode="after")
    def _set_name(self) -> SourceConfig:
        if not self.name:
            object.__setattr__(self, "name", self.shards.rstrip("/").rpartition("/")[2])
        return self


class StageConfig(_Section):
    """A later stage of a mixture."""

    samples_seen: Count
    """Samples seen at which the stage begins."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """New weights of sources by name; 0 leaves a source out, and others keep the weight that they have."""


class DataConfig(_Section):
    """The training data, and how it is shuffled."""

    shards: Name | None = None
    """Folder or URL of the latent shards."""
    sources: tuple[SourceConfig, ...] = ()
    """Several data sets that are mixed, instead of `shards`."""
    stages: tuple[StageConfig, ...] = ()
    """Weights of the sources that change during training."""
    warn_passes: PositiveFloat = 100.0
    """Warn of a source of a mixture that is read more often than this."""
    window: Count = 8
    """Number of shards that are shuffled together."""
    cache: str | None = None
    """Folder for copies of remote shards; by default ~/.cache/lfm."""
    cache_gigabytes: PositiveFloat | None = None
    """Largest size of the cache in 10^9 bytes; by default unlimited."""
    skip_shards: tuple[str, ...] = ()
    """Names of damaged shards to leave out."""
    held_back: int = Field(default=0, ge=0)
    """Number of shards at the end of each source that are used for the validation loss and not for training."""

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of all latent shards."""
        return (self.shards,) if self.shards is not None else tuple(source.shards for source in self.sources)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        """Refuse keys that contradict each other; the message follows `data: `."""
        if (self.shards is None) == (not self.sources):
            raise ValueError("set either shards, the latents of one folder, or sources, a list of several")
        if self.sources and self.skip_shards:
            raise ValueError("skip_shards: name them in the source that holds them")
        if self.stages and not (self.sources and all(source.weight for source in self.sources)):
            raise ValueError("stages: give every source a weight, which they change")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are called {name}; give each a name of its own")
        for source in self.sources:
            of_kind = [key for key in ("weight", "repeat", "num_samples") if getattr(source, key) is not None]
            if len(of_kind) > 1:
                raise ValueError(f"sources: {source.name} has {' and '.join(of_kind)}; set one of them")
            if (source.weight is None) != (self.sources[0].weight is None):
                raise ValueError(f"sources: {names[0]} or {source.name} has no weight; give every source one, or none")
        starts = [0, *(stage.samples_seen for stage in self.stages)]
        if any(second <= first for first, second in itertools.pairwise(starts)):
            raise ValueError("stages: each must begin at more samples_seen than the one before it")
        weights = {source.name: source.weight for source in self.sources}
        for stage in self.stages:
            for name in stage.weights:
                if name not in weights:
                    raise ValueError(f"stages: no source is called {name}; one of {', '.join(names)}")
            weights |= stage.weights
            if not any(weights.values()):
                raise ValueError(f"stages: at samples_seen {stage.samples_seen} every weight is 0; raise one")
        return self


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


class TrainConfig(_Section):
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


class EvaluationConfig(_Section):
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
    task_score: Literal["scenes"] | None = None
    """Whether the images show their condition, logged as `recognised`; scenes: classes of `lfm scenes`. By default none."""


class ExperimentConfig(_Section):
    """The configuration of one experiment, as in its YAML file."""

    run: Name
    """Folder for checkpoints, weights and logs."""
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


def load(path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Return the experiment of a YAML file, merged over the files that it extends.

    Args:
        path: the YAML file.
        overrides: KEY=VALUE, as in train.num_steps=10, which replace values of the file.

    Raises:
        ConfigError: a file cannot be read, or a key is wrong; names the file, the key and the repair.
    """
    content = _read_yaml(Path(path), (), [])
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


def _read_yaml(path: Path, extending: tuple[Path, ...], files: list[Path]) -> dict[str, Any]:
    """Return the content of a file, merged over the files that it `extends` (a name, or a list) relative to itself.

    `extending` are the files that extend this one, and `files` all that were read."""
    files.append(path)
    if len(files) > MOST_FILES:
        raise ConfigError(f"{path}: extends: reads more than {MOST_FILES} files; merge some of them")
    content = parse_yaml(read_text(path), str(path)) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    if isinstance(content.get("deepspeed"), str):
        content["deepspeed"] = str(path.parent.absolute() / content["deepspeed"])
    names = content.pop("extends", None) or []
    names = names if isinstance(names, list) else [names]
    if path.absolute() in extending or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends: must name other files, without a cycle")
    below = [_read_yaml(path.parent / name, (*extending, path.absolute()), files) for name in names]
    return functools.reduce(_merged, [*below, content], {})


def read_text(path: str | Path, largest: int = LARGEST_BYTES) -> str:
    try:
        return storage.read_bytes(str(path), largest).decode()
    except (StorageError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).removeprefix(f'{path}: ')}") from error


def _merged(below: Any, above: Any) -> Any:
    """Merge mappings key by key; a `model:` section of another backbone replaces the one below it."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "backbone" in above and _backbone_of(above) != _backbone_of(below):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def parse_yaml(text: str, name: str) -> Any:
    try:
        return _limited(YAML(typ="safe", pure=True).load(io.StringIO(text)))
    except (YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _limited(content: Any) -> Any:
    """Return content; raise ValueError if it is too large with its aliases expanded: each may double what is above it."""
    waiting, count = [(content, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MOST_NODES or depth > DEEPEST:
            raise ValueError(f"more than {MOST_NODES:,} values or {DEEPEST} levels, with its aliases expanded")
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple | set) else ()
        waiting += [(child, depth + 1) for child in children]
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _limited(json.loads(read_text(path)))
    except ConfigError as error:
        raise ConfigError(f"deepspeed: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed: {path}: not valid JSON ({error})") from error


def _put(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: must be key=value, as in --set train.num_steps=10")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override}: {section} is a value without keys")
    content[last] = parse_yaml(value, f"--set {override}")


def _check(config: ExperimentConfig, settings: dict[str, Any], name: str) -> None:
    """Refuse keys that contradict each other."""
    train = config.train
    if train.warmup_steps > train.num_steps:
        raise ConfigError(
            f"{name}: train.warmup_steps {train.warmup_steps} is more than train.num_steps {train.num_steps}; "
            f"change either, as in --set train.warmup_steps={train.num_steps // 10}"
        )
    if train.micro_batch and train.global_batch % train.micro_batch:
        raise ConfigError(
            f"{name}: train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch}"
        )
    if config.flow.coupling_group > 1 and config.conditions:
        raise ConfigError(
            f"{name}: flow.coupling_group: makes the noise depend on the condition, which sampling does not; "
            "set it to 1, or condition: none"
        )
    if config.flow.coupling_group > 1 and config.flow.num_noises > 1:
        raise ConfigError(f"{name}: flow.coupling_group, flow.num_noises: are two ways to assign noise; set one")
    if config.condition_dropout and config.condition == "none":
        raise ConfigError(f"{name}: condition_dropout: needs a condition, as in condition: class")
    if config.evaluation and config.evaluation.task_score and "class" not in config.conditions:
        raise ConfigError(f"{name}: evaluation.task_score: needs classes, as in condition: class")
    if config.evaluation and not (config.evaluation.reference or config.evaluation.task_score):
        raise ConfigError(f"{name}: evaluation: measures nothing; set its reference, task_score, or both")
    if config.data.held_back and not train.validate_every:
        raise ConfigError(f"{name}: data.held_back: needs train.validate_every, the steps between validation losses")
    if len(set(train.ema_sigma_rel)) != len(train.ema_sigma_rel):
        raise ConfigError(f"{name}: train.ema_sigma_rel: lists a width twice")
    for offload in ("offload_optimizer", "offload_param"):
        where = settings["zero_optimization"].get(offload)
        if isinstance(where, dict) and where.get("device") == "nvme":
            raise ConfigError(
                f"{name}: deepspeed: zero_optimization.{offload}: nvme is not supported; set its device to cpu"
            )
    stage = settings["zero_optimization"].get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(f"{name}: deepspeed: zero_optimization.stage is {stage}; choose 1, 2 or 3")


def as_yaml(config: ExperimentConfig) -> str:
    """Return the resolved experiment as YAML."""
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(config.model_dump(mode="json"), text)
    return text.getvalue().rstrip()
