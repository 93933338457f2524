"""What is measured of views, how it is summed up, and the plots."""

import argparse
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from spinmeround_jax import metrics
from spinmeround_jax.evaluation import charts, fid, frechet, measures, results
from spinmeround_jax.evaluation.measures import Instruments, Score, Views
from spinmeround_jax.evaluation.parts import Parts


def views(seed, subjects=2, count=3, size=16):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (subjects, count, size, size, 3)).astype(np.float32)
    normals = rng.standard_normal(images.shape)
    return Views(images, normals, np.ones(images.shape[:-1], bool))


def test_measures_are_those_of_each_view():
    made, truth = views(0), views(1)
    tools = Instruments(("psnr", "l2", "normals"), [], {}, None, {})
    found = measures.compare(made, truth, tools)
    assert set(found) == {"psnr", "l2", "normals"}
    one = metrics.psnr(made.images[1, 2], truth.images[1, 2])
    assert found["psnr"][1, 2] == pytest.approx(float(one))
    np.testing.assert_allclose(found["l2"], 10 ** (-found["psnr"] / 10), rtol=1e-6)
    without = Views(made.images, None, made.mask)
    assert set(measures.compare(without, truth, tools)) == {"psnr", "l2"}


class Faces:
    """Stands for a recognition model: faces are where the first pixel is bright."""

    def find(self, images):
        landmarks5 = np.zeros((*images.shape[:-3], 5, 2))
        landmarks5[images[..., 0, 0, 0] < 0] = np.nan
        return landmarks5

    def embed(self, images, landmarks5):
        vectors = images.mean((-3, -2))
        return np.where(np.isnan(landmarks5[..., 0, :1]), np.nan, vectors)


def test_faces_are_recognised_where_the_true_view_has_one():
    made, truth = views(0), views(1)
    truth.images[0, :, 0, 0, 0] = (1.0, -1.0, 1.0)
    made.images[0, :2] = truth.images[0, :2]
    tools = Instruments(("arcface",), [], {"arcface": Faces()}, None, {})
    found = measures.compare(made, tools.looked_at(truth), tools)["arcface"]
    assert found[0, 0] == pytest.approx(1.0) and np.isnan(found[0, 1]) and found[0, 2] < 1.0
    score = Score("m", "model", {"arcface": found})
    np.testing.assert_allclose(score.per_subject("arcface")[0], np.nanmean(found[0]))


def test_fid_is_over_all_pictures_of_a_row(tmp_path):
    strips = [
        [("true", pictures(i)), ("m", pictures(i + 9)), ("m, normals", pictures(99))]
        for i in range(2)
    ]

    def inception(images):
        return images.mean((-3, -2))

    tools = Instruments(("fid",), [], {}, inception, {"fid": "x"})
    kept = Parts(tmp_path, {})
    score = Score("m", "model", {"psnr": np.zeros(2)})
    (found,) = frechet.added([score], strips.__getitem__, 2, tools, kept)
    sides = [
        np.concatenate([dict(strip)[name] for strip in strips]) / np.float32(127.5) - 1.0
        for name in ("m", "true")
    ]
    expected = fid.frechet_distance(*(inception(side) for side in sides))
    assert found.values["fid"].tolist() == [pytest.approx(expected)] and expected > 0
    assert results.cell(found.per_subject("fid"), 4) == f"{expected:.4f}"  # no error to tell

    few = frechet.added([score], lambda i: [(n, p[:1]) for n, p in strips[i]], 1, tools, kept)
    assert "fid" not in few[0].values
    assert "needs more than 3 images" in tools.notes[0]


def pictures(seed):
    return np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)


def test_what_cannot_be_measured_says_what_to_pass():
    args = argparse.Namespace(
        recognition=None, second_recognition=None, inception=None, models=None, skip=["ssim"]
    )
    found = measures.choose(args, 16)
    assert "psnr" in found.wanted and "ssim" not in found.wanted and "lpips" not in found.wanted
    assert "ArcFace similarity needs --recognition MODEL" in found.notes
    assert not any("SSIM" in note for note in found.notes)  # nobody asked for it
    assert "lpips_vgg" in measures.choose(args, 32).wanted


def test_summary_is_of_the_subjects_that_were_measured():
    values = np.array([1.0, 2.0, np.nan, 6.0])
    found = results.summarise(values)
    assert found.mean == 3.0 and found.subjects == 3
    assert found.error == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert 1.0 <= found.low < 3.0 < found.high <= 6.0
    assert found == results.summarise(values)
    alone = results.summarise(values[:1])
    assert alone.mean == 1.0 and np.isnan(alone.error)
    assert results.cell(values, 1) == "3.0 ± 1.5" and results.cell(None, 1) == "-"
    # Of many normal numbers the interval is that of the textbook.
    many = np.random.default_rng(1).standard_normal(400)
    width = results.summarise(many).high - results.summarise(many).low
    assert width == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_plots_show_every_row_where_it_is():
    scores = [
        Score("<a>", "model", {"psnr": np.array([[10.0, 12.0], [14.0, 16.0]])}),
        Score("b", "reference", {"psnr": np.array([[20.0, 20.0], [20.0, 20.0]])}),
    ]
    drawn = charts.rows(measures.PSNR, scores)
    svg = ElementTree.fromstring(drawn)
    dots = [float(c.get("cx")) for c in svg.iter("circle")]
    assert len(dots) == 6 and dots[2] == pytest.approx((dots[0] + dots[1]) / 2)  # a's mean
    assert all(0 <= x <= charts.WIDTH for x in dots) and max(dots) == dots[5]
    assert "&lt;a&gt;" in drawn

    drawn = charts.over_yaw(measures.PSNR, scores, np.array([90.0, -90.0]))
    svg = ElementTree.fromstring(f"<div>{drawn}</div>").find("svg")
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    assert points[0][0] < points[1][0] and points[0][1] < points[1][1]  # -90° first: 14, then 12
    assert len(re.findall('class="c0 band"', drawn)) == 1 and "c1 band" not in drawn
    lacking = [Score("a", "model", {"psnr": np.full((2, 2), np.nan)})]
    assert charts.over_yaw(measures.PSNR, lacking, np.array([90.0, -90.0])) == ""
