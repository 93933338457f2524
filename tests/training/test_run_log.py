"""The log of a run and its page: whole after kills and resumes, and safe to open."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax.training import run_log
from tests.support.configs import micro_config


@pytest.fixture
def clock(monkeypatch):
    """Seconds since 1970 that the test sets."""
    now = [1_700_000_000.0]
    monkeypatch.setattr(run_log.time, "time", lambda: now[0])
    return now


def open_log(workdir, **changes):
    workdir.mkdir(exist_ok=True)
    return run_log.RunLog(workdir, micro_config("data", **changes))


def losses(log):
    return [(e["step"], e["metrics"]["loss"]) for e in log.entries if e["name"] == "diffusion"]


def test_steps_after_the_restored_one_are_logged_again_and_a_cut_line_is_dropped(tmp_path):
    log = open_log(tmp_path)
    log.metrics("autoencoder", 9, {"loss": 9.0})
    for step in (1, 2, 3):
        log.metrics("diffusion", step, {"loss": float(step), "other": np.inf})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # killed while step 3 was written

    log = open_log(tmp_path)
    assert losses(log) == [(1, 1.0), (2, 2.0)]
    log.begin("diffusion", 1)
    log.metrics("diffusion", 2, {"loss": 2.5})
    log.close()
    again = open_log(tmp_path)
    assert losses(again) == losses(log) == [(1, 1.0), (2, 2.5)]
    assert [e["step"] for e in again.entries if e["name"] == "autoencoder"] == [9]
    assert sum(e["name"] == run_log.START for e in again.entries) == 3


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", '{"time": 0}', '{"time": 0, "name": "x", "step": 1, "metrics": {"a": "b"}}']
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line):
    open_log(tmp_path).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 \(move the file away"):
        open_log(tmp_path)


def test_goodput_counts_kept_steps_over_all_time_since_the_first_start(tmp_path, clock):
    log = open_log(tmp_path)
    clock[0] += 100
    log.metrics("diffusion", 10, {"seconds_in_steps": 60.0})
    log.metrics("diffusion", 20, {"seconds_in_steps": 20.0})
    assert log.goodput() == pytest.approx(0.8)
    log.close()
    clock[0] += 50  # stopped
    log = open_log(tmp_path)
    log.begin("diffusion", 10)  # step 20 had no checkpoint
    assert log.goodput() == pytest.approx(60 / 150)
    assert log.goodput(seconds=30.0) == pytest.approx(90 / 150)
    clock[0] -= 1000  # the clock was set back
    assert 0.0 <= log.goodput() <= 1.0


class Page(HTMLParser):
    """What a page holds: tags, addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_curves_samples_and_changes_and_loads_nothing(tmp_path):
    log = open_log(tmp_path, name="<script>alert(1)</script>")
    for step in range(1, 1001):
        log.metrics("diffusion", step, {"loss": 1.0 / step, "held_out_10": 2.0, "train_10": 1.0})
    for step in [*range(100, 1300, 100)]:
        log.image("anchors", step, Image.new("RGB", (2000, 300)))
    (tmp_path / "samples" / "anchors_0001000.png").write_bytes(b"cut")
    (tmp_path / "samples" / "anchors_x.png").write_bytes(b"")
    log.report([{"step": 500, "change": "optimizer.learning_rate: <b> -> 1"}])
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "b" not in page.tags
    assert "Training of <script>" in page.text and "optimizer.learning_rate: <b> -> 1" in page.text
    links = [a for a in page.addresses if not a.startswith("data:image/webp;base64,")]
    assert all((tmp_path / a).is_file() for a in links)
    # Not those of steps that were undone, nor the damaged one, which would be the newest.
    assert links[-1] == "samples/anchors_0000100.png" and "anchors_0001000" not in text
    assert len(links) == 7 and "anchors_0001100" not in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(text) < 200_000  # a thousand steps are drawn as some hundred points
    log.close()


def test_a_page_without_any_step(tmp_path):
    log = open_log(tmp_path)
    log.report([])
    assert "Config" in Page((tmp_path / "report.html").read_text()).text
    log.begin("diffusion", 0)
    log.metrics("diffusion", 1, {"loss": -1.0})  # no logarithm
    log.report([])
    log.close()
