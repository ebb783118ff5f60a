"""The manual: its links resolve, its command lines parse, and its overrides are keys of the configuration."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from lfm.data.manifest import AutoencoderRecord, ClassRecord, Manifest, Member, Reject, ShardRecord
from lfm.metrics.reference import ReferenceHeader
from lfm.training.run_folder import RunState
from lfm.weights_file import WeightsHeader
from pipelines.cli.main import main
from pipelines.cli.model_commands import train
from pipelines.common.experiment import config_file, shipped_experiments
from tests.support.commands import REPOSITORY

PAGES = [
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *(
        REPOSITORY / name
        for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "configs/README.md", "benchmarks/README.md")
    ),
]
EXPERIMENTS = sorted((REPOSITORY / "configs").glob("*.yaml"))
EXAMPLE = REPOSITORY / "configs" / "pictures_256.yaml"  # what overrides that stand alone are applied to
STARTS = {"lfm": main, "pipelines.cli.main": main, "launch/train.py": train}


def relative_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@dataclass(frozen=True)
class CommandLine:
    """A command line of the manual."""

    start: str  # a key of STARTS
    arguments: tuple[str, ...]
    complete: bool  # False inside a sentence, where required options may be left out


def code_blocks(text: str) -> Iterator[str]:
    """The lines of indented and fenced code."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def command_lines(text: str) -> Iterator[CommandLine]:
    """The command lines of a page or of the head of an experiment."""
    lines = [(line, True) for line in code_blocks(text)]
    lines += [(re.sub(r"^#\s*(\w+:)?\s*", "", line), True) for line in text.splitlines() if line.startswith("#")]
    lines += [(code, False) for code in re.findall(r"`([^`\n]+)`", text)]
    for line, complete in lines:
        for part in re.split(r"\s&&\s|;\s", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a sentence with an apostrophe
                continue
            at = next((i for i, word in enumerate(words) if word in STARTS), None)
            launcher = words[:1] and words[0] in ("lfm", "deepspeed", "torchrun", "srun", "python", "sbatch")
            if at is None or not launcher:
                continue
            arguments = tuple(word for word in words[at + 1 :] if word != "...")
            yield CommandLine(words[at], arguments, complete and "..." not in words)


def parse(line: CommandLine) -> dict[str, object]:
    """Parse a command line as click does, without running it; returns the parameters."""
    command: click.Command = STARTS[line.start]
    arguments = list(line.arguments)
    if isinstance(command, click.Group):
        if not arguments or arguments[0] == "--help":
            return {}
        name, *arguments = arguments
        found = command.get_command(click.Context(command), name)
        assert found, f"lfm {name}: no such command"
        command = found
    try:
        return command.make_context(command.name, arguments).params if arguments or line.complete else {}
    except (click.MissingParameter, click.BadOptionUsage):  # an option without its value
        if line.complete:
            raise
        return {}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=relative_name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}: no such heading"


@pytest.mark.parametrize("page", [*PAGES, *EXPERIMENTS], ids=relative_name)
def test_command_lines_parse(page: Path) -> None:
    for line in command_lines(page.read_text()):
        try:
            parse(line)
        except click.UsageError as error:
            pytest.fail(f"{line.start} {shlex.join(line.arguments)}: {error.format_message()}")


@pytest.mark.parametrize("page", [*PAGES, *EXPERIMENTS], ids=relative_name)
def test_experiments_and_overrides_are_valid(page: Path) -> None:
    text = page.read_text()
    for line in command_lines(text):
        if line.start == "launch/train.py" and line.complete and "NAME" not in str(line.arguments):
            values = parse(line)
            config_file.load(str(REPOSITORY / str(values["config"])), values["overrides"])
    for line in code_blocks(text):
        if line.startswith("--set "):
            words = shlex.split(line, comments=True)
            config_file.load(str(EXAMPLE), [word for word in words if word != "--set"])
    for override in re.findall(r"`--set ([a-z][^`\s]*)`", text):  # not KEY=VALUE
        config_file.load(str(EXAMPLE), [override])


def test_no_two_tutorials_write_to_the_same_place() -> None:
    """So that a reader can follow one after another."""
    pages: dict[str, set[str]] = {}
    for page in sorted((REPOSITORY / "docs" / "tutorials").glob("*.md")):
        for place in itertools.chain.from_iterable(map(outputs, command_lines(page.read_text()))):
            pages.setdefault(place, set()).add(page.name)
    assert len(pages) > 40
    assert not {place: names for place, names in pages.items() if len(names) > 1}


