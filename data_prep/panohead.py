"""Training data from PanoHead, the generator that the paper's data come from.

Two steps. `screen` looks at each person from a few sides, scores the generator's known faults and
draws contact sheets; a person then edits a list; `render` writes 125 views of those who are left.
docs/data_factory.md says what you need and how long it takes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, Protocol

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from data_prep import factory, identity  # noqa: E402
from data_prep.back_filter import (  # noqa: E402
    BACK_YAWS,
    Scores,
    Thresholds,
    back_face_score,
    mirror_similarity,
)
from data_prep.generator import isosurface, screening  # noqa: E402
from data_prep.rendering import render, viewpoints  # noqa: E402
from data_prep.rendering.cutout import cut_out  # noqa: E402
from data_prep.rendering.render import on_white  # noqa: E402
from data_prep.workers import SubjectRejected  # noqa: E402
from spinmeround_jax import cameras, cli, files  # noqa: E402
from spinmeround_jax.data import records  # noqa: E402
from spinmeround_jax.files import InputError  # noqa: E402
from spinmeround_jax.photo.prepare import Models  # noqa: E402

FRAMING = "panohead"  # of photo.pose.FRAMINGS: its heads fill more of the image than ours
# As its README and the files taken over from EG3D say; see docs/data_factory.md.
LICENSE = "PanoHead: CC-BY-4.0; its parts of EG3D: NVIDIA Source Code License (non-commercial)"
_CROP = 0.1  # world units at the sides of its cube, which its own renderer leaves out
_SCREENED = ((0.0, 0.0), (45.0, 0.0), (-45.0, 0.0), (90.0, 0.0), (-90.0, 0.0))
_SCREEN_VIEWS = np.array(_SCREENED + tuple((yaw, 0.0) for yaw in BACK_YAWS))

EXAMPLES = """examples:
  # 1. ten thousand people, from a few sides each; scores, contact sheets and reject_auto.txt
  python -m data_prep.panohead screen --checkout PanoHead \\
      --network PanoHead/models/easy-khair-180-gpc0.8-trans10-025000.pkl --out screening --seeds 0-9999

  # 2. look at screening/sheets/*.jpg and add the seeds that are no good to screening/reject.txt

  # 3. all views of those who are left
  python -m data_prep.panohead render --checkout PanoHead \\
      --network PanoHead/models/easy-khair-180-gpc0.8-trans10-025000.pkl --screening screening \\
      --out data/panohead512

  # other thresholds, without looking again
  python -m data_prep.panohead collect --out screening --seeds 0-9999 --max-mirror 0.4

