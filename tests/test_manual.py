"""The manual is built without a warning, from what is in the repository, and asks no other host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lfm.models.registry import BACKBONES
from pipelines.cli.main import COMMANDS
from pipelines.common.experiment.json_schema import json_schema
from tests.support.commands import REPOSITORY

pytest.importorskip("material", reason="the extra docs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_command_and_key_has_its_place(site: Path) -> None:
    commands, keys = ((site / name).read_text() for name in ("commands.html", "configuration.html"))
    for command in COMMANDS:
        assert f"lfm {command.name}" in commands
    sections = json_schema()["$defs"]
    for name in ("TrainConfig", "FlowConfig", *(backbone.options.__name__ for backbone in BACKBONES.values())):
        for key in sections[name]["properties"]:
            assert f"<code>{key}</code>" in keys, key


def test_links_lead_to_pages_of_the_site(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for target in re.findall(r'(?:href|src)="(?!https?:|data:|[#?])([^"#?]+)', page.read_text()):
            path = (page.parent / target) if not target.startswith("/") else site / target.lstrip("/")
            assert path.exists() or page.name == "404.html", f"{page.name}: {target}"


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect)"[^>]* href="(https?:[^"]+)"', text)
        assert not loaded, f"{page.name}: {loaded}"
