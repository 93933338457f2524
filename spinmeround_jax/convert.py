"""Weights of others into a model folder, and a model into the formats of others: `... convert --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import collections
import contextlib
import dataclasses
import datetime
import math
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import spinmeround_jax
from spinmeround_jax import checkpoints, cli, files, models
from spinmeround_jax.cli import UsageError
from spinmeround_jax.files import InputError
from spinmeround_jax.models import ModelConfig, parameters
from spinmeround_jax.training import run_checkpoints
from spinmeround_jax.weights import card, diffusers, export, mapping, released, sources
from spinmeround_jax.weights.sources import TensorFile

DESCRIPTION = """Pretrained PyTorch weights -> a model folder for sample, or for train to start from; and back.

Either the released SpinMeRound checkpoint, or an initialisation for training at full size: the
autoencoder of Stable Diffusion 1.5 with the UNet and the text encoder of Arc2Face. Every tensor of
the files is used exactly once or reported as left out; a tensor that is missing, unknown or of the
wrong shape is an error that names it. The SHA-256 of every file goes into model.json.

--export writes a model as safetensors: one file with the names of the released checkpoint, or folders
of diffusers and transformers."""

EXAMPLES = """examples:
  # the released weights, to sample from
  python -m spinmeround_jax.convert --released spmr.ckpt --out weights/released
  python -m spinmeround_jax.sample --checkpoint weights/released --input portraits/ --out out/

  # as above in half the space; weights are rounded
  ... --dtype float16

  # the newest checkpoint of an unfinished training, with averaged weights; or an earlier one, without
  python -m spinmeround_jax.convert --run runs/quickstart --out weights/so-far
  python -m spinmeround_jax.convert --run runs/quickstart --step 8000 --no-ema --out weights/step8000

  # the initialisation of configs/tpu_v4.py; both folders as diffusers and Arc2Face publish them
  python -m spinmeround_jax.convert --sd15 stable-diffusion-v1-5/ --arc2face models/ \\
      --out weights/init

  # a model for others: with the release's names, or for diffusers and transformers
  python -m spinmeround_jax.convert --export released --checkpoint runs/quickstart/model --out export/
  python -m spinmeround_jax.convert --export diffusers --checkpoint hf://owner/name --out export/

