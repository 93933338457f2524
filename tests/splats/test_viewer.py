"""The viewer page: what is written into it, and what a browser makes of it (headless Chromium)."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.splats import ply, viewer
from spinmeround_jax.splats.gaussians import Gaussians
from spinmeround_jax.splats.rasterise import render
from tests.support import browser, splat_scenes

SIZE = 128
FILES = pathlib.Path(viewer.__file__).parent / "viewer_files"
needs_chromium = pytest.mark.skipif(
    browser.find() is None, reason="no Chromium: apt install chromium, or set CHROMIUM"
)


def ball(n: int = 1500, colours: bool = True) -> Gaussians:
    """An egg of n Gaussians, coloured by direction: no two sides look alike."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    values = (
        directions * [0.16, 0.22, 0.18],
        np.full((n, 3), np.log(0.012)),
        rng.normal(size=(n, 4)),
        np.full(n, 4.0),
        directions[:, None] * 1.5 * colours,
    )
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in values))


@jax.jit
def _draw(gaussians: Gaussians, pose: jax.Array) -> dict[str, jax.Array]:
    return render(gaussians, pose, cameras.FOCAL * SIZE, SIZE, capacity=1024)


def drawn(gaussians: Gaussians, yaw: float, pitch: float) -> np.ndarray:
    """(SIZE, SIZE, 3) in [0, 1] by our own rasteriser, from where the page's camera stands."""
    told = _draw(gaussians, jnp.asarray(cameras.orbit(yaw, pitch)))
    assert told["overflow"] == 0
    return np.clip(np.asarray(told["rgb"]), 0.0, 1.0)


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.Browser(browser.find(), tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def show(
    window: browser.Browser, page: pathlib.Path, view: str = "", bare: bool = True
) -> np.ndarray:
    """Open a page at `#view`, without its title and buttons if `bare`; (SIZE, SIZE, 3) in [0, 1]."""
    window.urls.clear()
    window.complaints.clear()
    window.open("about:blank", SIZE, SIZE)
    window.open(page.as_uri() + view, SIZE, SIZE)
    settled(window)
    if bare:
        window.evaluate("document.querySelectorAll('h1, footer').forEach((e) => e.remove())")
    return look(window)


def settled(window: browser.Browser) -> None:
    window.wait_for("['still', 'failed'].includes(document.documentElement?.dataset.state)")


def look(window: browser.Browser) -> np.ndarray:
    return window.screenshot().astype(np.float64) / 255.0


# --------------------------------------------------------------------------------------------------
# What a person sees


@needs_chromium
def test_the_page_draws_what_the_fit_draws(window, tmp_path):
    page = tmp_path / "head.html"
    viewer.write_page(page, gaussians := ball(), "head")
    pictures = []
    for yaw, pitch in ((0.0, 0.0), (70.0, 25.0)):
        pictures.append(show(window, page, f"#yaw={yaw}&pitch={pitch}"))
        truth = drawn(gaussians, yaw, pitch)
        assert abs(pictures[-1] - truth).mean() < 0.01
        assert abs(1.0 - truth).mean() > 0.1  # there is something to get wrong
    assert abs(pictures[0] - pictures[1]).mean() > 0.05
    assert not window.complaints


@needs_chromium
def test_colours_that_depend_on_the_view(window, tmp_path):
    rng = np.random.default_rng(0)
    sh = np.zeros((600, 16, 3), np.float32)
    sh[:, 1:] = 0.6 * rng.normal(size=sh.shape[1:])[1:]
    gaussians = dataclasses.replace(ball(600, colours=False), sh=jnp.asarray(sh))
    page = tmp_path / "head.html"
    viewer.write_page(page, gaussians, "head")
    pictures = []
    for yaw, pitch in ((0.0, 0.0), (130.0, -20.0)):
        pictures.append(show(window, page, f"#yaw={yaw}&pitch={pitch}"))
        assert abs(pictures[-1] - drawn(gaussians, yaw, pitch)).mean() < 0.02
    middle = np.s_[SIZE // 2 - 4 : SIZE // 2 + 4, SIZE // 2 - 4 : SIZE // 2 + 4]
    assert abs(pictures[0][middle].mean((0, 1)) - pictures[1][middle].mean((0, 1))).max() > 0.1


@needs_chromium
def test_mouse_wheel_keys_and_buttons(window, tmp_path):
    page = tmp_path / "head.html"
    viewer.write_page(page, ball(), "head")
    front = show(window, page, bare=False)
    near = "Math.abs(document.documentElement.dataset.{} - ({})) < 0.1"

    window.mouse("mousePressed", 64, 20)
    window.mouse("mouseMoved", 96, 28)  # a quarter of the window: 45 degrees
    window.mouse("mouseReleased", 96, 28)
    window.wait_for(near.format("yaw", -45.0) + " && " + near.format("pitch", 11.25))
    settled(window)
    turned = look(window)
    assert abs(turned - front).mean() > 0.03

    window.key("ArrowLeft")
    window.wait_for(near.format("yaw", -40.0))
    window.evaluate("document.getElementById('reset').click()")
    settled(window)
    inside = np.s_[8:-8, 8:-8]  # of the frame that shows the focus
    # Not to each pixel: discs of nearly one depth may have changed places.
    assert abs(look(window)[inside] - front[inside]).mean() < 0.005

    window.mouse("mouseWheel", 64, 20, deltaX=0, deltaY=400)
    window.wait_for("document.documentElement.dataset.state === 'drawing'")
    window.wait_for("document.documentElement.dataset.state === 'still'")
    assert (look(window) < 0.9).sum() < 0.95 * (front < 0.9).sum()  # smaller

    window.evaluate("document.getElementById('spin').click()")
    window.wait_for("document.documentElement.dataset.yaw > 3")
    window.evaluate("document.getElementById('spin').click()")
    settled(window)


@needs_chromium
def test_nothing_is_loaded_and_nothing_runs_but_our_scripts(window, tmp_path):
    run = "document.title='run'"
    title = f'</title></h1><script>{run}</script><img src=x onerror="{run}">[[splats]]'
    page = tmp_path / "head #1 %20 ü.html"
    viewer.write_page(page, ball(50), title)
    show(window, page)
    assert window.evaluate("document.title") == title
    assert {url.partition(":")[0] for url in window.urls} <= {"file", "blob", "data", "about"}
    window.evaluate("fetch('http://127.0.0.1:9/x').catch((e) => { document.title = 'refused' })")
    window.wait_for("document.title === 'refused'")
    assert any("Content Security Policy" in complaint for complaint in window.complaints)


@needs_chromium
def test_damaged_page_says_so(window, tmp_path):
    page = tmp_path / "head.html"
    viewer.write_page(page, ball(50), "head")
    text = page.read_text()
    page.write_text(re.sub(r'(id="splats">)[^<]+', r"\1????", text))
    show(window, page, bare=False)
    assert window.evaluate("document.documentElement.dataset.state") == "failed"
    assert "could not start" in window.evaluate("document.getElementById('message').textContent")


# --------------------------------------------------------------------------------------------------
# What is written


def test_a_ply_gives_the_same_page_as_its_gaussians(tmp_path):
    gaussians = splat_scenes.random_gaussians(degree=2)
    ply.write_ply(tmp_path / "splats.ply", gaussians)
    viewer.write_page(tmp_path / "a.html", tmp_path / "splats.ply", "head")
    viewer.write_page(tmp_path / "b.html", gaussians, "head")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html", "splats.ply"]


def test_the_page_is_self_contained_and_carries_the_licence(tmp_path):
    viewer.write_page(tmp_path / "a.html", splat_scenes.random_gaussians(), "A & <B>")
    text = (tmp_path / "a.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|blob:)""", text.split("<script>")[0])
    assert "<title>A &amp; &lt;B&gt;</title>" in text and "[[" not in text.split("<script>")[0]
    assert "Permission is hereby granted" in text and "PlayCanvas Ltd" in text


def test_the_renderer_is_the_one_that_the_notice_names():
    renderer = (FILES / "playcanvas.js").read_bytes()
    assert f"sha256 {hashlib.sha256(renderer).hexdigest()}" in (FILES / "NOTICE").read_text()
    assert len(renderer) < 1.5e6 and b"</script" not in renderer


def test_gaussians_that_nobody_sees_are_left_out(tmp_path):
    gaussians = splat_scenes.random_gaussians(20)
    hidden = jnp.where(jnp.arange(20) < 5, -6.0, 1.0)
    viewer.write_page(
        tmp_path / "a.html", dataclasses.replace(gaussians, opacity_logits=hidden), "head"
    )
    assert '"count": 15' in (tmp_path / "a.html").read_text()


def changed(**values):
    return dataclasses.replace(splat_scenes.random_gaussians(20), **values)


@pytest.mark.parametrize(
    ("gaussians", "settings", "message"),
    [
        (changed(opacity_logits=jnp.full(20, -9.0)), {}, "no Gaussian is opaque"),
        (changed(means=jnp.full((20, 3), jnp.nan)), {}, "not finite"),
        (changed(sh=jnp.full((20, 4, 3), jnp.inf)), {}, "not finite"),
        (changed(), {"distance": 0.0}, "distance 0.0"),
        (changed(), {"field_of_view": 180.0}, "field of view 180"),
        (changed(), {"middle": (0.0, np.nan, 0.0)}, "middle"),
        (changed(), {"background": (1.0, 2.0, 0.0)}, "background"),
    ],
)
def test_bad_input_is_one_error_and_no_page(tmp_path, gaussians, settings, message):
    page = tmp_path / "a.html"
    with pytest.raises(InputError, match=message) as error:
        viewer.write_page(page, gaussians, "head", **settings)
    assert str(page) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_too_large_a_page_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "MAX_PAGE", 2**20)
    with pytest.raises(InputError, match=r"20 Gaussians with harmonics of degree 1 make"):
        viewer.write_page(tmp_path / "a.html", changed(), "head")
    assert not list(tmp_path.iterdir())
