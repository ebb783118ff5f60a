"""The report of `lfm evaluate`: report.json, report.txt with a table, report.png with images and curves, and nearest.png."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from lfm import storage
from lfm.errors import ConfigError, DataError
from pipelines.common import image_files
from pipelines.common.plots import line_plot
from pipelines.evaluation.metric_table import DEVIATION
from pipelines.evaluation.nearest_search import NearestImages

REPORT, TEXT, SHEET, NEAREST = "report.json", "report.txt", "report.png", "nearest.png"
AXES = ("samples_seen", "guidance_scale")  # settings over which metrics are plotted
MIN_PIXELS = 64  # smaller images are enlarged
CAPTION_PIXELS = 14  # height of the distances below the images of nearest.png


def check_folder(out: str, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Check that `out` holds no report, or one with the same settings.

    Raises:
        ConfigError: If it holds the report of other settings.
    """
    path = storage.join(out, REPORT)
    if overwrite or not storage.exists(path):
        return
    try:
        report = storage.read_json(path)
    except DataError:
        return  # damaged: it is written again
    before = report.get("settings") if isinstance(report, dict) else None
    if not isinstance(before, dict) or _with_precision(before) != _with_precision(_as_json(settings)):
        raise ConfigError(
            f"{path}: is the report of other images, settings or metrics; choose another `out`, or set `overwrite`"
        )


def _with_precision(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the precision fp32 to runs in the settings of a report from before precision was recorded."""
    targets = [{"precision": "fp32"} | target if "run" in target else target for target in settings.get("targets", [])]
    return settings | {"targets": targets}


def write(
    out: str,
    content: dict[str, Any],
    shown: list[torch.Tensor],
    neighbours: list[torch.Tensor] | None,
    nearest: list[NearestImages],
) -> str:
    """Write the files, and return the table.

    Args:
        out: Folder of the report.
        content: Content of report.json; its `rows` describe the candidates, and its `metrics` the metrics.
        shown: First images of each candidate, uint8 (n, 3, H, W).
        neighbours: The nearest real image of each of them.
        nearest: The images of each candidate that are nearest to training samples; empty for no such sheet.
    """
    text = table(content)
    storage.write_bytes(storage.join(out, TEXT), (text + "\n").encode())
    image_files.save(sheet(content, shown, neighbours), storage.join(out, SHEET))
    if nearest:
        rows = content["rows"]
        parts = [
            _with_title(label(row, rows), nearest_sheet(images)) for row, images in zip(rows, nearest, strict=True)
        ]
        image_files.save(_stack(parts), storage.join(out, NEAREST))
    storage.write_json(storage.join(out, REPORT), _as_json(content))
    return text


def table(content: dict[str, Any]) -> str:
    """Return a table with a line for each candidate and a column for each metric.

    Below it are the metrics whose lower or higher values are better, and the warnings.
    """
    rows, metrics = content["rows"], content["metrics"]
    lines = [["", "images", *(_with_unit(name, description) for name, description in metrics.items())]]
    for row in rows:
        lines.append([label(row, rows), f"{row['count']:,}", *(_cell(row["metrics"], name) for name in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for direction in ("lower", "higher"):
        names = [name for name, description in metrics.items() if description["better"] == direction]
        if names:
            text.append(f"{direction} is better: {', '.join(names)}")
    if nearest := content["settings"].get("nearest"):
        measures = rows[0]["nearest"]
        text.append(
            f"memorised: nearer to one of {nearest['training']['count']:,} training samples than {measures['quantile']:.0%} "
            f"of {nearest['held_back']['count']:,} held-back images are (distance {measures['features']['threshold']:.4g} "
            f"of features, {measures['latents']['threshold']:.4g} of latents); {measures['quantile']:.0%} is expected of "
            "new images"
        )
    return "\n".join([*text, *dict.fromkeys(warning for row in rows for warning in row["warnings"])])


def _cell(metrics: dict[str, float], name: str) -> str:
    deviation = metrics.get(name + DEVIATION)
    return f"{metrics[name]:.4g}" + (f" +- {deviation:.2g}" if deviation else "")


def label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the name of a candidate, with its guidance scale if that differs between candidates."""
    scales = {other.get("guidance_scale") for other in rows}
    return f"{row['target']}, guidance {row['guidance_scale']:g}" if len(scales) > 1 else row["target"]


def sheet(content: dict[str, Any], shown: list[torch.Tensor], neighbours: list[torch.Tensor] | None) -> Image.Image:
    """Return the first images of each candidate, the real neighbour below each, and curves if the candidates form any."""
    rows, parts = content["rows"], []
    for index, images in enumerate(shown):
        pairs = torch.cat([images, neighbours[index]]) if neighbours else images
        enlarge = max(1, MIN_PIXELS // images.shape[2])
        grid = image_files.grid(pairs.permute(0, 2, 3, 1).numpy(), columns=len(images), enlarge=enlarge)
        parts.append(_with_title(label(rows[index], rows), grid))
    if axis := next((key for key in AXES if len({row.get(key) for row in rows}) > 1), None):
        parts.append(curves(content, axis))
    return _stack(parts)


def _stack(parts: list[Image.Image]) -> Image.Image:
    """Return images below each other."""
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def nearest_sheet(nearest: NearestImages) -> Image.Image:
    """Return rows of generated images, each beside the nearest training samples, with the distances below them."""
    enlarge = max(1, MIN_PIXELS // nearest.images.shape[-1])
    tiles = []
    for images, distances in zip(nearest.images, nearest.distances.tolist(), strict=True):
        row = image_files.grid(images.permute(0, 2, 3, 1).numpy(), columns=3, enlarge=enlarge)
        tile = Image.new("RGB", (row.width + MIN_PIXELS // 4, row.height + CAPTION_PIXELS), "white")
        tile.paste(row, (0, 0))
        drawing = ImageDraw.Draw(tile)
        for column, (distance, threshold) in enumerate(zip(distances, nearest.thresholds.tolist(), strict=True), 1):
            is_copy = distance < threshold
            text, colour = f"{distance:.3g}{' copy' if is_copy else ''}", "red" if is_copy else "black"
            drawing.text((column * row.width // 3 + 2, row.height), text, fill=colour)
        tiles.append(np.asarray(tile))
    sheet = image_files.grid(np.stack(tiles), columns=min(4, len(tiles)))
    return _with_title("generated | nearest training sample by features | by latents; below them the distances", sheet)


def curves(content: dict[str, Any], axis: str) -> Image.Image:
    """Return a plot of each metric over the setting `axis`."""
    plots = []
    for name, description in content["metrics"].items():
        points = sorted((row[axis], row["metrics"][name]) for row in content["rows"])
        plot = line_plot(
            {_with_unit(name, description): points},
            x_label=axis.replace("_", " "),
            title=f"{name}, {description['better']} is better",
            marker="o",
        )
        plots.append(np.asarray(plot))
    return image_files.grid(np.stack(plots), columns=2)


def _with_unit(name: str, description: dict[str, Any]) -> str:
    return f"{name} ({description['unit']})" if description["unit"] else name


def _with_title(title: str, image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (max(image.width, 8 * len(title)), image.height + 24), "white")
    ImageDraw.Draw(canvas).text((4, 6), title, fill="black")
    canvas.paste(image, (0, 20))
    return canvas


def _as_json(content: Any) -> Any:
    """Return what reading the written JSON would return."""
    return storage.as_stored(content)
