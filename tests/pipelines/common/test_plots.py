"""Tests of line plots."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.common.plots import line_plot

CURVES = {
    "falling": [(1.0, 2.0), (2.0, 0.1)],
    "with zero": [(0.0, 0.0), (5.0, 1.0)],
    "negative": [(0.0, -1.0), (5.0, 1.0)],
    "constant": [(0.0, 3.0), (5.0, 3.0)],
    "one point": [(3.0, 0.5)],
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_drawn_at_the_size_that_is_asked_for(name: str) -> None:
    plot = line_plot({name: CURVES[name]}, x_label="samples seen", marker="o", width=320, height=200)
    assert plot.size == (320, 200) and plot.mode == "RGB"
    assert np.asarray(plot).reshape(-1, 3).std(axis=1).max() > 20, "no coloured line"


def test_several_curves_have_a_legend() -> None:
    one = np.asarray(line_plot({"falling": CURVES["falling"]}, x_label="x", title="loss"))
    both = np.asarray(line_plot(CURVES, x_label="x", title="loss"))
    colours = [len(np.unique(plot.reshape(-1, 3), axis=0)) for plot in (one, both)]
    assert colours[1] > colours[0]
