"""The reader of an experiment's YAML file, which may extend others, and of the DeepSpeed settings that it names."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lfm import storage
from lfm.errors import ConfigError, StorageError
from pipelines.common.experiment.config_checks import check
from pipelines.common.experiment.config_schema import ExperimentConfig, backbone_of, validate
from pipelines.common.options import expand_home

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
    check(config, settings, Path(path).name)
    return config


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
    """Return the text of a file in UTF-8.

    Raises:
        ConfigError: It cannot be read, is larger than `largest` bytes, or is not UTF-8.
    """
    try:
        return storage.read_bytes(str(path), largest).decode()
    except (StorageError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).removeprefix(f'{path}: ')}") from error


def _merged(below: Any, above: Any) -> Any:
    """Merge mappings key by key; a `model:` section of another backbone replaces the one below it."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "backbone" in above and backbone_of(above) != backbone_of(below):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def parse_yaml(text: str, name: str) -> Any:
    """Return the content of a YAML text, with `~/` as the home folder; errors name it by `name`.

    Raises:
        ConfigError: It is not YAML, or nested too deeply.
    """
    try:
        return expand_home(_limited(YAML(typ="safe", pure=True).load(io.StringIO(text))))
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


def as_yaml(config: ExperimentConfig) -> str:
    """Return the resolved experiment as YAML."""
    text = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump(config.model_dump(mode="json"), text)
    return text.getvalue().rstrip()
