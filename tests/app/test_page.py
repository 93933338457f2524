"""The page in headless Chromium, as people use it: photos, wrong files, impatience, telephones, keyboards."""

import dataclasses
import functools
import re
import socket
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import checkpoints
from spinmeround_jax.app import work
from spinmeround_jax.splats.fit import FitSettings
from spinmeround_jax.video import mp4
from tests.support import browser, splat_views
from tests.support.tiny_model import SAMPLING, random_model

pytest.importorskip("gradio", reason="pip install 'spinmeround_jax[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
if browser.find() is None:
    pytest.skip("no Chromium: apt install chromium", allow_module_level=True)

DATA = pytest.importorskip("skimage.data", reason="its photo is what is uploaded")
SLOW = 240_000  # milliseconds; a machine under load is slow


class Gated(work.Studio):
    """Jobs wait in the middle while the gate is closed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate, self.begun, self.stopped = threading.Event(), 0, 0
        self.gate.set()

    def spin(self, name, uploads, chosen, report):
        self.begun += 1
        self.chosen = chosen
        try:
            while not self.gate.wait(0.05):
                report("Waiting at the gate", 0.5)
        except work.Stopped:
            self.stopped += 1
            raise
        return super().spin(name, uploads, chosen, report)

    def reconstruct(self, head, report):
        """Of other views: the model's are too small."""
        splat_views.write(head.folder, splat_views.ellipsoid(splat_views.ring(12), 32))
        return super().reconstruct(head, report)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    root = tmp_path_factory.mktemp("jobs")
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    rendered = {"data": {"source": "data_prep.render_heads"}}
    sampling = {"sampling": dataclasses.asdict(SAMPLING)}
    checkpoints.save_model(folder, random_model(), sampling | rendered)
    weights = work.Weights(folder, None)
    weights.compile()  # as the command does, before anybody waits for it
    return Gated([weights], root)


@pytest.fixture(scope="module")
def serve(studio):
    """Serves the page, for these people if any are named; returns its address."""
    import uvicorn

    patch = pytest.MonkeyPatch()
    patch.setattr(mp4, "DEFAULT", mp4.Turn(height=32, fps=4, seconds=1.0))
    patch.setattr(work, "FitSettings", functools.partial(FitSettings, steps=20, lpips=0.0))
    patch.setenv("GRADIO_TEMP_DIR", str(studio.root / "uploads"))
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from spinmeround_jax.app import page

    running = []

    def start(auth=None):
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(page.application(studio, auth), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield start
    studio.gate.set()
    for server, thread in running:
        server.should_exit = server.force_exit = True
        thread.join(60)
    patch.undo()


@pytest.fixture(scope="module")
def url(serve):
    return serve()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        with started.chromium.launch(executable_path=browser.find(), args=flags) as launched:
            yield launched


@pytest.fixture
def open_page(chromium, url, studio):
    """Opens the page in a new window; nothing may be asked of anybody but the page's own server."""
    windows, elsewhere = [], []

    def only_here(route):
        if route.request.url.startswith((url, "data:", "blob:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    def start(width=1200, height=900):
        window = chromium.new_context(viewport={"width": width, "height": height})
        windows.append(window)
        window.set_default_timeout(SLOW)
        window.route("**/*", only_here)
        page = window.new_page()
        page.goto(url)
        page.get_by_role("button", name="A new person").wait_for()
        return page

    studio.gate.set()
    studio.begun = studio.stopped = 0
    yield start
    studio.gate.set()
    for window in windows:
        window.close()
    assert elsewhere == []


def upload(page, *files):
    page.set_input_files("#photos input[type=file]", list(files))


def photo(tmp_path, name="astronaut.png"):
    path = tmp_path / name
    Image.fromarray(DATA.astronaut()).save(path)
    return path


def results(page):
    """The page of results inside the page."""
    return page.frame_locator("iframe[title^=Views]")


def test_a_photo_is_shown_corrected_spun_and_downloaded(open_page, tmp_path):
    page = open_page()
    upload(page, photo(tmp_path))
    caption = page.get_by_text(re.compile(r"roll [+-]\d+")).last
    before = int(re.search(r"roll ([+-]\d+)", caption.inner_text())[1])
    for panel in ("crop", "portrait"):
        assert page.get_by_role("img", name=panel, exact=True).is_visible()
    assert page.get_by_text("expect little of photographs").is_visible()

    page.get_by_role("button", name="Correct the crop").click()
    roll = page.get_by_role("slider", name="Rotate")
    roll.focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    page.get_by_text(f"roll {before + 12:+d}").last.wait_for()

    page.get_by_role("button", name="Spin", exact=True).click()
    results(page).get_by_text("Anchors").wait_for()
    assert results(page).get_by_role("slider").is_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download views").click()
    download.value.save_as(tmp_path / "views.zip")
    with zipfile.ZipFile(tmp_path / "views.zip") as archive:
        assert "astronaut/transforms.json" in archive.namelist()


def test_a_click_into_the_crop_moves_its_centre_there(open_page, tmp_path):
    page = open_page()
    upload(page, photo(tmp_path))
    crop = page.get_by_role("img", name="crop", exact=True)
    crop.wait_for()
    before, box = crop.get_attribute("src"), crop.bounding_box()
    crop.click(position={"x": 0.6 * box["width"], "y": 0.45 * box["height"]})
    page.get_by_role("button", name="Correct the crop").click()
    right, down = (page.get_by_role("slider", name=f"Move {way}") for way in ("right", "down"))
    playwright.expect(right).to_have_value(re.compile("^(9|10|11)$"), timeout=SLOW)
    playwright.expect(down).to_have_value(re.compile("^-[456]$"), timeout=SLOW)
    playwright.expect(crop).not_to_have_attribute("src", before, timeout=SLOW)


def test_a_head_is_made_3d_and_filmed(open_page):
    page = open_page()
    page.get_by_role("button", name="A new person").click()
    page.get_by_role("button", name="Make it 3D").click()
    viewer = page.frame_locator("iframe[title='3D viewer']")
    viewer.locator("canvas").wait_for()
    for name in ("Splats (PLY)", "Splats (GLB)", "Mesh with a texture (GLB)", "Viewer (HTML)"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        assert download.value.path().stat().st_size > 1000
    pytest.importorskip("av", reason="pip install 'spinmeround_jax[video]'")
    page.get_by_role("button", name="Make a smooth video").click()
    for name in ("Smooth video (MP4)", "Video (MP4)"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        assert download.value.suggested_filename == mp4.NAME


def test_what_cannot_be_used_is_a_sentence_and_nothing_can_be_spun(open_page, tmp_path, studio):
    page = open_page()
    wrong = tmp_path / "holiday.png"
    wrong.write_text("<script>alert(1)</script>")
    upload(page, wrong)
    told = page.locator(".error")
    told.wait_for()
    assert told.inner_text().startswith("holiday.png: not a readable image")
    assert str(studio.root) not in told.inner_text()
    assert page.get_by_role("button", name="Spin", exact=True).is_disabled()

    page.get_by_role("button", name="Clear").click()
    wall = tmp_path / "wall.png"
    Image.fromarray(np.full((300, 400, 3), 120, np.uint8)).save(wall)
    upload(page, wall)
    page.locator(".error", has_text="no face found").wait_for()
    assert "--" not in told.inner_text()

    page.get_by_role("button", name="Clear").click()
    upload(page, photo(tmp_path, "a.png"), photo(tmp_path, "b.png"))
    page.locator(".error", has_text="give one, or three").wait_for()


def test_who_clicks_twice_gets_one_head(open_page, tmp_path, studio):
    page = open_page()
    upload(page, photo(tmp_path))
    page.get_by_role("img", name="portrait", exact=True).wait_for()
    studio.gate.clear()
    page.get_by_role("button", name="Spin", exact=True).dblclick()
    page.get_by_text("Waiting at the gate").first.wait_for()
    assert page.get_by_role("button", name="Spin", exact=True).is_disabled()
    studio.gate.set()
    results(page).get_by_text("Anchors").wait_for()
    page.get_by_role("button", name="Download views").wait_for()
    assert studio.begun == 1


def test_a_stopped_job_ends(open_page, studio):
    page = open_page()
    studio.gate.clear()
    page.get_by_role("button", name="A new person").click()
    page.get_by_text("Waiting at the gate").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    wait_until(page, lambda: studio.stopped == 1)


def test_reloading_ends_the_job_and_the_page_works_anew(open_page, studio):
    page = open_page()
    studio.gate.clear()
    page.get_by_role("button", name="A new person").click()
    page.get_by_text("Waiting at the gate").first.wait_for()
    page.reload()
    page.get_by_role("button", name="A new person").wait_for()
    wait_until(page, lambda: studio.stopped == 1)
    studio.gate.set()
    page.get_by_role("button", name="A new person").click()
    results(page).get_by_text("Anchors").wait_for()


def wait_until(page, condition):
    for _ in range(SLOW // 100):
        if condition():
            return
        page.wait_for_timeout(100)
    raise TimeoutError


def test_a_second_visitor_waits_for_the_first(open_page, studio):
    first, second = open_page(), open_page()
    studio.gate.clear()
    first.get_by_role("button", name="A new person").click()
    first.get_by_text("Waiting at the gate").first.wait_for()
    second.get_by_role("button", name="A new person").click()
    second.get_by_text("queue").first.wait_for()
    assert studio.begun == 1
    studio.gate.set()
    results(second).get_by_text("Anchors").wait_for()
    assert studio.begun == 2


def test_a_telephone_needs_no_scrolling_sideways(open_page, tmp_path):
    page = open_page(width=390, height=844)
    upload(page, photo(tmp_path))
    page.get_by_role("img", name="portrait", exact=True).wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Spin", exact=True).click()
    results(page).get_by_text("Anchors").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    inside = page.frame_locator("iframe[title^=Views]").locator("html")
    assert inside.evaluate("page => page.scrollWidth - page.clientWidth") <= 0


def test_the_keyboard_is_enough(open_page, studio):
    page = open_page()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText").strip() == "A new person":
            break
    page.keyboard.press("Enter")
    results(page).get_by_text("Anchors").wait_for()
    results(page).get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    assert studio.begun == 1


def test_everything_one_can_touch_has_a_name(open_page, tmp_path):
    page = open_page()
    upload(page, photo(tmp_path))
    page.get_by_role("img", name="portrait", exact=True).wait_for()
    page.get_by_role("button", name="Correct the crop").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("slider", name="Steps").wait_for()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "slider",
        "spinbutton",
        "checkbox",
        "combobox",
        "radio",
        "link",
        "progressbar",
    }
    nodes = [(n["role"]["value"], n.get("name", {}).get("value")) for n in tree if "role" in n]
    assert len([role for role, _ in nodes if role in roles]) > 20
    assert [(role, name) for role, name in nodes if role in roles and not name] == []
    assert ("heading", "SpinMeRound") in nodes


def test_settings_reach_the_sampler(open_page, studio):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Angles").click()
    page.get_by_role("option", name="24 views").first.click()
    seed = page.get_by_label("Seed")
    seed.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("17")
    page.keyboard.press("Tab")
    playwright.expect(seed).to_have_value("17")
    page.get_by_role("button", name="A new person").click()
    results(page).get_by_text("All 24 views").wait_for()
    assert studio.chosen.seed == 17 and studio.chosen.steps == SAMPLING.steps


def test_files_beyond_the_limit_are_refused(open_page, studio, tmp_path):
    from spinmeround_jax.app.page import MAX_UPLOAD

    page = open_page()
    large = tmp_path / "large.png"
    large.write_bytes(bytes(MAX_UPLOAD + 1))
    upload(page, large)
    page.get_by_text("exceed").first.wait_for()
    assert not list((studio.root / "uploads").rglob("large.png"))


def test_strangers_cannot_look_or_upload(serve):
    import httpx

    address = serve([("ann", "secret")])
    sent = {"files": ("a.png", b"anything")}
    assert httpx.post(f"{address}gradio_api/upload", files=sent, timeout=60).status_code == 401
    assert httpx.get(f"{address}config", timeout=60).status_code == 401
    with httpx.Client(timeout=60) as ann:
        ann.post(f"{address}login", data={"username": "ann", "password": "wrong"})
        assert ann.get(f"{address}config").status_code == 401
        ann.post(f"{address}login", data={"username": "ann", "password": "secret"})
        assert ann.get(f"{address}config").status_code == 200


def test_browsers_are_told_to_ask_nobody_else(url):
    import httpx

    policy = httpx.get(url, timeout=60).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
