"""Serve the page to drop photos into: `python -m spinmeround_jax.app --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import os
import pathlib
import sys
import tempfile
import time

from spinmeround_jax import cli, files, sample
from spinmeround_jax.app.work import Studio, Weights
from spinmeround_jax.cli import UsageError
from spinmeround_jax.weights import remote

DESCRIPTION = """A page in the browser: drop a photo, or three of one person, correct the crop, spin the head,
make it 3D, download views, splats and mesh. Everything runs on this machine, and nothing leaves it."""

EXAMPLES = """examples:
  python -m spinmeround_jax.app                                    # then open http://127.0.0.1:7860
  python -m spinmeround_jax.app --checkpoint weights/a weights/b   # chosen between on the page

  # for others on the network; people.txt has a line NAME:PASSWORD for each
  python -m spinmeround_jax.app --host 0.0.0.0 --auth people.txt"""

SHIPPED = pathlib.Path(__file__).parents[2] / "weights" / "quickstart"
HERE = ("127.0.0.1", "localhost", "::1")
MAX_AUTH_BYTES = 1 << 20


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("spinmeround_jax.app", DESCRIPTION, EXAMPLES)
    path = pathlib.Path
    parser.add_argument(
        "--checkpoint", nargs="+", default=[str(SHIPPED)], metavar="MODEL",
        help="folders with model.json, hf://owner/name[@revision] or gs://... (weights/quickstart)",
    )  # fmt: skip
    parser.add_argument("--host", default=HERE[0], help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=cli.integer(1, 65535), default=7860, help="(7860)")
    parser.add_argument(
        "--auth", type=path, metavar="FILE", help="who may come in: lines of NAME:PASSWORD"
    )
    parser.add_argument("--models", type=path, help="insightface's folder (as of photo.fetch)")
    parser.add_argument(
        "--max-batch", type=cli.integer(1), metavar="N",
        help="joint samples at once; lower it when memory runs out (2 on a CPU, else 8)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--no-compilation-cache", action="store_true",
        help="do not keep compiled programs for the next start",
    )  # fmt: skip
    return parser


def read_auth(path: pathlib.Path) -> list[tuple[str, str]]:
    """Names and passwords.

    Raises:
        UsageError: no such file, or a line that is not NAME:PASSWORD.
    """
    try:
        lines = files.read_bytes(path, MAX_AUTH_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--auth {path}: cannot be read ({cli.message(error)})") from error
    pairs = [line.strip().partition(":") for line in lines if line.strip()]
    if not pairs or not all(name and password for name, _, password in pairs):
        raise UsageError(f"--auth {path}: expected a line NAME:PASSWORD for each person")
    return [(name, password) for name, _, password in pairs]


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        InputError: a model cannot be read, or others could come in without a password.
    """
    if args.host not in HERE and args.auth is None:
        raise UsageError(
            f"--host {args.host}: others could use this machine; say who may with --auth FILE"
        )
    auth = None if args.auth is None else read_auth(args.auth)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    names = [remote.locate(checkpoint).name for checkpoint in args.checkpoint]
    if len(set(names)) < len(names):
        raise UsageError("--checkpoint: two models have the same name; rename a folder")
    with tempfile.TemporaryDirectory(prefix="spinmeround-") as folder:
        # Gradio reads these when it is imported: uploads go where they are removed, nothing is reported.
        os.environ["GRADIO_TEMP_DIR"] = str(pathlib.Path(folder, "uploads"))
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_OFFLINE"] = "1"
        if (
            "huggingface_hub" in sys.modules
        ):  # a model came from there, and it has read its environment
            sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True
        from spinmeround_jax.app import page

        if not args.no_compilation_cache:
            sample.use_compilation_cache()
        loaded = []
        for checkpoint in args.checkpoint:
            weights = Weights(checkpoint, args.models, dtype=args.dtype, max_batch=args.max_batch)
            print(f"{weights.name}: compiling, once for all ...", end=" ", flush=True)
            began = time.monotonic()
            weights.compile()
            print(f"{time.monotonic() - began:.0f} s", flush=True)
            loaded.append(weights)
        page.serve(Studio(loaded, pathlib.Path(folder)), args.host, args.port, auth)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.main(build_parser().parse_args, run, argv, "temporary files are removed")


if __name__ == "__main__":
    cli.end(main(sys.argv[1:]))
