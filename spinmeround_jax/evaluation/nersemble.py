"""The protocol `nersemble`: the paper's capture of 16 cameras, prepared by `data_prep.captures`.

Models are sampled from the input camera's image at the other cameras into folders of views, which are
then judged as everybody else's are. What the paper leaves open is in nersemble.json, as our choice.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from spinmeround_jax import cameras, schema
from spinmeround_jax.evaluation import folders, sampling, view_folders
from spinmeround_jax.evaluation.models import Candidate, named, row_name
from spinmeround_jax.evaluation.parts import environment, stamp_of
from spinmeround_jax.evaluation.results import Result
from spinmeround_jax.evaluation.sampling import Variant
from spinmeround_jax.evaluation.view_folders import Frame
from spinmeround_jax.files import InputError, new_folder
from spinmeround_jax.photo import portraits
from spinmeround_jax.photo.images import to_uint8
from spinmeround_jax.results import transforms

MADE_OF = "made_of.json"


def read_protocol() -> dict[str, Any]:
    """nersemble.json."""
    file = importlib.resources.files("spinmeround_jax.evaluation") / "nersemble.json"
    return json.loads(file.read_text(encoding="utf-8"))


def read_list(path: pathlib.Path) -> list[str]:
    """Subjects, one a line; what follows a # is a remark.

    Raises:
        InputError: there are none, or one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path}: expected subjects, one a line, none twice")
    return names


def run(args: argparse.Namespace) -> Result:
    """Sample every model, then judge models and other methods.

    Raises:
        ValueError, OSError: naming what cannot be used.
    """
    protocol = read_protocol()
    candidates = [Candidate(item, args) for item in args.checkpoint]
    truth = view_folders.find_heads(args.truth / "views")
    if args.subject_list:
        wanted = read_list(args.subject_list)
        if missing := [name for name in wanted if name not in truth]:
            raise InputError(
                f"{args.truth}: {missing[0]} and {len(missing) - 1} more of {args.subject_list} are "
                "not there; prepare them with data_prep.captures, or take them off the list"
            )
        truth = {name: truth[name] for name in wanted}
    truth = dict(list(truth.items())[: args.subjects])
    frames = {name: view_folders.read_frames(folder) for name, folder in truth.items()}
    for name, its in frames.items():
        if missing := [s for s in protocol["cameras"] if serial_of(its, s) is None]:
            raise InputError(
                f"{truth[name]}: no image of {len(missing)} of the {len(protocol['cameras'])} "
                f"cameras, such as {missing[0]}; the protocol wants all"
            )
    methods: dict[str, pathlib.Path] = {}
    for candidate in candidates:
        for variant in candidate.variants:
            out = args.out / "sampled" / row_name(candidate.name, variant).replace("/", "_")
            _sample(candidate, variant, truth, frames, out, args)
            methods[row_name(candidate.name, variant)] = out
    methods |= dict(named(item) for item in args.method)
    if not methods:
        raise ValueError("--protocol nersemble needs --checkpoint or --method")
    judged = set(protocol["cameras"]) - {protocol["input_camera"]}
    result = folders.judge(
        args,
        truth,
        methods,
        "nersemble",
        masked=True,
        judged=lambda frame: any(serial in frame.name for serial in judged),
        details={
            "models": {candidate.name: candidate.about() for candidate in candidates},
            "nersemble": protocol,
        },
    )
    if len(truth) != protocol["identities"]:
        result.notes.insert(0, f"{len(truth)} subjects, the paper has {protocol['identities']}")
    return result


def serial_of(frames: list[Frame], serial: str) -> Frame | None:
    """The image that a camera took."""
    return next((frame for frame in frames if serial in frame.name), None)


def _sample(
    candidate: Candidate,
    variant: Variant,
    truth: Mapping[str, pathlib.Path],
    frames: Mapping[str, list[Frame]],
    out: pathlib.Path,
    args: argparse.Namespace,
) -> None:
    """A folder of views for each subject in `out`; those that are there and of the same are kept."""
    serial = read_protocol()["input_camera"]
    recogniser = portraits.recogniser_of(candidate.description.provenance).get("sha256")
    identities = {
        name: portraits.identity_for(_portrait(args.truth, name), recogniser) for name in truth
    }
    wanted = {
        name: {
            **candidate.decided_by(variant),
            "environment": environment(),
            "seed": (args.seed + zlib.crc32(name.encode())) % 2**31,  # whoever else is there
            "truth": stamp_of(truth[name]),
            "identity": identities[name].tolist(),
        }
        for name in truth
    }
    missing = [name for name in truth if not _is_made(out / name, wanted[name])]
    if not missing:
        return
    size = candidate.description.config.image_size
    with tqdm(desc=out.name, unit="subject", total=len(missing)) as bar:
        pipeline = candidate.pipeline(variant, bar)
        for name in missing:
            angles = relative_angles(frames[name], serial)
            image, _, _ = view_folders.load(serial_of(frames[name], serial), size)
            seeds = [wanted[name]["seed"]]
            head = sampling.spin(
                pipeline, variant, image[None, None], identities[name][None], angles, seeds
            )
            _write(out / name, frames[name], head.images[0], wanted[name])
            bar.update()


def _portrait(root: pathlib.Path, name: str) -> pathlib.Path:
    return root / "portraits" / f"{name}.png"


def relative_angles(frames: list[Frame], serial: str) -> np.ndarray:
    """(n, 2) yaw and pitch of all cameras as seen from the input camera, which is (0, 0)."""
    poses = np.stack([frame.world_to_camera for frame in frames])
    reference = serial_of(frames, serial).world_to_camera
    return np.stack(cameras.yaw_pitch(cameras.relative_to(reference, poses)), axis=-1)


def _is_made(folder: pathlib.Path, of: dict[str, Any]) -> bool:
    try:
        return not schema.differences(schema.read(folder / MADE_OF, schema.record({})), of)
    except (OSError, ValueError):
        return False


def _write(
    folder: pathlib.Path, frames: list[Frame], images: np.ndarray, made_of: dict[str, Any]
) -> None:
    """Views under the truth's names and cameras, whole or not at all."""
    size = images.shape[1]
    focal = frames[0].focal * size
    camera = transforms.Intrinsics((focal, focal), (size / 2, size / 2), (size, size))
    views = []
    with new_folder(folder) as unfinished:
        (unfinished / "views").mkdir()
        for frame, pixels in zip(frames, to_uint8(images), strict=True):
            name = f"views/{frame.name}.png"
            Image.fromarray(pixels).save(unfinished / name)
            views.append(transforms.View(name, frame.world_to_camera, camera))
        transforms.write(unfinished / transforms.NAME, views)
        (unfinished / MADE_OF).write_text(json.dumps(made_of))
