"""What `lfm evaluate` leaves behind: report.json with everything, report.txt with a table, and report.png to look at."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from lfm import storage
from lfm.errors import ConfigError
from pipelines.common import image_files

REPORT, TABLE, IMAGE = "report.json", "report.txt", "report.png"
PLOT = (480, 200)  # width and height of a curve in pixels
MARGIN = 44
AXES = ("samples_seen", "guidance_scale")  # what a curve may go over
INK, LINE = (40, 40, 40), (31, 119, 180)


def claim(out: str, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that holds the report of something else.

    Raises:
        ConfigError: names what differs.
    """
    path = storage.join(out, REPORT)
    if overwrite or not storage.exists(path):
        return
    before = storage.read_json(path)
    if not isinstance(before, dict) or before.get("settings") != _as_json(settings):
        raise ConfigError(
            f"{path}: is the report of other images, settings or metrics; choose another --out, or --overwrite"
        )


def write(out: str, content: dict[str, Any], shown: list[torch.Tensor], neighbours: list[torch.Tensor] | None) -> str:
    """Publish the three files; returns the table.

    Args:
        content: of report.json; its `rows` are the targets'.
        shown: the first images of each target, uint8 (n, 3, H, W).
        neighbours: the real images nearest to them.
    """
    text = table(content["rows"])
    storage.write_bytes(storage.join(out, TABLE), (text + "\n").encode())
    image_files.save(image(content["rows"], shown, neighbours), storage.join(out, IMAGE))
    storage.write_json(storage.join(out, REPORT), _as_json(content))
    return text


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each target, a column for each metric, and the warnings below."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"] if "deviation" not in name))
    lines = [["", "pictures", *names]]
    for row in rows:
        figures = [_figure(row["metrics"], name) for name in names]
        lines.append([label(row, rows), f"{row['count']:,}", *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, *dict.fromkeys(warning for row in rows for warning in row["warnings"])])


def _figure(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    deviation = metrics.get(f"{name} deviation")
    return f"{metrics[name]:.4g}" + (f" +- {deviation:.2g}" if deviation else "")


def label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A target's name, and the guidance scale where that differs."""
    scales = {other.get("guidance_scale") for other in rows}
    return f"{row['target']}, guidance {row['guidance_scale']:g}" if len(scales) > 1 else row["target"]


def image(rows: list[dict[str, Any]], shown: list[torch.Tensor], neighbours: list[torch.Tensor] | None) -> Image.Image:
    """Each target's first images, under each the real one nearest to it; curves of the metrics over checkpoints or scales."""
    parts = []
    for index, images in enumerate(shown):
        lines = [images, neighbours[index]] if neighbours else [images]
        stacked = torch.cat(lines).permute(0, 2, 3, 1).numpy()
        enlarge = max(1, 64 // images.shape[2])
        parts.append(_titled(label(rows[index], rows), image_files.grid(stacked, columns=len(images), enlarge=enlarge)))
    if axis := next((key for key in AXES if len({row.get(key) for row in rows}) > 1), None):
        at = [float(row[axis]) for row in rows]
        names = [name for name in rows[0]["metrics"] if "deviation" not in name]
        curves = [
            curve(f"{name} over {axis.replace('_', ' ')}", at, [r["metrics"][name] for r in rows]) for name in names
        ]
        parts.append(image_files.grid(np.stack([np.asarray(image) for image in curves]), columns=2))
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def curve(title: str, at: list[float], values: list[float]) -> Image.Image:
    """Values over places, as a line with its ends named."""
    image = Image.new("RGB", PLOT, "white")
    draw = ImageDraw.Draw(image)
    width, height = PLOT[0] - 2 * MARGIN, PLOT[1] - 2 * MARGIN
    x, y = (_unit(np.asarray(numbers)) for numbers in (at, values))
    points = [(MARGIN + width * a, MARGIN + height * (1 - b)) for a, b in sorted(zip(x, y, strict=True))]
    draw.text((MARGIN, 12), title, fill=INK)
    draw.rectangle((MARGIN, MARGIN, MARGIN + width, MARGIN + height), outline=INK)
    draw.line(points, fill=LINE, width=2)
    for point in points:
        draw.ellipse((point[0] - 3, point[1] - 3, point[0] + 3, point[1] + 3), fill=LINE)
    for number, place in ((max(values), (2, MARGIN - 6)), (min(values), (2, MARGIN + height - 6))):
        draw.text(place, f"{number:.3g}", fill=INK)
    for number, place in ((min(at), (MARGIN, PLOT[1] - 30)), (max(at), (PLOT[0] - MARGIN - 30, PLOT[1] - 30))):
        draw.text(place, f"{number:,.6g}", fill=INK)
    return image


def _unit(numbers: np.ndarray) -> np.ndarray:
    """Numbers moved to [0, 1]."""
    return (numbers - numbers.min()) / (np.ptp(numbers) or 1.0)


def _titled(title: str, image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (max(image.width, 8 * len(title)), image.height + 24), "white")
    ImageDraw.Draw(canvas).text((4, 6), title, fill=INK)
    canvas.paste(image, (0, 20))
    return canvas


def _as_json(content: Any) -> Any:
    """As it reads back: no tuples."""
    return json.loads(json.dumps(content))