.ckpt and .bin files need PyTorch: pip install 'spinmeround_jax[convert]'"""

# Subfolders and files to look for, in this order; Arc2Face's own names come first.
_UNET_FOLDERS = ("arc2face", "unet")
_TEXT_FOLDERS = ("encoder", "text_encoder")
_AUTOENCODER_FOLDERS = ("vae", ".")
_DIFFUSERS_FILES = tuple(
    f"diffusion_pytorch_model{variant}.{suffix}"
    for variant in ("", ".fp16")
    for suffix in ("safetensors", "bin", "safetensors.index.json")
)
_TRANSFORMERS_FILES = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "model.fp16.safetensors", "pytorch_model.fp16.bin",
)  # fmt: skip

MODEL_CONTENT = frozenset({"model.json", "weights", checkpoints.SUMS})
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Part:
    """Networks that are read from one file.

    Attributes:
        targets: by network ("unet"), then by the name of the tensor.
        unused: pattern of names -> reason why no network needs these tensors.
    """

    file: TensorFile
    targets: Mapping[str, Mapping[str, mapping.Target]]
    unused: Mapping[str, str]

    def set_aside(self) -> dict[str, list[str]]:
        """Names of unused tensors by pattern."""
        used = {name for targets in self.targets.values() for name in targets}
        return mapping.set_aside((n for n in self.file.shapes if n not in used), self.unused)

    def check(self) -> None:
        """Raises InputError naming the file and every tensor that does not fit."""
        expected = {name: t for targets in self.targets.values() for name, t in targets.items()}
        aside = {name for names in self.set_aside().values() for name in names}
        found = {name: shape for name, shape in self.file.shapes.items() if name not in aside}
        try:
            mapping.check(mapping.source_shapes(expected), found)
        except ValueError as error:
            raise InputError(
                f"{self.file.path}: not the weights of {', '.join(self.targets)}: {error}"
            ) from error
        kinds = {name: self.file.dtypes[name] for name in expected}
        if odd := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in _FLOATS]:
            raise InputError(f"{self.file.path}: expected floating-point numbers: {odd[:20]}")

    def dtypes(self) -> set[str]:
        return {self.file.dtypes[name] for targets in self.targets.values() for name in targets}


# --------------------------------------------------------------------------------------------------
# Which file fills which network


def released_parts(networks: Mapping[str, nnx.Module], file: TensorFile) -> list[Part]:
    """All networks from one file in the names of the release."""
    targets = {name: released.targets(module) for name, module in networks.items()}
    return [Part(file, targets, released.UNUSED)]


def initial_parts(
    networks: Mapping[str, nnx.Module], sd15: pathlib.Path, arc2face: pathlib.Path
) -> list[Part]:
    """The autoencoder from `sd15` (file or folder), the others from the folder `arc2face`."""
    if sd15.is_dir():
        sd15 = find(sd15, _AUTOENCODER_FOLDERS, _DIFFUSERS_FILES)
    files = {
        "autoencoder": sources.open_file(sd15),
        "unet": sources.open_file(find(arc2face, _UNET_FOLDERS, _DIFFUSERS_FILES)),
        "identity": sources.open_file(find(arc2face, _TEXT_FOLDERS, _TRANSFORMERS_FILES)),
    }
    parts = []
    for name, file in files.items():
        targets, unused = diffusers.targets(networks[name], file.shapes), diffusers.UNUSED
        if any(tensor.startswith(released.AUTOENCODER_PREFIX) for tensor in file.shapes):
            # All of Stable Diffusion in one file, as originally published.
            targets = released.targets(networks[name])
            unused = released.UNUSED_BESIDE_AUTOENCODER
        parts.append(Part(file, {name: targets}, unused))
    return parts


def find(folder: pathlib.Path, inside: tuple[str, ...], names: tuple[str, ...]) -> pathlib.Path:
    """The first existing file of `names` in the subfolders `inside` of `folder`; InputError if none."""
    for part in inside:
        for name in names:
            if (path := folder / part / name).is_file():
                return path
    wanted = " or ".join(f"{part}/{names[0]}".removeprefix("./") for part in inside)
    raise InputError(f"{folder}: found none of {wanted} (or {', '.join(names[1:])})")


# --------------------------------------------------------------------------------------------------
# Conversion


def convert(
    parts: list[Part],
    out: pathlib.Path,
    config: ModelConfig,
    dtype: str | None,
    known: Mapping[str, Any],
) -> None:
    """Write the model folder `out`, which must not exist, from `parts`.

    Args:
        parts: emptied after reading, to free the memory of the files.
        dtype: "float32" or "float16"; None is float16 if all tensors are, else float32, so that nothing
            but float64 is rounded.
        known: provenance of the weights, for model.json.

    Raises:
        InputError: a file does not fit or cannot be read.
    """
    for part in parts:
        part.check()
    del part
    kinds = set().union(*(part.dtypes() for part in parts))
    dtype = dtype or ("float16" if kinds == {"float16"} else "float32")
    targets = [t for part in parts for named in part.targets.values() for t in named.values()]
    _check_space(out, sum(math.prod(t.shape) for t in targets), np.dtype(dtype))
    earlier = known.get("sources")
    provenance = {
        **known,
        "converted": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "converter": f"spinmeround_jax {spinmeround_jax.__version__}",
        "dtype": dtype,
        "sources": [_describe(part) for part in parts]
        + (earlier if isinstance(earlier, list) else []),
    }
    weights = _read(parts, np.dtype(dtype))
    parts.clear()
    print("writing")
    checkpoints.save_weights(out, config, weights, provenance)


def convert_run(
    run: pathlib.Path, step: int | None, average: bool, out: pathlib.Path, dtype: str
) -> None:
    """Write the model folder `out` from a checkpoint of the training in `run`.

    Raises:
        InputError: no such checkpoint, or it cannot be read.
        ValueError: a weight is not finite in `dtype`.
    """
    from spinmeround_jax.data.manifest import training_provenance  # needs the extra [train]

    step, config, history, model = run_checkpoints.load_trained(run, step, average)
    steps = sum(stage.steps for stage in config.stages)
    provenance = {
        "kind": f"training, {'average of the ' if average else ''}weights at step {step} of {steps}",
        **training_provenance(config, step, history),
    }
    checkpoints.save_model(out, model, provenance, np.dtype(dtype))


def export_model(checkpoint: str, format_: str, out: pathlib.Path, dtype: str) -> None:
    """Write the model of `checkpoint` into the folder `out` as others read it.

    Raises:
        InputError: it cannot be read, or has parts that the format has no place for.
    """
    config = checkpoints.describe(checkpoint).config
    try:
        export.check(config, format_)
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}") from error
    save = sources.saver()
    sizes = {
        name: parameters.count(parameters.split(module)[1])
        for name, module in networks_of(config).items()
    }
    _check_space(out, sum(sizes.values()), np.dtype(dtype))
    provenance = checkpoints.read_provenance(checkpoint)
    described = checkpoints.description_text(config, provenance)
    model = checkpoints.load_model(checkpoint)
    print("writing")
    export.write(out, model, format_, np.dtype(dtype), described, save)
    (out / checkpoints.CARD).write_text(card.text(config, provenance, sizes, format_))


def _check_space(out: pathlib.Path, count: int, dtype: np.dtype) -> None:
    free, needed = shutil.disk_usage(files.existing(out.parent)).free, count * dtype.itemsize
    if free < needed:
        raise UsageError(
            f"--out: {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free"
        )


def _describe(part: Part) -> dict[str, Any]:
    """The file for model.json; prints which tensors were left out."""
    file = part.file
    described = {path: _hashed(path) for path in (file.path, *file.shards)}
    unused = {pattern: len(names) for pattern, names in part.set_aside().items()}
    for pattern, count in unused.items():
        print(f"  left out: {count} x {pattern} ({part.unused[pattern]})")
    if file.bookkeeping:
        print(f"  left out: {', '.join(file.bookkeeping)} (training state)")
    if file.objects:
        print(f"  left out: {len(file.objects)} entries that are not tensors")
    return {
        "networks": list(part.targets),
        **described.pop(file.path),
        **({"shards": list(described.values())} if described else {}),
        "unused": unused,
        "bookkeeping": file.bookkeeping,
        "objects": len(file.objects),
    }


def _hashed(path: pathlib.Path) -> dict[str, Any]:
    size = path.stat().st_size
    with _bar(f"SHA-256 of {path.name}", size) as bar:
        digest = files.sha256(path, bar.update)
    print(f"{path}: SHA-256 {digest}")
    return {"file": path.name, "bytes": size, "sha256": digest}


def _read(parts: list[Part], dtype: np.dtype) -> dict[str, dict[str, jax.Array]]:
    """Parameters by network, converted and checked one tensor at a time."""
    weights: dict[str, dict[str, jax.Array]] = collections.defaultdict(dict)
    every = [
        (part.file, network, source, target)
        for part in parts
        for network, targets in part.targets.items()
        for source, target in targets.items()
    ]
    total = sum(math.prod(target.shape) * dtype.itemsize for *_, target in every)
    with _bar("converting", total) as bar:
        for file, network, source, target in every:
            value = target.value(file.read(source), dtype)
            if not np.isfinite(value).all():
                raise InputError(f"{file.path}: {source} is not finite as {dtype.name}")
            weights[network][target.name] = jnp.asarray(value)
            bar.update(value.nbytes)
    return dict(weights)


def _bar(title: str, total: int) -> tqdm:
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, dynamic_ncols=True)


def networks_of(config: ModelConfig) -> dict[str, nnx.Module]:
    """The three networks, shapes only."""
    return nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)).networks)


# --------------------------------------------------------------------------------------------------
# The output folder


@contextlib.contextmanager
def new_folder(
    out: pathlib.Path, overwrite: bool, content: Collection[str] = MODEL_CONTENT
) -> Iterator[pathlib.Path]:
    """`files.new_folder` for `out`; UsageError if `out` cannot be written or must not be replaced."""
    out = out.absolute()
    files.recover(out)
    if out.exists() or out.is_symlink():
        check_replaceable(out, overwrite, content)
    try:
        files.check_writable(out.parent)
    except InputError as error:
        raise UsageError(f"--out {error}") from error
    with files.new_folder(out) as folder:
        yield folder


def check_replaceable(out: pathlib.Path, overwrite: bool, content: Collection[str]) -> None:
    """Raises UsageError unless `out` is an empty folder, or holds `content` that may be overwritten."""
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"--out {out}: is a file or a link; choose another name")
    inside = {path.name for path in out.iterdir()}
    if inside - {*content, checkpoints.CARD}:
        raise UsageError(f"--out {out}: the folder holds other things; choose another name")
    if inside and not overwrite:
        raise UsageError(f"--out {out}: there is a model; --overwrite replaces it")


# --------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    path = pathlib.Path
    parser = cli.build_parser("spinmeround_jax.convert", DESCRIPTION, EXAMPLES)
    what = parser.add_argument_group(
        "what to convert: --released, --run, --sd15 with --arc2face, or --export with --checkpoint"
    )
    what.add_argument(
        "--released", type=path, metavar="FILE", help="released checkpoint: .ckpt or .safetensors"
    )
    what.add_argument(
        "--sd15", type=path, metavar="PATH",
        help="Stable Diffusion 1.5: the diffusers folder (or its vae/), or one weights file",
    )  # fmt: skip
    what.add_argument(
        "--arc2face", type=path, metavar="DIR",
        help="folder with arc2face/ (UNet) and encoder/ (text encoder)",
    )  # fmt: skip
    what.add_argument(
        "--run",
        type=path,
        metavar="DIR",
        help="the --workdir of a training, finished or not",
    )
    what.add_argument(
        "--step", type=cli.integer(), help="with --run: step of a checkpoint (the newest)"
    )
    what.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True,
        help="with --run: the moving average of the weights, or the weights (average)",
    )  # fmt: skip
    what.add_argument(
        "--export", choices=export.FORMATS,
        help="write the model --checkpoint with the release's names, or for diffusers",
    )  # fmt: skip
    what.add_argument(
        "--checkpoint", metavar="MODEL",
        help="with --export: folder with model.json, hf://owner/name[@revision] or gs://bucket/folder",
    )  # fmt: skip
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"),
        help="of the stored weights (float16 if all tensors are, else float32: nothing is rounded; "
        "--run: float16, --export: float32)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    return parser


def run(args: argparse.Namespace, config: ModelConfig) -> None:
    """Carry out the command for weights of `config`; InputError if nothing was written."""
    given = [args.released, args.run, args.sd15, args.export]
    if sum(value is not None for value in given) != 1 or (args.sd15 is None) != (
        args.arc2face is None
    ):
        raise UsageError(
            "give --released FILE, --run DIR, --sd15 PATH with --arc2face DIR, or --export FORMAT with "
            "--checkpoint MODEL"
        )
    if (args.export is None) != (args.checkpoint is None):
        raise UsageError("--export FORMAT and --checkpoint MODEL need each other")
    if args.run is None and (args.step is not None or not args.ema):
        raise UsageError("--step and --no-ema need --run DIR")
    if args.export is not None:
        with new_folder(args.out, args.overwrite, export.CONTENT[args.export]) as folder:
            export_model(args.checkpoint, args.export, folder, args.dtype or "float32")
        print(f"The exported model is in {args.out}")
        return
    with new_folder(args.out, args.overwrite) as folder:
        if args.run is not None:
            convert_run(args.run, args.step, args.ema, folder, args.dtype or "float16")
        elif args.released is not None:
            file = sources.open_file(args.released)
            known: dict[str, Any] = {"kind": "released weights"}
            if export.METADATA in file.metadata:  # it was written by --export
                described = file.metadata[export.METADATA].encode()
                config, known = checkpoints.parse_description(
                    described, f"{args.released} (metadata)"
                )
            parts = released_parts(networks_of(config), file)
            del file  # `convert` frees its memory
            convert(parts, folder, config, args.dtype, known)
        else:
            parts = initial_parts(networks_of(config), args.sd15, args.arc2face)
            known = {"kind": "initialisation for training"}
            convert(parts, folder, config, args.dtype, known)
    print(f"The model is in {args.out}")


def main(argv: list[str] | None = None, config: ModelConfig | None = None) -> int:
    parse = build_parser().parse_args
    return cli.main(
        parse,
        lambda args: run(args, config or ModelConfig.full_size()),
        argv,
        "nothing was written",
    )


if __name__ == "__main__":
    cli.end(main())
