"""A headless browser on the page of `lfm ui`: Debian's chromium, driven by playwright."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.commands import REPOSITORY, free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 30
SECONDS_TO_END = 60  # of the server, on a busy machine
MILLISECONDS_TO_SETTLE = 1000  # of the canvas, after its image or its brush has changed


@contextmanager
def page_server(runs: Sequence[Path]) -> Iterator[str]:
    """Run `lfm ui` on a free port of this machine, and end it as Ctrl-C does; provides its address."""
    command = [sys.executable, "-m", "pipelines.cli.main", "ui", *map(str, runs), "--port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "Ctrl-C ends it" not in line:
                pytest.fail(f"the server did not start: {line} {process.communicate(timeout=SECONDS)[1]}")
            yield line.split()[0]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=SECONDS_TO_END)
            assert process.returncode == 0 and "Traceback" not in errors, errors
        finally:
            process.kill()


@dataclass
class Browser:
    """A page in a browser that records which hosts it asks for something."""

    page: Any  # playwright's
    hosts: set[str] = field(default_factory=set)

    def open(self, address: str) -> None:
        """Open the page."""
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.goto(address)
        self.page.get_by_role("button", name="Generate").first.wait_for()

    def choose_tab(self, name: str) -> None:
        """Show the controls of a run."""
        self.page.get_by_role("tab", name=name, exact=True).click()

    def panel(self) -> Any:
        """Return the visible tab."""
        return self.page.locator("[role=tabpanel]:visible")

    def set(self, label: str, value: str) -> None:
        """Fill the text or number box of a control whose label begins so."""
        box = self._control(label).locator("textarea, input[type=text], input[type=number]").first
        box.fill(value)
        box.blur()

    def choose(self, name: str) -> None:
        """Click the checkbox or radio button of a name."""
        self.panel().locator("label:has(input)").filter(has_text=re.compile(f"^\\s*{name}")).first.click()
        self.page.wait_for_timeout(MILLISECONDS_TO_SETTLE)

    def choose_label(self, name: str) -> None:
        """Choose the label to paint with, of another colour than the one before, and wait until the brush has its colour."""
        colour = self.panel().locator(".lfm-canvas button[title=Color]")
        before = colour.evaluate("button => button.style.color")
        self.choose(name)
        self.page.wait_for_function(
            "([button, before]) => button.style.color != before", arg=[colour.element_handle(), before]
        )
        self.page.wait_for_timeout(MILLISECONDS_TO_SETTLE)

    def choose_from(self, label: str, choice: str) -> None:
        """Choose from a list whose label begins so."""
        self._control(label).locator("input").first.click()
        self.page.get_by_role("option", name=choice, exact=True).click()

    def choose_classes(self, *names: str) -> None:
        """Choose these classes alone."""
        box = self._control("Classes")
        while (chosen := box.locator(".token-remove:visible, .token [role=button]:visible")).count():
            chosen.first.click()
        for name in names:
            self.choose_from("Classes", name)
        self.page.keyboard.press("Escape")

    def upload(self, path: Path) -> None:
        """Upload a file, and wait until it is shown."""
        self.panel().locator("input[type=file]").first.set_input_files(str(path))
        self.panel().get_by_text(path.stem).first.wait_for()
        self.page.wait_for_timeout(MILLISECONDS_TO_SETTLE)

    def generate(self) -> tuple[list[bytes], zipfile.ZipFile]:
        """Press the button; returns the files of the images that the page shows, and the archive that it offers."""
        self.panel().get_by_role("button", name="Generate").click()
        download = self.panel().get_by_text("Download all")
        download.wait_for()
        sources = self.panel().locator(".grid-container img").evaluate_all("images => images.map(image => image.src)")
        with self.page.expect_download() as started:
            download.click()
        images = [self.page.request.get(source).body() for source in sources]
        return images, zipfile.ZipFile(io.BytesIO(Path(started.value.path()).read_bytes()))

    def error(self) -> str:
        """Press the button, and return the message that appears; it is closed."""
        self.panel().get_by_role("button", name="Generate").click()
        return self.message()

    def message(self) -> str:
        """Return the message that appears; it is closed."""
        toast = self.page.locator(".toast-body").first
        text = toast.inner_text()
        toast.locator("button").click()
        toast.wait_for(state="detached")
        return text

    def _canvas(self) -> Any:
        return self.panel().locator(".lfm-canvas canvas").first

    def _control(self, label: str) -> Any:
        return self.panel().locator(".block:visible").filter(has_text=re.compile(f"^\\s*{label}")).last

    def wait_for_colour(self, place: tuple[float, float], colour: tuple[int, int, int]) -> None:
        """Wait until the canvas has a colour at a place in fractions of the image."""
        for _ in range(SECONDS):
            image = Image.open(io.BytesIO(self._canvas().screenshot())).convert("RGB")
            side = min(image.size)
            offset = (image.width - side) // 2, (image.height - side) // 2
            shown = image.getpixel((offset[0] + int(place[0] * side), offset[1] + int(place[1] * side)))
            if shown == colour:
                return
            self.page.wait_for_timeout(MILLISECONDS_TO_SETTLE)
        pytest.fail(f"the canvas has the colour {shown} in place of {colour}")

    def paint(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a line on the canvas, from and to points in fractions of the image."""
        canvas = self._canvas()
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        side = min(box["width"], box["height"])  # of the image, in the middle of the canvas
        left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
        self.page.mouse.move(left + start[0] * side, top + start[1] * side)
        self.page.mouse.down()
        self.page.mouse.move(left + end[0] * side, top + end[1] * side, steps=2)
        self.page.mouse.up()


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A new browser; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install lfm[test]")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = program.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(1000 * SECONDS)
        yield Browser(page)
        program.close()
