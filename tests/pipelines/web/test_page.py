"""The page of `lfm ui` in a browser: what is painted there is what models get, and images are those of `lfm sample`."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm.synthetic.scenes import SEGMENT_NAMES
from pipelines.common import image_files
from pipelines.web.canvas import palette
from tests.support.browser import Browser, page_server
from tests.support.commands import Tasks, lfm

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STEPS = "2"


@pytest.fixture(scope="module")
def address(tasks: Tasks) -> Iterator[str]:
    """The page of a run of each condition."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install lfm[ui]")
    with page_server([tasks.runs / name for name in ("class", "inpaint", "semantic", "both", "none")]) as address:
        yield address


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Browser]:
    """The page, which asks no other host for anything, however it is used."""
    browser.open(address)
    yield browser
    assert browser.hosts == {address.removeprefix("http://")}


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("0*.png")}


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def test_the_class_grid_is_that_of_lfm_sample_byte_for_byte(page: Browser, tasks: Tasks, tmp_path: Path) -> None:
    page.choose_tab("class")
    page.set("Seeds", "3,5-6")
    page.set("Number of steps", STEPS)
    page.set("Guidance scale", "2.5")
    page.choose_classes("star", "disc")
    page.choose("Show the trajectory")
    shown, archive = page.generate()
    assert len(shown) == 6
    for column, name in enumerate(("star", "disc")):
        out = tmp_path / name
        options = ("--class", name, "--seeds", "3,5-6", "--num-steps", STEPS, "--guidance-scale", "2.5")
        assert lfm("sample", tasks.runs / "class", "--out", out, *options).exit_code == 0
        expected = images_of(out)
        assert [pixels(image).tolist() for image in shown[column::2]] == [
            pixels(expected[f"{seed:06d}.png"]).tolist() for seed in (3, 5, 6)
        ]
        assert shown[column::2] == [expected[f"{seed:06d}.png"] for seed in (3, 5, 6)]  # with their notes
    assert "trajectory.png" in archive.namelist()
    assert page.panel().get_by_text("6 images of 16 x 16 pixels, heun in 2 steps, fp32, 8 network").is_visible()


def test_painted_pixels_are_filled_and_known_ones_stay(page: Browser, tasks: Tasks, tmp_path: Path) -> None:
    image = next((tasks.scenes / "images").rglob("*.png"))
    page.choose_tab("inpaint")
    page.upload(image)
    page.paint((0.2, 0.3), (0.8, 0.3))
    page.set("Seeds", "0-2")
    page.set("Number of steps", STEPS)
    shown, archive = page.generate()
    mask = pixels(archive.read("mask.png"))
    known, original = mask == 0, pixels(image.read_bytes())
    assert 0.02 < 1 - known.mean() < 0.5 and not known[int(0.3 * 16), 3:13].any(), "the stroke is the mask"
    assert known[8:].all()
    assert np.array_equal(pixels(archive.read("image.png")), original)
    assert len(shown) == 3
    for content in shown:
        assert np.array_equal(pixels(content)[known], original[known])
        assert not np.array_equal(pixels(content)[~known], original[~known])
    archive.extractall(tmp_path)
    options = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--seeds", "0-2")
    run = tasks.runs / "inpaint"
    assert lfm("sample", run, "--out", tmp_path / "out", *options, "--num-steps", STEPS).exit_code == 0
    assert [pixels(content).tolist() for content in shown] == [
        pixels(content).tolist() for _, content in sorted(images_of(tmp_path / "out").items())
    ]