No code in the network pickle is run; the code in the checkout is.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides how a person looks. grid: density samples per side. level: of the surface."""

    size: int = 512
    grid: int = 256
    level: float = 10.0
    truncation_psi: float = 0.7
    truncation_cutoff: int = 14


class Generator(Protocol):
    """People by seed; panohead_network.PanoHead is one."""

    def images(self, seed: int, world_to_camera: np.ndarray) -> np.ndarray:
        """(n, h, w, 3) uint8 images, with background, from (n, 4, 4) cameras of `cameras`."""

    def density(self, seed: int, size: int) -> tuple[np.ndarray, float]:
        """(size, size, size) float32 at the points of isosurface.grid(size, box), and the box."""


@dataclasses.dataclass(frozen=True)
class Network:
    """Where the generator is. sha256: of the pickle."""

    checkout: pathlib.Path
    pickled: pathlib.Path
    sha256: str
    device: str


@functools.lru_cache(maxsize=1)
def _generator(network: Network, options: Options) -> Generator:
    """Once per process."""
    from data_prep.generator import network as panohead_network  # PyTorch: only here

    module = panohead_network.load(network.checkout, network.pickled)
    return panohead_network.PanoHead(
        module, network.device, options.truncation_psi, options.truncation_cutoff
    )


def subject_name(seed: int) -> str:
    """E.g. 'panohead-000123'."""
    return f"panohead-{seed:06d}"


def seed_of(name: str) -> int:
    return int(name.rpartition("-")[2])


@dataclasses.dataclass(frozen=True)
class View:
    """rgba (s, s, 4) uint8, straight alpha; normals (s, s, 3) float32 world space times coverage."""

    rgba: np.ndarray
    normals: np.ndarray


def surface_of(generator: Generator, seed: int, options: Options) -> isosurface.Surface:
    """The head's surface.

    Raises:
        SubjectRejected: the density holds none.
    """
    density, box = generator.density(seed, options.grid)
    try:
        return isosurface.extract(density, box, options.level, _CROP * box)
    except InputError as error:
        raise SubjectRejected(str(error)) from error


def views_of(
    generator: Generator, seed: int, angles: np.ndarray, options: Options
) -> tuple[list[View], isosurface.Surface]:
    """The person from (n, 2) angles (yaw, pitch): the generator's colours, the surface's outline."""
    surface = surface_of(generator, seed, options)
    scene = isosurface.scene(surface.vertices, surface.faces, surface.normals)
    poses = cameras.orbit(*angles.T)
    views = []
    for picture, pose in zip(generator.images(seed, poses), poses, strict=True):
        seen = render.render_view(scene, pose, options.size)
        if len(picture) != options.size:
            picture = screening.resized(picture, options.size)
        views.append(View(cut_out(picture, seen.rgba[..., 3]), seen.soft_normals))
    return views, surface


# --------------------------------------------------------------------------------------------------
# Looking at people


@dataclasses.dataclass(frozen=True)
class Screen:
    """Scores one person; picklable. faces: whether a face detector looks at the back."""

    network: Network
    options: Options
    models: pathlib.Path | None
    faces: bool

    def look(self, name: str) -> screening.Look:
        return look_at(
            _generator(self.network, self.options), seed_of(name), self.options,
            identity.models(self.models) if self.faces else None,
        )  # fmt: skip


def look_at(
    generator: Generator, seed: int, options: Options, models: Models | None
) -> screening.Look:
    """Scores and a strip of images of one person.

    Raises:
        SubjectRejected: the density holds no head.
    """
    views, surface = views_of(generator, seed, _SCREEN_VIEWS, options)
    poses = cameras.orbit(*_SCREEN_VIEWS.T)
    pictures = [on_white(view.rgba) for view in views]
    relief = [view.normals @ pose[:3, :3].T for view, pose in zip(views, poses, strict=True)]
    behind = len(_SCREENED)
    scores = Scores(
        back_face=None if models is None else back_face_score(models, pictures[behind:]),
        mirror=mirror_similarity(relief[0], relief[behind], FRAMING),
        floaters=surface.floaters,
        volume=surface.volume,
    )
    maps = [
        (np.rint(view.normals * 127) + 128).astype(np.uint8) for view in (views[0], views[behind])
    ]
    return screening.Look(scores, pictures + maps)


# --------------------------------------------------------------------------------------------------
# Writing people


@dataclasses.dataclass(frozen=True)
class PanoHeads:
    """A factory.Source of the people with these `seeds`; the last `held_out` are for evaluation."""

    network: Network
    options: Options
    seeds: tuple[int, ...]
    held_out: int
    views: int
    models: pathlib.Path | None

    def subjects(self) -> dict[str, list[str]]:
        names = [subject_name(seed) for seed in self.seeds]
        first = len(names) - self.held_out
        return {"train": names[:first], "held_out": names[first:]}

    def records(self, subject: str) -> list[records.ViewRecord]:
        generator = _generator(self.network, self.options)
        return view_records(self, generator, identity.models(self.models), subject)

    def settings(self) -> dict[str, Any]:
        seeds = json.dumps(self.seeds).encode()
        return {
            "source": "data_prep.panohead",
            "network_sha256": self.network.sha256,
            **dataclasses.asdict(self.options),
            "views": self.views,
            "people": len(self.seeds),
            "held_out": self.held_out,
            "seeds_sha256": hashlib.sha256(seeds).hexdigest(),
        }

    def manifest(self) -> dict[str, Any]:
        return {
            "image_size": self.options.size,
            "views": self.views,
            "seed": min(self.seeds),
            "source": f"data_prep.panohead: PanoHead, network {self.network.pickled.name}, SHA-256 "
            f"{self.network.sha256}",
            "license": LICENSE,
            "framing": FRAMING,
            "truncation_psi": self.options.truncation_psi,
        }


def view_records(
    source: PanoHeads, generator: Generator, models: Models, subject: str
) -> list[records.ViewRecord]:
    """All views of one person.

    Raises:
        SubjectRejected: no head, or no face from the front.
    """
    angles = viewpoints.viewpoints(source.views)
    views, _ = views_of(generator, seed_of(subject), angles, source.options)
    front = [on_white(views[number].rgba) for number in identity.frontal(angles)]
    embedding = identity.embed(models, front)
    return factory.view_records(
        subject,
        ((view.rgba, view.normals) for view in views),
        angles,
        embedding,
        f"data_prep.panohead {source.network.pickled.name}",
        LICENSE,
    )


# --------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("data_prep.panohead", __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    screen = commands.add_parser("screen", help="score people and draw contact sheets")
    collect = commands.add_parser("collect", help="apply other thresholds to what was screened")
    rendering = commands.add_parser("render", help="write all views of those who are left")
    for command in (screen, collect):
        command.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
        command.add_argument("--seeds", type=seeds, required=True, help="e.g. 0-9999 or 1,5,8-12")
        screening.add_threshold_arguments(command)
    screen.add_argument("--workers", type=cli.integer(1), default=1, help="processes (1)")
    screen.add_argument("--shard", type=cli.part, default=(0, 1), metavar="I/N")
    screen.add_argument(
        "--no-faces", dest="faces", action="store_false", help="no face detector at the back"
    )
    factory.add_arguments(rendering, shard_subjects=20, workers=1)
    rendering.add_argument(
        "--screening", type=pathlib.Path, required=True, help="the folder of `screen`"
    )
    rendering.add_argument(
        "--held-out", type=cli.integer(), default=200, help="people not trained on (200)"
    )
    rendering.add_argument("--views", type=cli.integer(1), default=viewpoints.COUNT, help="(125)")
    for command in (screen, rendering):
        command.add_argument(
            "--checkout", type=pathlib.Path, required=True, help="of the PanoHead repository"
        )
        command.add_argument("--network", type=pathlib.Path, required=True, help="its pickle")
        command.add_argument("--device", default="cuda", help="PyTorch's name of it (cuda)")
        command.add_argument("--models", type=pathlib.Path, help="folder of photo.fetch's models")
        command.add_argument("--size", type=cli.integer(1), default=512, help="pixels (512)")
        command.add_argument("--grid", type=cli.integer(1), default=256, help="per side (256)")
        command.add_argument(
            "--level", type=cli.real(), default=10.0, help="density of the skin (10)"
        )
        command.add_argument("--truncation", type=cli.real(), default=0.7, help="psi (0.7)")
    return parser.parse_args(argv)


def seeds(text: str) -> tuple[int, ...]:
    """'1,5,8-10' -> (1, 5, 8, 9, 10), sorted, none twice."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r}: expected numbers such as 0-9999 or 1,5,8")
        found |= set(range(int(first), int(last or first) + 1))
    if not found or max(found) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: seeds are 0 to 4294967295, at least one")
    return tuple(sorted(found))


