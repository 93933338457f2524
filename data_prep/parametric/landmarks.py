"""The 68 landmarks of a face as vertices of the base mesh, and the model of them that photos use.

    python -m data_prep.parametric.landmarks            # made spinmeround_jax/photo/landmark_model.npz

The people it is made from belong to a data set (seed 77) that is never rendered.
"""

import argparse
import functools
import io
import pathlib

import numpy as np

from data_prep.parametric import assets, template
from data_prep.parametric.head import Head, build_head
from data_prep.parametric.people import sample_person
from data_prep.render_heads import person_seed
from spinmeround_jax import cli
from spinmeround_jax.cli import UsageError
from spinmeround_jax.files import write_atomically
from spinmeround_jax.photo import landmarks

SEED = 77

# Numbers of base.obj's vertices, ours by eye on its wireframe, mirrored from the image's left to
# its right; numbering as in spinmeround_jax.photo.landmarks.
VERTICES = (
    5739, 5735, 5097, 912, 894, 915, 917, 5293, 5296,  # jaw, from the person's right ear to the chin
    11899, 7619, 7617, 7596, 7614, 11712, 12332, 12336,  # and up to the left ear
    262, 231, 222, 205, 208, 6983, 6980, 6996, 7004, 7031,  # brows
    132, 131, 201, 5054, 358, 359, 343, 7120, 7119,  # ridge and base of the nose
    21, 0, 54, 66, 47, 41, 6850, 6838, 6784, 6805, 6825, 6831,  # lids
    500, 447, 456, 455, 7215, 7207, 7249, 7166, 7241, 492, 486, 406,  # outer edge of the lips
    444, 459, 468, 7218, 7204, 7236, 493, 481,  # where the lips meet
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _skin_vertices() -> np.ndarray:
    """(68,) rows of a Head's `skin`. Subdivision keeps the old vertices first, so of any level."""
    numbers = template.vertex_numbers()[template.part("skin", 0).stencil.indices]
    order = np.argsort(numbers)
    rows = order[np.searchsorted(numbers[order], VERTICES)]
    if not np.array_equal(numbers[rows], VERTICES):
        raise AssertionError("a landmark is not on the skin of the head")
    return rows


def world_landmarks(head: Head) -> np.ndarray:
    """(68, 3) in the canonical world frame (spinmeround_jax.cameras)."""
    return head.placement.to_world(head.skin[_skin_vertices()])


def draw_landmarks(seed: int, numbers: range, level: int = 1) -> np.ndarray:
    """(people, 68, 3) of the people of those numbers in data set `seed`."""
    people = (sample_person(person_seed(seed, number)) for number in numbers)
    return np.stack(
        [
            world_landmarks(build_head(person, level))
            for person in cli.progress(iterable=people, total=len(numbers), unit="head")
        ]
    )


def run(args: argparse.Namespace) -> None:
    if not 1 <= args.modes < args.people:
        raise UsageError("--modes: at least 1, and fewer than --people")
    assets.assets_dir()
    model = landmarks.build_model(draw_landmarks(SEED, range(args.people)), args.modes)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        mean=model.mean.astype(np.float32),
        modes=model.modes.astype(np.float32),
        noise=model.noise.astype(np.float32),
        made_by=f"python -m data_prep.parametric.landmarks --people {args.people} --modes {args.modes}",
        people=f"data_prep people 0 to {args.people - 1} of seed {SEED}, level 1; {assets.LICENSE}",
    )
    write_atomically(args.out, buffer.getvalue())
    print(f"{args.out}: {args.people} people, {args.modes} modes, {args.out.stat().st_size} bytes")


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser(
        "data_prep.parametric.landmarks",
        "Make the statistical model of landmarks that the photo front end fits.",
    )
    parser.add_argument("--people", type=cli.integer(1), default=4000, help="heads to draw (4000)")
    parser.add_argument(
        "--modes", type=cli.integer(1), default=80, help="principal components kept (80)"
    )
    parser.add_argument("--out", type=pathlib.Path, default=landmarks.MODEL_FILE)
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
