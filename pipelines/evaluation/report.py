"""The report of `lfm evaluate`: report.json with everything, report.txt with a table, report.png with images and curves."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import torch
from PIL import Image, ImageDraw

from lfm import storage
from lfm.errors import ConfigError
from pipelines.common import image_files

REPORT, TABLE, SHEET = "report.json", "report.txt", "report.png"
AXES = ("samples_seen", "guidance_scale")  # settings over which metrics are plotted
MIN_PIXELS = 64  # smaller images are enlarged
DEVIATION = " deviation"  # suffix of the standard deviation of a metric


def check_folder(out: str, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Check that `out` holds no report, or one with the same settings.

    Raises:
        ConfigError: If it holds the report of other settings; names one that differs.
    """
    path = storage.join(out, REPORT)
    if overwrite or not storage.exists(path):
        return
    report = storage.read_json(path)
    before = report.get("settings") if isinstance(report, dict) else None
    if before != _as_json(settings):
        raise ConfigError(
            f"{path}: is the report of other images, settings or metrics; choose another `out`, or set `overwrite`"
        )


def write(out: str, content: dict[str, Any], shown: list[torch.Tensor], neighbours: list[torch.Tensor] | None) -> str:
    """Write the three files, and return the table.

    Args:
        out: Folder of the report.
        content: Content of report.json; its `rows` describe the candidates.
        shown: First images of each candidate, uint8 (n, 3, H, W).
        neighbours: The nearest real image of each of them.
    """
    text = table(content["rows"])
    storage.write_bytes(storage.join(out, TABLE), (text + "\n").encode())
    image_files.save(sheet(content["rows"], shown, neighbours), storage.join(out, SHEET))
    storage.write_json(storage.join(out, REPORT), _as_json(content))
    return text


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with a line for each candidate and a column for each metric, followed by the warnings."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"] if not name.endswith(DEVIATION)))
    lines = [["", "images", *names]]
    for row in rows:
        lines.append([label(row, rows), f"{row['count']:,}", *(_cell(row["metrics"], name) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, *dict.fromkeys(warning for row in rows for warning in row["warnings"])])


def _cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    deviation = metrics.get(name + DEVIATION)
    return f"{metrics[name]:.4g}" + (f" +- {deviation:.2g}" if deviation else "")


def label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the name of a candidate, with its guidance scale if that differs between candidates."""
    scales = {other.get("guidance_scale") for other in rows}
    return f"{row['target']}, guidance {row['guidance_scale']:g}" if len(scales) > 1 else row["target"]


def sheet(rows: list[dict[str, Any]], shown: list[torch.Tensor], neighbours: list[torch.Tensor] | None) -> Image.Image:
    """Return the first images of each candidate, the real neighbour below each, and curves if the candidates form any."""
    parts = []
    for index, images in enumerate(shown):
        pairs = torch.cat([images, neighbours[index]]) if neighbours else images
        enlarge = max(1, MIN_PIXELS // images.shape[2])
        grid = image_files.grid(pairs.permute(0, 2, 3, 1).numpy(), columns=len(images), enlarge=enlarge)
        parts.append(_with_title(label(rows[index], rows), grid))
    if axis := next((key for key in AXES if len({row.get(key) for row in rows}) > 1), None):
        parts.append(curves(rows, axis))
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def curves(rows: list[dict[str, Any]], axis: str) -> Image.Image:
    """Return plots of each metric over the setting `axis`, with the standard deviation where the metric has one."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    rows = sorted(rows, key=lambda row: row[axis])
    positions = [row[axis] for row in rows]
    names = [name for name in rows[0]["metrics"] if not name.endswith(DEVIATION)]
    num_rows = math.ceil(len(names) / 2)
    figure = Figure(figsize=(10, 2.5 * num_rows), dpi=100, layout="constrained")
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(num_rows, 2, number, title=name, xlabel=axis.replace("_", " "))
        deviations = [row["metrics"].get(name + DEVIATION, 0.0) for row in rows]
        axes.errorbar(positions, [row["metrics"][name] for row in rows], deviations, marker="o", capsize=3)
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _with_title(title: str, image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (max(image.width, 8 * len(title)), image.height + 24), "white")
    ImageDraw.Draw(canvas).text((4, 6), title, fill="black")
    canvas.paste(image, (0, 20))
    return canvas


def _as_json(content: Any) -> Any:
    """Return what reading the written JSON would return."""
    return json.loads(json.dumps(content))
