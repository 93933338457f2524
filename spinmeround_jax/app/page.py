"""The page itself, in Gradio: choose, check the crop, spin, make it 3D, download.

It loads nothing from elsewhere: fonts are the system's, results and viewer are pages that hold all they
need, shown in frames.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.util
import pathlib
import socket
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import fastapi
import gradio as gr
import uvicorn
from PIL import Image

from spinmeround_jax.app.work import (
    ANGLES,
    JobStatus,
    PageSettings,
    Report,
    SavedHead,
    Studio,
    Upload,
    follow,
    has_encoder,
)
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import preview
from spinmeround_jax.photo.images import SUFFIXES, encoded, to_uint8
from spinmeround_jax.photo.pose import Correction
from spinmeround_jax.requests import Job
from spinmeround_jax.video import mp4

T = TypeVar("T")
Updates = Generator[dict[Any, Any], None, T]  # component: its new value

MAX_UPLOAD = 25 * 2**20  # bytes of one file; photo.images.MAX_PIXELS limits what it may unpack to
MAX_QUEUE = 16  # jobs that wait
KEPT = 2 * 3600  # seconds that files are kept for who closed the page, or left it open
PORTRAITS = pathlib.Path(__file__).parents[2] / "demo" / "portraits"
DOWNLOADS = {  # of the folder that `reconstruct` writes
    "splats.ply": "Splats (PLY)",
    "splats.glb": "Splats (GLB)",
    "mesh.glb": "Mesh (GLB)",
    "mesh_textured.glb": "Mesh with a texture (GLB)",
    "viewer.html": "Viewer (HTML)",
    mp4.NAME: "Smooth video (MP4)",
}
ERRORS = (InputError, ValueError, OSError, FloatingPointError, ImportError)

CSS = """
.gradio-container{width:100%;max-width:1080px!important;margin:auto!important}
.gradio-container .html-container{padding:0}
footer{display:none!important}
h1{font-size:2rem;letter-spacing:-.02em;margin:.4em 0 0}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px}
.panels figure{margin:0;max-width:255px}
.panels img{display:block;width:100%;max-height:300px;object-fit:contain;border-radius:8px;
background:var(--background-fill-secondary)}
.panels img[data-photo]{cursor:crosshair}
.panels figcaption{font-size:.8rem;padding-top:4px}
.notes{margin:10px 0 0;padding-left:1.2em;font-size:.9rem}
.job-status progress{width:100%;height:10px;appearance:none;border:0;border-radius:5px;overflow:hidden;
background:var(--border-color-primary)}
.job-status progress::-webkit-progress-bar{background:var(--border-color-primary)}
.job-status progress::-webkit-progress-value{background:var(--color-accent)}
.job-status progress::-moz-progress-bar{background:var(--color-accent)}
.job-status p,.error{margin:.2em 0}
.error{border-left:4px solid #c62828;padding:.5em .8em;background:var(--background-fill-secondary)}
.examples{display:grid!important;grid-template-columns:repeat(auto-fill,minmax(128px,1fr));gap:8px}
.examples button{min-height:52px}
.example img{width:44px!important;height:44px!important;border-radius:6px}
iframe{display:block;width:100%;border:1px solid var(--border-color-primary);border-radius:12px}
.viewer{height:min(80vh,620px)}
"""
# Browsers ask nobody but this server. Gradio's page has scripts of its own in it, and evaluates templates.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
# The page of results is as high as what it shows, also after something in it was opened.
FIT = (
    "const page=this.contentDocument;"
    "new ResizeObserver(()=>{this.style.height=page.documentElement.scrollHeight+2+'px'})"
    ".observe(page.body)"
)
# A click into a crop moves its centre there; the sliders do the same from the keyboard.
CLICKED = (
    "element.addEventListener('click',({target,offsetX,offsetY})=>{if(target.dataset.photo)"
    "trigger('select',{photo:target.dataset.photo,"
    "x:offsetX/target.clientWidth,y:offsetY/target.clientHeight})})"
)


# --------------------------------------------------------------------------------------------------
# Pieces of HTML


def error_box(sentence: str) -> str:
    return f'<p class="error" role="alert">{html.escape(sentence)}</p>'


def note(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>' if text else ""


def progress(status: JobStatus) -> str:
    left = "" if status.left is None else f" · about {_duration(status.left)} left"
    text = html.escape(status.text + left)
    value = f' value="{status.fraction:.3f}"' if status.fraction else ""
    bar = f'<progress max="1"{value} aria-label="{text}"></progress>'
    return f'<div class="job-status"><p>{text}</p>{bar}</div>'


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def frame(document: str, title: str, kind: str = "") -> str:
    fit = "" if kind else f' onload="{FIT}"'
    return f'<iframe title="{title}" class="{kind}" srcdoc="{html.escape(document)}"{fit}></iframe>'


def panels(jobs: list[Job], photo_warning: str | None) -> str:
    """What was found in each photo, the crop, the mask and the portrait, and all remarks."""
    figures = []
    for number, job in enumerate(jobs, start=1):
        shown = {"portrait, taken as it is": Image.fromarray(to_uint8(job.images[0]))}
        for caption, panel in (preview.panels(job.prepared) if job.prepared else shown).items():
            figures.append(_figure(panel, caption, number if caption == "crop" else None))
    notes = [text.rpartition("/")[2] for job in jobs for text in job.notes]
    if photo_warning and any(job.prepared for job in jobs):
        notes.append(photo_warning)
    remarks = "".join(f"<li>{html.escape(text)}</li>" for text in notes)
    return (
        f'<div class="panels">{"".join(figures)}</div>'
        f"{f'<ul class=notes>{remarks}</ul>' if remarks else ''}"
    )


def _figure(image: Image.Image, caption: str, photo: int | None) -> str:
    """`photo`: the number of the photo whose crop this is; it can be clicked, see CLICKED."""
    image.thumbnail((420, 420))
    data = base64.b64encode(encoded(image, "JPEG", quality=88)).decode()
    text = html.escape(caption)
    number, hint = ("", "") if photo is None else (f' data-photo="{photo}"', "; click to centre it")
    return (
        f'<figure><img alt="{text}"{number} src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{text}{hint}</figcaption></figure>"
    )


def examples() -> dict[str, pathlib.Path]:
    """Name -> image, of those that are there; scikit-image brings a photo."""
    found = {
        f"Portrait {i}": path
        for i, path in enumerate(sorted(PORTRAITS.glob("*[0-9].png")), start=1)
    }
    skimage = importlib.util.find_spec("skimage")
    if skimage and skimage.origin:
        astronaut = pathlib.Path(skimage.origin).parent / "data" / "astronaut.png"
        if astronaut.is_file():
            found["Astronaut"] = astronaut
    return found


# --------------------------------------------------------------------------------------------------
# The page


def build(studio: Studio) -> gr.Blocks:
    """The page for these weights; `serve` shows it."""
    first = next(iter(studio.weights.values()))
    # What a step needs the page's queue for: looking at photos does not wait for the device.
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    looking = {**quiet, "concurrency_id": "photo", "concurrency_limit": 1}
    device: dict[str, Any] = {
        "api_visibility": "private",
        "show_progress": "minimal",
        "concurrency_id": "device",
        "concurrency_limit": 1,
    }

    with gr.Blocks(
        title="SpinMeRound", analytics_enabled=False, delete_cache=(600, KEPT)
    ) as blocks:
        taken = gr.State([])  # list[Upload]
        made = gr.State(None, time_to_live=KEPT, delete_callback=studio.remove)
        gr.HTML(
            "<h1>SpinMeRound</h1><p>One portrait in, views all around the head out, with normals, "
            "splats and a mesh. Everything happens on this machine.</p>"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=280):
                files = gr.File(
                    label="A photo, or three of the same person",
                    file_count="multiple",
                    file_types=list(SUFFIXES),
                    height=190,
                    elem_id="photos",
                )
            with gr.Column(scale=2, min_width=280):
                gr.HTML("<p>Or try, with one click:</p>")
                with gr.Row(elem_classes="examples"):
                    buttons = {
                        path: gr.Button(
                            name, icon=path, size="sm", min_width=0, elem_classes="example"
                        )
                        for name, path in examples().items()
                    }
                    nobody = gr.Button("A new person", size="sm", min_width=0)
        found = gr.HTML(js_on_load=CLICKED)
        with gr.Accordion("Correct the crop", open=False, visible=False) as correct:
            which = gr.Radio([], label="Photo", visible=False)
            face = gr.Radio([], label="Face, the largest first", visible=False)
            with gr.Row():
                right = gr.Slider(-50, 50, 0, step=1, label="Move right, %")
                down = gr.Slider(-50, 50, 0, step=1, label="Move down, %")
                size = gr.Slider(50, 200, 100, step=1, label="Size, %")
                roll = gr.Slider(-180, 180, 0, step=1, label="Rotate, °")
            corrections = [right, down, size, roll]
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                model = gr.Dropdown(list(studio.weights), value=first.name, label="Model")
                angles = gr.Dropdown(list(ANGLES), value=next(iter(ANGLES)), label="Angles")
                seed = gr.Number(
                    0,
                    minimum=0,
                    maximum=2**31 - 1,
                    precision=0,
                    label="Seed: same seed, same result",
                )
            with gr.Row():
                steps = gr.Slider(
                    2, 100, first.sampling.steps, step=1, label="Steps",
                    info="a number not used before is compiled first",
                )  # fmt: skip
                guidance = gr.Slider(
                    1, 8, first.sampling.guidance_scale, step=0.1, label="Guidance",
                    info="1 is none, and twice as fast",
                )  # fmt: skip
            with gr.Row():
                keep = gr.Checkbox(label="Keep the background")
                without = gr.Checkbox(label="Without the identity")
        with gr.Row():
            spin = gr.Button("Spin", variant="primary", interactive=False)
            stop = gr.Button("Stop", variant="stop", visible=False)
        status = gr.HTML(elem_id="status")
        with gr.Row(visible=False) as after:
            views = gr.DownloadButton("Download views and cameras (zip)", elem_id="zip")
            video = gr.DownloadButton("Video (MP4)", visible=has_encoder())
            make3d = gr.Button("Make it 3D", variant="primary")
        status3d = gr.HTML(elem_id="status3d")
        viewer = gr.HTML()
        with gr.Row(visible=False) as after3d:
            downloads = {file: gr.DownloadButton(name) for file, name in DOWNLOADS.items()}
            film = gr.Button("Make a smooth video", visible=has_encoder())
        result = gr.HTML()

        settings = [model, angles, seed, steps, guidance, keep, without]
        cleared = {found: "", correct: gr.update(visible=False), spin: gr.update(interactive=False)}

        def page_settings(angles, seed, steps, guidance, keep, without) -> PageSettings:
            return PageSettings(angles, int(seed or 0), int(steps), float(guidance), keep, without)

        def look(
            uploads: list[Upload], number: int | None, model: str, *given: Any
        ) -> dict[Any, Any]:
            """The crop of every photo, and what can be corrected of one of them."""
            if not uploads:
                return {**cleared, status: ""}
            try:
                if len(uploads) not in (1, 3):
                    raise InputError(
                        f"{len(uploads)} photos: give one, or three of the same person"
                    )
                jobs = studio.look(model, uploads, page_settings(*given))
            except ERRORS as error:
                return {
                    **cleared,
                    found: error_box(studio.sentence(error)),
                    correct: gr.update(visible=any(s != Upload(s.path) for s in uploads)),
                    status: "",
                }
            seen = jobs[(number or 1) - 1].prepared
            faces = len(seen.faces) if seen else 0
            return {
                found: panels(jobs, studio.weights[model].photo_warning),
                correct: gr.update(visible=seen is not None),
                face: gr.update(choices=list(range(1, faces + 1)), visible=faces > 1),
                spin: gr.update(interactive=True),
                status: "",
            }

        def choose(paths: list[str] | None) -> dict[Any, Any]:
            """New photos, nothing corrected yet."""
            chosen = [Upload(pathlib.Path(path)) for path in paths or []]
            return {
                taken: chosen,
                which: gr.update(
                    choices=list(range(1, len(chosen) + 1)),
                    value=1 if chosen else None,
                    visible=len(chosen) > 1,
                ),
                **shown(Upload(pathlib.Path())),
            }

        def shown(upload: Upload) -> dict[Any, Any]:
            """The handles as they stand for one photo."""
            by = upload.correction
            values = (100 * by.right, 100 * by.down, 100 * by.size, by.roll)
            return {face: upload.face, **dict(zip(corrections, map(round, values), strict=True))}

        def corrected(
            uploads, which, face, right, down, size, roll, *look_at: Any
        ) -> dict[Any, Any]:
            """One photo corrected by hand, and what is seen then."""
            by = Correction(right / 100, down / 100, size / 100, roll)
            old = uploads[which - 1]
            new = dataclasses.replace(old, face=face or old.face, correction=by)
            uploads = [*uploads[: which - 1], new, *uploads[which:]]
            return {taken: uploads, **look(uploads, which, *look_at)}

        def clicked(event: gr.EventData, uploads: list[Upload]) -> dict[Any, Any]:
            """One photo with its crop's centre where it was clicked."""
            number = int(event.photo)
            by = uploads[number - 1].correction.centred(float(event.x), float(event.y))
            right, down = (min(max(-0.5, way), 0.5) for way in (by.right, by.down))
            by = dataclasses.replace(by, right=right, down=down)
            new = dataclasses.replace(uploads[number - 1], correction=by)
            uploads = [*uploads[: number - 1], new, *uploads[number:]]
            return {taken: uploads, which: number, **shown(new)}

        def run(
            work: Callable[[Report], T], status: gr.HTML, button: gr.Button
        ) -> Updates[T | None]:
            """Show how far a job is; returns its result, or None where it failed."""
            began = time.monotonic()
            # In every update: the browser may skip all but the newest.
            busy = {stop: gr.update(visible=True), button: gr.update(interactive=False)}
            end = {stop: gr.update(visible=False), button: gr.update(interactive=True)}
            steps = follow(work)
            try:
                while True:
                    yield {**busy, status: progress(next(steps))}
            except StopIteration as finished:
                yield {**end, status: note(f"Done in {_duration(time.monotonic() - began)}.")}
                return finished.value
            except ERRORS as error:
                yield {**end, status: error_box(studio.sentence(error))}
                return None
            finally:
                steps.close()

        def spin_clicked(
            uploads: list[Upload], old: SavedHead | None, model: str, *given: Any
        ) -> Updates[None]:
            studio.remove(old)
            yield {
                made: None, result: "", viewer: "", status3d: "",
                after: gr.update(visible=False), after3d: gr.update(visible=False),
            }  # fmt: skip
            head = yield from run(
                lambda report: studio.spin(model, uploads, page_settings(*given), report),
                status,
                spin,
            )
            if head is not None:
                yield {
                    made: head,
                    result: frame(head.page, "Views, anchors and normals"),
                    views: head.archive,
                    video: head.folder / mp4.NAME if has_encoder() else None,
                    after: gr.update(visible=True),
                }
            if not uploads:
                yield {spin: gr.update(interactive=False)}

        def splats(head: SavedHead) -> Updates[None]:
            yield {viewer: "", after3d: gr.update(visible=False)}
            solid = yield from run(
                lambda report: studio.reconstruct(head, report), status3d, make3d
            )
            if solid is None:
                return
            page = solid.folder / "viewer.html"
            shown = frame(page.read_text("utf-8"), "3D viewer", "viewer") if page.is_file() else ""
            lost = "; ".join(f"no {what}: {why}" for what, why in solid.left_out.items())
            yield {
                viewer: shown + note(lost),
                after3d: gr.update(visible=True),
                film: gr.update(visible=has_encoder()),
                **{button: offer(solid.folder / file) for file, button in downloads.items()},
            }

        def offer(path: pathlib.Path) -> dict[str, Any]:
            there = path.is_file()
            return gr.update(value=path if there else None, visible=there)

        def smooth(head: SavedHead) -> Updates[None]:
            path = yield from run(lambda report: studio.film(head, report), status3d, film)
            if path is not None:
                yield {downloads[mp4.NAME]: offer(path), film: gr.update(visible=False)}

        def defaults(model: str) -> tuple[float, float]:
            own = studio.weights[model].sampling
            return own.steps, own.guidance_scale

        handles = [taken, which, face, *corrections]
        look_out = [found, correct, face, spin, status]
        look_in = [taken, which, *settings]
        spin_in, spin_out = [taken, made, *settings], [
            made, result, viewer, status, status3d, after, after3d, spin, stop, views, video,
        ]  # fmt: skip
        spins = [spin.click(spin_clicked, spin_in, spin_out, **device)]
        files.change(choose, files, handles, **quiet).then(look, look_in, look_out, **looking)
        for path, button in buttons.items():
            chosen = button.click(
                lambda path=path: choose([str(path)]), None, handles, **quiet
            ).then(look, look_in, look_out, **looking)
            spins.append(chosen.then(spin_clicked, spin_in, spin_out, **device))
        nobody_chosen = nobody.click(lambda: choose(None), None, handles, **quiet)
        nobody_looked = nobody_chosen.then(look, look_in, look_out, **looking)
        spins.append(nobody_looked.then(spin_clicked, spin_in, spin_out, **device))
        solids = make3d.click(
            splats,
            made,
            [viewer, status3d, after3d, make3d, stop, film, *downloads.values()],
            **device,
        )
        films = film.click(smooth, made, [status3d, film, stop, downloads[mp4.NAME]], **device)
        found.select(clicked, taken, handles, **quiet).then(look, look_in, look_out, **looking)
        for handle in (face, *corrections):
            handle.input(
                corrected, [*handles, *settings], [taken, *look_out],
                trigger_mode="always_last", **looking,
            )  # fmt: skip
        which.input(
            lambda uploads, which: shown(uploads[which - 1]),
            [taken, which],
            [face, *corrections],
            **quiet,
        ).then(look, look_in, look_out, **looking)
        model.input(defaults, model, [steps, guidance], **quiet)
        for box in (model, keep, without):
            box.input(look, look_in, look_out, **looking)
        stop.click(
            lambda uploads: {
                status: note("Stopped."), status3d: "", stop: gr.update(visible=False),
                spin: gr.update(interactive=bool(uploads)), make3d: gr.update(interactive=True),
                film: gr.update(interactive=True),
            },
            taken, [status, status3d, stop, spin, make3d, film], cancels=[*spins, solids, films],
            **quiet,
        )  # fmt: skip
    return blocks


def application(studio: Studio, auth: list[tuple[str, str]] | None = None) -> fastapi.FastAPI:
    """The page as a web application, for all or for these names with passwords."""
    blocks = build(studio)
    blocks.queue(max_size=MAX_QUEUE, api_open=False)
    server = fastapi.FastAPI(openapi_url=None)

    @server.middleware("http")
    async def stay_here(request: fastapi.Request, proceed: Any) -> fastapi.Response:
        response = await proceed(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    gr.mount_gradio_app(
        server,
        blocks,
        path="/",
        auth=auth,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[str(path) for path in examples().values()],
        enable_monitoring=False,
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
    )
    return server


def serve(studio: Studio, host: str, port: int, auth: list[tuple[str, str]] | None) -> None:
    """Show the page until interrupted.

    Raises:
        OSError: the address cannot be had.
    """
    config = uvicorn.Config(application(studio, auth), log_level="warning")
    with socket.create_server((host, port), family=_family(host)) as listening:
        print(f"Open http://{host}:{port}   (Ctrl-C ends)", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
