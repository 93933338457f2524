"""Charts: round ticks, and lines where their points are."""

from xml.etree import ElementTree

import pytest

from spinmeround_jax.results import charts
from spinmeround_jax.results.charts import Line


def test_ticks_are_round_and_inside():
    assert charts.ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert charts.ticks(14.2, 17.9) == [15.0, 16.0, 17.0]
    assert charts.ticks(-0.012, 0.031) == [-0.01, 0.0, 0.01, 0.02, 0.03]
    assert charts.ticks(3.0, 3.0) == [3.0]
    assert charts.log_ticks(-3.2, 1.1) == pytest.approx([0.001, 0.01, 0.1, 1.0, 10.0])
    assert charts.log_ticks(0.0, 1.0) == [1.0, 2.0, 5.0, 10.0]
    assert charts.log_ticks(0.5, 0.52) == charts.ticks(10**0.5, 10**0.52, 4)


def test_lines_are_where_their_points_are_and_words_are_escaped():
    points = [(0, 0.01), (50, 0.1), (100, 1.0)]
    drawn = charts.lines(
        "<loss>", [Line("<b>", points, 0, marks=["<i>"] * 3)], [(50, "50")], log=True
    )
    svg = ElementTree.fromstring(f"<div>{drawn}</div>").find("svg")
    (x0, y0), (x1, y1), (x2, y2) = (
        (float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")
    )
    assert x0 < x1 < x2 and y0 > y1 > y2  # up is less
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1) and x1 == pytest.approx(
        (x0 + x2) / 2, abs=0.1
    )
    assert not any(word in drawn for word in ("<b>", "<i>", "<loss>"))
    # A single value has a place, too.
    ElementTree.fromstring(f"<div>{charts.lines('', [Line('', [(3, 2.0)], 0)], [])}</div>")