def test_a_painted_map_is_the_segmentation(page: Browser, tasks: Tasks, tmp_path: Path) -> None:
    page.choose_tab("semantic")
    page.choose_label("ground")
    page.panel().get_by_role("button", name="Fill the map").click()
    ground, star, disc = (SEGMENT_NAMES.index(name) for name in ("ground", "star", "disc"))
    colours = palette(dict(enumerate(SEGMENT_NAMES)))
    page.wait_for_colour((0.5, 0.5), colours[ground])
    for label, height in {star: 4.5 / 16, disc: 12.5 / 16}.items():
        page.choose_label(SEGMENT_NAMES[label])
        page.paint((0.2, height), (0.8, height))
        page.wait_for_colour((0.5, height), colours[label])
    page.set("Seeds", "4")
    page.set("Number of steps", STEPS)
    shown, archive = page.generate()
    ids = pixels(archive.read("segmentation.png"))
    assert set(np.unique(ids).tolist()) == {ground, star, disc}
    assert (ids[4, 4:12] == star).all() and (ids[12, 4:12] == disc).all() and (ids[8] == ground).all()
    (tmp_path / "map.png").write_bytes(archive.read("segmentation.png"))
    options = ("--segmentation", tmp_path / "map.png", "--seeds", "4", "--num-steps", STEPS)
    assert lfm("sample", tasks.runs / "semantic", "--out", tmp_path / "out", *options).exit_code == 0
    assert [pixels(content).tolist() for content in shown] == [
        pixels((tmp_path / "out" / "000004.png").read_bytes()).tolist()
    ]


def test_an_uploaded_map_is_the_segmentation(page: Browser, tasks: Tasks) -> None:
    segmentation = next((tasks.scenes / "segmentations").rglob("*.png"))
    page.choose_tab("semantic")
    page.upload(segmentation)
    page.set("Seeds", "4")
    page.set("Number of steps", STEPS)
    _, archive = page.generate()
    assert np.array_equal(pixels(archive.read("segmentation.png")), pixels(segmentation.read_bytes()))


def test_other_addresses_of_the_machine_are_not_served(address: str) -> None:
    port = int(address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):  # who listens on every address also listens on this one
        socket.create_connection(("127.0.0.2", port))


def test_controls_follow_the_condition_and_the_solver(page: Browser) -> None:
    expected = {
        "class": {"Classes"},
        "inpaint": {"Image to fill", "Paint over"},
        "semantic": {"Map of class ids", "Label to paint"},
        "both": {"Classes", "Image to fill", "Paint over"},
        "none": set(),
    }
    every = set().union(*expected.values())
    for run, labels in expected.items():
        page.choose_tab(run)
        page.panel().get_by_role("button", name="Generate").wait_for()
        for label in every:
            assert page.panel().get_by_text(label).first.is_visible() == (label in labels), f"{run}: {label}"
        assert page.panel().get_by_text("Guidance scale").first.is_visible() == (run != "none")
    page.choose_from("Solver", "dopri5")
    page.panel().get_by_text("Number of steps").first.wait_for(state="hidden")


def test_mistakes_are_one_line_on_the_page(page: Browser, tmp_path: Path) -> None:
    page.choose_tab("none")
    page.set("Seeds", "3-1")
    assert "the range 3-1 is empty" in page.error()
    page.set("Seeds", "0-999")
    assert "at most 256 at once" in page.error()
    page.choose_tab("inpaint")
    assert "upload an image to fill" in page.error()
    (tmp_path / "text.png").write_text("no image")
    page.upload(tmp_path / "text.png")
    assert "text.png: not an image" in page.message()


def test_a_request_can_be_stopped(page: Browser) -> None:
    page.choose_tab("none")
    page.set("Number of steps", "250")
    page.set("Seeds", "0-255")
    page.panel().get_by_role("button", name="Generate").click()
    page.panel().get_by_text("solving").first.wait_for()
    page.panel().get_by_role("button", name="Stop").click()
    assert "stopped" in page.message()


def test_downloaded_images_say_how_they_were_made(page: Browser, tmp_path: Path) -> None:
    page.choose_tab("both")
    path = tmp_path / "wide.png"
    Image.fromarray(np.arange(30 * 50 * 3, dtype=np.uint32).reshape(30, 50, 3).astype(np.uint8)).save(path)
    page.upload(path)
    page.paint((0.3, 0.5), (0.7, 0.5))
    page.set("Seeds", "7")
    page.set("Number of steps", STEPS)
    _, archive = page.generate()
    archive.extractall(tmp_path)
    (image, *_) = sorted(tmp_path.glob("000007*.png"))
    report = lfm("inspect", image).stdout
    assert "seed 7" in report and "--image image.png --mask mask.png" in report
    assert image_files.note(str(image))["options"]["class_index"] == "0"
