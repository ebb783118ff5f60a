"""Pages of the manual that are generated or lie outside of docs/, added while mkdocs builds it.

The command reference is made from click's commands, the configuration reference from the schema of experiments, and the
reference of the Python API from docstrings.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from pipelines.common.experiment.json_schema import json_schema

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "configs/README.md": "experiments.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
}
API = (
    "lfm.load",
    "lfm.inference.trained_model.TrainedModel",
    "lfm.inference.condition_inputs.Conditions",
    "lfm.solvers.Solving",
    "lfm.flow.guidance.Guidance",
    "lfm.data.stream.latent_stream.LatentStream",
    "lfm.types",
    "lfm.errors",
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the images that those outside of docs/ show."""
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(REPOSITORY / source).read_text()))
    for folder in sorted({(REPOSITORY / source).parent for source in OUTSIDE}):
        for image in folder.glob("*.png"):
            path = image.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, path, content=image.read_bytes()))
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "configuration.md", content=configuration()))
    files.append(File.generated(config, "api.md", content=api()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Make links of the repository links of the site; a link to a file that is no page becomes text."""
    source = next(
        (source for source, name in OUTSIDE.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}"
    )

    def on_site(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target:
            return match[0]
        path = (REPOSITORY / source).parent.joinpath(target).resolve().relative_to(REPOSITORY).as_posix()
        name = OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name):
            from_page = posixpath.relpath(name, posixpath.dirname(page.file.src_uri))
            return f"{image}[{text}]({from_page}{anchor})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(on_site, markdown)


def commands() -> str:
    """Return the page of all commands."""
    references = (("pipelines.cli.main", "main", "lfm"), ("pipelines.cli.model_commands", "train", "launch/train.py"))
    lines = ["# Commands", "", "Each command prints this with `--help`. Running a command again resumes it.", ""]
    for module, command, name in references:
        lines += ["::: mkdocs-click", f"    :module: {module}", f"    :command: {command}", f"    :prog_name: {name}"]
        lines += ["    :depth: 1", "    :style: plain", ""]
    return "\n".join(lines)


def configuration() -> str:
    """Return the page of all keys of an experiment."""
    schema = json_schema()
    sections = {"": schema} | {
        title: schema["$defs"][name]
        for title, name in {
            "data": "DataConfig",
            "data.sources": "SourceConfig",
            "data.stages": "StageConfig",
            "model, backbone: dit": "DiTOptions",
            "model, backbone: unet": "UNetOptions",
            "flow": "FlowConfig",
            "train": "TrainConfig",
            "evaluation": "EvaluationConfig",
        }.items()
    }
    lines = [
        "# Configuration",
        "",
        "The keys of an experiment's YAML file. `lfm config new` prints a file that explains them, `lfm config show NAME`",
        "one with all keys, and `lfm config schema` the JSON schema for editors.",
    ]
    for title, section in sections.items():
        lines += [
            "",
            f"## {title or 'Top level'}",
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for key, value in section["properties"].items():
            default = (
                "" if isinstance(value.get("default", {}), dict) else f"`{value['default']}`".replace("None", "null")
            )
            cells = (f"`{key}`", type_of(value), default, value["description"])
            lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def type_of(value: dict[str, Any]) -> str:
    """Return the type and the limits of a key in words."""
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "anyOf" in value or "oneOf" in value:
        kinds = [kind for kind in value.get("anyOf", value.get("oneOf")) if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(type_of(kind) for kind in kinds))
    if "$ref" in value:
        return "section"
    limits = [
        f"{sign} {value[key]:,}"
        for key, sign in {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}.items()
        if key in value and abs(value[key]) < 2**62
    ]
    names = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "array": "list"}
    kind = names.get(value.get("type", ""), "mapping")
    if kind == "list" and isinstance(value.get("items"), dict) and value["items"]:
        kind = f"list of {type_of(value['items'])}"
    return " ".join([kind, *([", ".join(limits)] if limits else [])])


def api() -> str:
    """Return the page of the Python API."""
    return "# Python API\n\n" + "\n\n".join(f"::: {name}" for name in API) + "\n"
