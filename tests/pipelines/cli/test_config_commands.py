"""`lfm config`: shipped experiments by name, new ones, and the schema for editors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines.common.experiment import config_file, shipped_experiments
from pipelines.common.experiment.json_schema import json_schema
from tests.support.commands import REPOSITORY, assert_one_line, lfm

TASKS = ("none", "class", "inpaint", "semantic", "class+inpaint", "class+semantic")
COMMENTED = re.compile(r"  # (\w+): [^ ]+$")


def test_list_names_every_experiment() -> None:
    lines = lfm("config", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        path.stem for path in sorted((REPOSITORY / "configs").glob("*.yaml"))
    ]
    assert any("ffhq_256_unet" in line and " unet " in line for line in lines)


def test_show_resolves_a_shipped_experiment_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = lfm("config", "show", "imagenet_256_modern", "--set", "train.num_steps=7000")
    assert shown.exit_code == 0, shown.output
    (tmp_path / "again.yaml").write_text(shown.stdout)
    expected = config_file.load(str(REPOSITORY / "configs" / "imagenet_256_modern.yaml"), ["train.num_steps=7000"])
    assert config_file.load("again.yaml") == expected


def test_an_unknown_name_gets_the_nearest_one() -> None:
    assert_one_line(lfm("config", "show", "imagnet_256"), "imagnet_256", "did you mean imagenet_256?")
    assert_one_line(lfm("config", "show", "xyz"), "lfm config list")
    assert_one_line(lfm("config", "show", "missing.yaml"), "missing.yaml", "cannot be read")


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my own.yaml").write_text(lfm("config", "show", "demo").stdout)
    assert lfm("config", "show", "~/my own.yaml").stdout == lfm("config", "show", "demo").stdout


@pytest.mark.parametrize(("task", "size"), [*((task, "base") for task in TASKS), ("none", "small"), ("class", "large")])
def test_a_new_experiment_loads_and_explains_every_key(task: str, size: str, tmp_path: Path) -> None:
    new = lfm("config", "new", "--task", task, "--image-size", "128", "--size", size)
    assert new.exit_code == 0 and "--image-size 128" in new.stdout
    path = tmp_path / "mine.yaml"
    path.write_text(new.stdout)
    config = config_file.load(str(path))
    preset = config_file.load(shipped_experiments.find(size))
    assert config.condition == task and config.model == preset.model and config.train == preset.train
    for key in ("num_noises", "ema_sigma_rel", "held_back", "value_residual"):
        assert f"# {key}: " in new.stdout


def test_the_commented_keys_of_a_new_experiment_are_valid(tmp_path: Path) -> None:
    """Each default that is shown in a comment is the default: without its comment sign it changes nothing."""
    text = lfm("config", "new").stdout
    lines = text.splitlines()
    (tmp_path / "as_printed.yaml").write_text(text)
    before = config_file.load(str(tmp_path / "as_printed.yaml"))
    keys = {key for section in json_schema()["$defs"].values() for key in section["properties"]}
    numbers = {number for number, line in enumerate(lines) if (match := COMMENTED.match(line)) and match[1] in keys}
    uncommented = [f"  {line[4:]}" if number in numbers else line for number, line in enumerate(lines)]
    (tmp_path / "uncommented.yaml").write_text("\n".join(uncommented))
    assert len(numbers) > 40
    assert config_file.load(str(tmp_path / "uncommented.yaml")) == before


def test_the_schema_is_current_and_named_in_every_file() -> None:
    stored = json.loads((REPOSITORY / "configs" / "schema.json").read_text())
    assert stored == json_schema(), "run: lfm config schema > configs/schema.json"
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        first = path.read_text().splitlines()[0]
        named = first.removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / named).resolve() == REPOSITORY / "configs" / "schema.json", path


def test_every_key_of_the_schema_has_a_description() -> None:
    for section in (schema := json_schema(), *schema["$defs"].values()):
        assert not [key for key, value in section["properties"].items() if "description" not in value]
