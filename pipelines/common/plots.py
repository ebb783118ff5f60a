"""Line plots as images, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image


def line_plot(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    title: str | None = None,
    marker: str | None = None,
    width: int = 640,
    height: int = 360,
) -> Image.Image:
    """Plot curves over a common horizontal axis.

    Args:
        curves: points (x, y) of each curve by its name, which the legend shows.
        x_label: label of the horizontal axis.
        title: title of the plot.
        marker: matplotlib's marker of each point, such as "o"; by default none.
        width: width of the image in pixels.
        height: height of the image in pixels.

    Returns:
        The plot; its vertical axis is logarithmic if all values are positive and the largest exceeds three times the
        smallest.
    """
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    values = [y for points in curves.values() for _, y in points]
    for name, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, marker=marker)
    if min(values) > 0 and max(values) > 3 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 0.5 in place of a power of ten
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(visible=True, which="both", alpha=0.3)
    if title:
        axes.set_title(title)
    if len(curves) > 1:
        axes.legend()
    else:
        axes.set_ylabel(next(iter(curves)))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