def outputs(line: CommandLine) -> Iterator[str]:
    """The files and folders that a complete command line writes."""
    if not line.complete:
        return
    values = parse(line)
    if "config" in values:
        yield config_file.load(str(shipped_experiments.find(str(values["config"]))), values["overrides"]).run
    names = ("sheet",) if values.get("dry_run") else ("sheet", "out", "dest")
    yield from (str(values[name]) for name in names if values.get(name))


def test_the_manual_shows_every_command() -> None:
    """So that a new command gets its page."""
    shown = {
        line.arguments[0]
        for page in PAGES
        for line in command_lines(page.read_text())
        if line.start != "launch/train.py" and line.arguments
    }
    commands = {name for name, command in main.commands.items() if not command.hidden}
    assert commands - shown == set()


def test_files_and_tables_of_the_page_on_extending_exist() -> None:
    """Code spans with a slash are paths; those in capitals are names in the path that the same cell of the table names."""
    cells = re.findall(r"\|([^|\n]+)", (REPOSITORY / "docs" / "extending.md").read_text())
    path = REPOSITORY
    for cell in cells:
        spans = re.findall(r"`([^`]+)`", cell)
        paths = [
            span for span in spans if re.fullmatch(r"[\w./-]+/[\w./-]*", span) and not re.search("NAME|FOLDER", span)
        ]
        for span in paths:
            assert (REPOSITORY / span).exists(), f"{span}: no such file"
            path = REPOSITORY / span
        for name in (span for span in spans if re.fullmatch(r"[A-Z][A-Z_]+", span)):
            assert name in path.read_text(), f"{name}: not in {path}"


@pytest.mark.parametrize(
    "record",
    [Manifest, ShardRecord, Reject, ClassRecord, AutoencoderRecord, Member, WeightsHeader, RunState, ReferenceHeader],
)
def test_the_data_format_lists_every_field(record: Any) -> None:
    fields = record.model_fields if issubclass(record, BaseModel) else record.__dataclass_fields__
    page = (REPOSITORY / "docs" / "data-format.md").read_text()
    assert not [name for name in fields if f"`{name}`" not in page]


def test_the_glossary_is_sorted() -> None:
    terms = re.findall(r"^\*\*(.+?)\*\*:", (REPOSITORY / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 40 and terms == sorted(terms, key=str.lower)


def test_wrong_command_lines_are_noticed() -> None:
    page = (
        "    lfm shard A\n\n    lfm sample R --out D --nope 1\n\n    lfm fly away  # no\n\nand `lfm sample R --nope`\n"
    )
    lines = list(command_lines(page))
    assert len(lines) == 4
    for line in lines:
        with pytest.raises((click.UsageError, AssertionError)):
            parse(line)


def test_the_results_are_those_of_the_pages_that_they_link() -> None:
    """Each number of a result stands in the section that its row links."""
    for row in re.findall(r"^\| (?!what|---)(.+) \|$", (REPOSITORY / "docs" / "results.md").read_text(), re.MULTILINE):
        what, result, _, where = row.split(" | ")
        name, _, anchor = re.findall(r"\]\((.+)\)", where)[0].partition("#")
        page = (REPOSITORY / "docs" / name).resolve().read_text()
        section = section_of(page, anchor) if anchor else page
        for number in re.findall(r"\d[\d,.]*\d|\d", result):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|[.,]\d)", section), f"{what}: {number}"


def section_of(page: str, anchor: str) -> str:
    """Return the text of the section of a page with this anchor, up to the next heading of its level."""
    parts = re.split(r"^(## .+)$", page, flags=re.MULTILINE)
    return next(text for heading, text in itertools.pairwise(parts) if slug(heading.lstrip("# ")) == anchor)


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    """Each heading of the third level is a message, with `...` for what differs and flags as the command line shows them."""
    messages = [message for path in sources() for message in texts(ast.parse(path.read_text()))]
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert len(headings) > 30
    for heading in headings:
        quoted = re.compile(".*".join(map(re.escape, re.split(r" ?\.\.\. ?", heading))), re.DOTALL)
        assert any(quoted.search(message) for message in messages), heading


def sources() -> Iterator[Path]:
    """The files of the library and the stages."""
    for package in ("lfm", "pipelines"):
        yield from (REPOSITORY / package).rglob("*.py")


def texts(module: ast.Module) -> Iterator[str]:
    """The texts of a module without docstrings, joined at their placeholders; names of arguments are written as flags."""
    docstrings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "...".join(part.value for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value
        if text:
            yield re.sub(r"`(\w+)`", lambda name: f"--{name[1].replace('_', '-')}", text)
