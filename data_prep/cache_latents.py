"""Encodes the images of a data set once, so that training need not do it in every step."""

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import pathlib

from spinmeround_jax import checkpoints, cli
from spinmeround_jax.data import latent_cache

EXAMPLES = """examples:
  # with the autoencoder of a training run, or of a converted or finished model
  python -m data_prep.cache_latents --checkpoint runs/quickstart/autoencoder \\
      --data data/heads64 --out data/heads64/latents

  # the second of four machines that share the work
  python -m data_prep.cache_latents --checkpoint converted/ --data data/panohead512 \\
      --out data/panohead512/latents --shard 1/4

--data and --out may be gs://... A killed run resumes. Then, for training:
--config.latents.directory=data/heads64/latents
"""


def run(args: argparse.Namespace) -> None:
    autoencoder = checkpoints.load_autoencoder(args.checkpoint)
    folder = latent_cache.folder(args.out, autoencoder, args.normals_frame)
    latent_cache.cache_latents(
        autoencoder,
        folder,
        args.data,
        backgrounds=args.backgrounds,
        normals_frame=args.normals_frame,
        split=args.split,
        part=args.shard,
        batch_size=args.batch_size,
    )
    print(f"The latents are in {folder}; to train on them: --config.latents.directory={args.out}")


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser("data_prep.cache_latents", __doc__, EXAMPLES)
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, required=True, help="local, with model.json"
    )
    parser.add_argument("--data", type=cli.path, required=True, help="folder of shards")
    parser.add_argument("--out", type=cli.path, required=True, help="to write")
    parser.add_argument("--split", default="train", help="(train)")
    parser.add_argument(
        "--backgrounds", type=cli.integer(), default=2,
        help="random colours per subject, beside white, for data.random_background (2)",
    )  # fmt: skip
    parser.add_argument(
        "--normals-frame", choices=("camera", "world"), default="camera",
        help="config.model.normals_frame of the training (camera)",
    )  # fmt: skip
    parser.add_argument("--shard", type=cli.part, default=(0, 1), metavar="I/N", help="(0/1, all)")
    parser.add_argument("--batch-size", type=cli.integer(1), default=32, help="images at once (32)")
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
