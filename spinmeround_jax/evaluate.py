"""Measure models, or folders of views: `python -m spinmeround_jax.evaluate --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import pathlib

from spinmeround_jax import cli, files
from spinmeround_jax.cli import UsageError
from spinmeround_jax.diffusion.samplers import SAMPLERS
from spinmeround_jax.evaluation import (
    folders,
    heads,
    measures,
    nersemble,
    published,
    report,
    results,
)
from spinmeround_jax.evaluation.models import named

DESCRIPTION = """Evaluate models and other methods, and compare with baselines and the paper's figures.

protocols:
  heads      held-out rendered heads: from each subject's frontal view the seven anchors and the 48
             views of the ring are sampled and compared with the true renders
  nersemble  the paper's 16 cameras, as data_prep.captures prepares them: models are sampled from the
             image of the central camera and evaluated, like other methods' folders, at the other 15
  folders    views of any method on disk against true ones: a folder for each head, with
             transforms.json (nerfstudio) or images of the same names

--out receives report.html, table.md, scores.json, scores.csv, summary.csv, and images of the worst, the
median and the best subject. Samples are kept in --out/parts: the same command resumes after a kill, and
another one samples only what is missing."""

EXAMPLES = """examples:
  # the table of the README
  python -m spinmeround_jax.evaluate --checkpoint weights/quickstart --data data/heads64

  # the paper's ablations, each trained with --config.ablation.<name>=True, in one table
  python -m spinmeround_jax.evaluate --data data/heads64 --checkpoint full=runs/quickstart/model \\
      --checkpoint "no identity=runs/no_identity/model"

  # other sampling settings: a row for each value, the others as in the checkpoint
  python -m spinmeround_jax.evaluate --checkpoint weights/quickstart --data data/heads64 \\
      --sweep steps=12,48 --sweep guidance_scale=1,3 --sweep temperature=0,1 \\
      --sweep shared_noise=false --sweep anchors=false

  # views of other methods, without the view that was their input
  python -m spinmeround_jax.evaluate --protocol folders --truth truth/ --method ours=out/ \\
      --method theirs=theirs/ --leave-out front

  # the paper's protocol: prepare the photographs, then
  python -m spinmeround_jax.evaluate --protocol nersemble --truth data/nersemble \\
      --checkpoint weights/released --method theirs=theirs/ --recognition glintr100.onnx"""


SAMPLING_OPTIONS = {"sweep", "steps", "guidance_scale", "guide", "sampler", "temperature"}
# Required and allowed options of each protocol, of those that are not for all.
PROTOCOLS = {
    "heads": (
        {"checkpoint", "data"},
        SAMPLING_OPTIONS,
    ),
    "nersemble": (
        {"truth"},
        {"checkpoint", "method", "match", "size", "subject_list"} | SAMPLING_OPTIONS,
    ),
    "folders": ({"truth", "method"}, {"match", "size", "leave_out", "masked"}),
}
SPECIFIC = set().union(*(needed | allowed for needed, allowed in PROTOCOLS.values()))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("spinmeround_jax.evaluate", DESCRIPTION, EXAMPLES)
    path = pathlib.Path
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="heads", help="(heads)")
    parser.add_argument("--out", type=path, default=path("out/evaluation"), help="folder to write")
    parser.add_argument("--subjects", type=cli.integer(1), help="number of subjects (heads: 32)")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="MEASURE", choices=measures.NAMES,
        help=f"leave out this measure; repeat for more: {', '.join(measures.NAMES)}",
    )  # fmt: skip

    files = parser.add_argument_group("measures that need a model file; left out without it")
    files.add_argument(
        "--recognition", type=path, metavar="MODEL",
        help="ArcFace: glintr100.onnx, or the folder of photo.fetch; similarity to the true view",
    )  # fmt: skip
    files.add_argument(
        "--second-recognition", type=path, metavar="MODEL", help="another model of aligned faces"
    )
    files.add_argument(
        "--models", type=path, help="folder of the face detector (as of photo.fetch)"
    )
    files.add_argument(
        "--inception", type=path, metavar="MODEL",
        help="FID's network as ONNX; needs more than 2048 images in total",
    )  # fmt: skip

    views = parser.add_argument_group("folders of views")
    views.add_argument("--truth", type=path, help="one head, or a folder of heads; local")
    views.add_argument(
        "--method", action="append", default=[], metavar="[NAME=]DIR",
        help="views of a method; repeat for several rows",
    )  # fmt: skip
    views.add_argument(
        "--match", choices=("camera", "name"), help="how views are matched (camera, if known)"
    )
    views.add_argument("--size", type=cli.integer(8), help="pixels that all images are resized to")
    views.add_argument(
        "--leave-out", action="append", default=[], metavar="VIEW",
        help="file name of a true view to leave out; `front` is the one at yaw 0, pitch 0",
    )  # fmt: skip
    views.add_argument(
        "--subject-list", type=path, metavar="FILE", help="nersemble: subjects, one per line (all)"
    )
    views.add_argument("--masked", action="store_true", help="white outside of the true mask")

    models = parser.add_argument_group("models")
    models.add_argument(
        "--checkpoint", action="append", default=[], metavar="[NAME=]MODEL",
        help="model to measure: folder, hf://owner/name[@revision] or gs://...; repeat for several rows",
    )  # fmt: skip
    models.add_argument("--data", type=cli.path, help="data_prep's folder, or gs://...")
    models.add_argument(
        "--steps", type=cli.integer(1), help="sampling steps; default: the checkpoint's"
    )
    models.add_argument("--guidance-scale", type=cli.real(), help="default: the checkpoint's")
    models.add_argument(
        "--guide", metavar="MODEL", help="weaker model for autoguidance, as of `sample`"
    )
    models.add_argument("--sampler", choices=sorted(SAMPLERS), help="default: the checkpoint's")
    models.add_argument("--temperature", type=cli.real(0, 1), help="default: the checkpoint's")
    models.add_argument(
        "--sweep", action="append", default=[], metavar="SETTING=VALUE,VALUE[:SETTING=...]",
        help="a row for each value of a sampling setting, or of anchors; for each combination, with ':'",
    )  # fmt: skip
    models.add_argument("--seed", type=cli.integer(), default=0, help="same seed, same result (0)")
    models.add_argument(
        "--max-batch", type=cli.integer(1), default=8, help="examples in one call, per device (8)"
    )
    args = parser.parse_args(argv)
    needed, allowed = PROTOCOLS[args.protocol]
    for name in sorted(SPECIFIC):
        given = getattr(args, name) not in (None, [], False)
        option = f"--{name.replace('_', '-')}"
        if given and name not in needed | allowed:
            raise UsageError(f"{option} is not for --protocol {args.protocol}")
        if not given and name in needed:
            raise UsageError(f"--protocol {args.protocol} needs {option}")
    _check_rows(args)
    return args


def _check_rows(args: argparse.Namespace) -> None:
    """Raises UsageError unless all rows of the table have different names."""
    if args.protocol == "heads":
        heads.check_rows(args)
    rows = [named(item)[0] for item in args.method]
    if len(set(rows)) < len(rows) or "truth" in rows:
        raise UsageError(f"--method: rows would be {rows}; name each method: NAME=DIR")


RUN = {"heads": heads.run, "nersemble": nersemble.run, "folders": folders.run}


def run(args: argparse.Namespace) -> None:
    files.check_writable(args.out)
    result = RUN[args.protocol](args)
    results.write(result, as_json(args), args.out)
    report.write(result, as_json(args), args.out / "report.html")
    for note in result.notes:
        print(f"left out: {note}")
    print(f"\n{results.table(result)}\n\n{result.sentence}.\n\n{published.text(result.protocol)}\n")
    print(f"Open {(args.out / 'report.html').resolve()}")


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


def as_json(args: argparse.Namespace) -> dict:
    """The command line, for scores.json; paths become strings."""
    plain = (str, int, float, list, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items()}


if __name__ == "__main__":
    cli.end(main())