def _network(args: argparse.Namespace) -> Network:
    try:
        from data_prep.generator import network as panohead_network

        sha256 = files.sha256(args.network)
        panohead_network.load(args.checkout.resolve(), args.network)  # before any work is begun
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError("PanoHead needs PyTorch: pip install '.[panohead]'") from error
    except OSError as error:
        raise InputError(f"{args.network}: cannot be opened ({error.strerror})") from error
    return Network(args.checkout.resolve(), args.network.resolve(), sha256, args.device)


def run(args: argparse.Namespace) -> None:
    if args.command == "collect":
        _collect(args)
        return
    if args.command == "screen" and args.faces:
        identity.check_detector(identity.models(args.models))
    elif args.command == "render":
        identity.check(identity.models(args.models))
    options = Options(args.size, args.grid, args.level, args.truncation)
    network = _network(args)
    if args.command == "screen":
        screen = Screen(network, options, args.models, args.faces)
        settings = {
            "network_sha256": network.sha256,
            **dataclasses.asdict(options),
            "faces": args.faces,
        }
        names = [subject_name(seed) for seed in args.seeds]
        if screening.screen(screen.look, names, args.out, settings, args.workers, args.shard):
            _collect(args)
        return
    chosen = tuple(seed_of(name) for name in screening.accepted(args.screening))
    if not 0 <= args.held_out < len(chosen):
        raise InputError(
            f"--held-out {args.held_out}: {len(chosen)} people are left in {args.screening}"
        )
    source = PanoHeads(network, options, chosen, args.held_out, args.views, args.models)
    factory.run(source, args)


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


def _collect(args: argparse.Namespace) -> None:
    limits = Thresholds(args.max_back_face, args.max_mirror, args.max_floaters, args.max_volume)
    screening.collect(args.out, [subject_name(seed) for seed in args.seeds], limits)


if __name__ == "__main__":
    cli.end(main())
