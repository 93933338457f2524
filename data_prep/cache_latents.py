"""Encodes the images of a data set once, so that training need not do it in every step."""

import argparse
import pathlib
import sys

from spinmeround_jax import checkpoints, files
from spinmeround_jax.data import latent_cache
from spinmeround_jax.files import InputError

EXAMPLES = """examples:
  # with the autoencoder of a training run, or of a converted or finished model
  python -m data_prep.cache_latents --checkpoint runs/quickstart/autoencoder \\
      --data data/heads64 --out data/heads64/latents

  # the second of four machines that share the work
  python -m data_prep.cache_latents --checkpoint converted/ --data data/panohead512 \\
      --out data/panohead512/latents --part 1/4

--data and --out may be gs://... A killed run goes on where it was. Then, for training:
--config.latents.directory=data/heads64/latents
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.cache_latents",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, required=True, help="local, with model.json"
    )
    parser.add_argument("--data", type=files.path_argument, required=True, help="folder of shards")
    parser.add_argument("--out", type=files.path_argument, required=True, help="to write")
    parser.add_argument("--split", default="train", help="(train)")
    parser.add_argument(
        "--backgrounds", type=int, default=2,
        help="random colours per subject, beside white, for data.random_background (2)",
    )  # fmt: skip
    parser.add_argument(
        "--normals-frame", choices=("camera", "world"), default="camera",
        help="config.model.normals_frame of the training (camera)",
    )  # fmt: skip
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="(0/1, all)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at once (32)")
    args = parser.parse_args(argv)
    try:
        autoencoder = checkpoints.load_autoencoder(args.checkpoint)
        latent_cache.cache_latents(
            autoencoder,
            latent_cache.folder(args.out, autoencoder, args.normals_frame),
            args.data,
            backgrounds=args.backgrounds,
            normals_frame=args.normals_frame,
            split=args.split,
            part=args.part,
            batch_size=args.batch_size,
        )
    except (InputError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the next shard", file=sys.stderr)
        return 130
    return 0


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1")
    return int(first), int(count)


if __name__ == "__main__":
    sys.exit(main())
