"""Identity of a face: the 128 numbers of dlib's face recognition ResNet, run by JAX.

The network is He et al.'s ResNet-34 with fewer layers and half the filters (King, dlib-models,
`dlib_face_recognition_resnet_model_v1`, public domain). The weights are those of the npm package
@vladmandic/face-api 1.7.15 (MIT), as it ships them: 8 bits each, with a scale and a minimum a tensor.
See models/NOTICE. `faces` runs ArcFace, for weights that were trained with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spinmeround_jax import ID_EMBEDDING_SIZE
from spinmeround_jax.photo.mediapipe import warp

NAME = "dlib-resnet"
_FOLDER = pathlib.Path(__file__).parent / "models"
_FILES = tuple(
    _FOLDER / name
    for name in ("face_recognition.bin", "face_recognition.json", "face_recognition_centre.npy")
)

_SIDE = 150  # pixels of the aligned face
_MEAN = (122.782, 117.001, 104.298)
_BLOCKS = (
    "conv32_1", "conv32_2", "conv32_3", "conv64_down", "conv64_1", "conv64_2", "conv64_3",
    "conv128_down", "conv128_1", "conv128_2", "conv256_down", "conv256_1", "conv256_2",
    "conv256_down_out",
)  # fmt: skip
# Where dlib places the corners of the eyes (image's left to right) and the base of the nose, with a
# quarter of the face's size around it; fractions of the aligned face.
_POINTS_OF_68 = (36, 39, 42, 45, 33)
_PLACES = (
    np.array([[0.1206, 0.2137], [0.3341, 0.2291], [0.6461, 0.2290], [0.8596, 0.2135], [0.4901, 0.6278]])
    + 0.25
) / 1.5  # fmt: skip


@functools.lru_cache(maxsize=1)
def sha256() -> str:
    """Of the recogniser's files together: what checkpoints record beside NAME."""
    digest = hashlib.sha256()
    for path in _FILES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def embed(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Identity of a face: (512,) float32 of unit length, zero from the 129th number on.

    The mean vector of rendered heads is subtracted first: every face's vector is near it, and without
    it the cosine of two strangers is 0.9. The face and its mirror image are averaged.

    Args:
        image: (h, w, 3) uint8 RGB.
        landmarks: (68, 2 or 3) pixels of the image.
    """
    face = aligned(image, landmarks).astype(np.float32)
    vector = np.asarray(_network(_weights(), np.stack([face, face[:, ::-1]]))).mean(axis=0)
    vector = vector - np.load(_FILES[2], allow_pickle=False)
    out = np.zeros(ID_EMBEDDING_SIZE, np.float32)  # the network has 128 numbers
    out[: len(vector)] = vector / np.linalg.norm(vector)
    return out


def is_one(vector: np.ndarray) -> bool:
    """Whether a (512,) vector can be one of this network's."""
    return not vector[128:].any()


def aligned(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """(150, 150, 3) uint8: the face upright and in its place, by least squares over five points."""
    points = np.asarray(landmarks, np.float64)[list(_POINTS_OF_68), :2]
    places = _SIDE * _PLACES
    seen = (points - points.mean(axis=0)) @ [1, 1j]
    wanted = (places - places.mean(axis=0)) @ [1, 1j]
    turn = np.vdot(wanted, seen) / np.vdot(wanted, wanted)  # aligned face to image
    middle = turn * ((_SIDE / 2 - places.mean(axis=0)) @ [1, 1j])
    centre = points.mean(axis=0) + [middle.real, middle.imag]
    return warp(image, centre, _SIDE * abs(turn), float(np.angle(turn)), _SIDE)


@functools.lru_cache(maxsize=1)
def _weights() -> dict[str, np.ndarray]:
    data = _FILES[0].read_bytes()
    weights, at = {}, 0
    for entry in json.loads(_FILES[1].read_text())[0]["weights"]:
        kind = np.dtype(np.uint8 if "quantization" in entry else "<f4")
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(data, kind, count, at).reshape(entry["shape"])
        at += count * kind.itemsize
        if "quantization" in entry:
            values = values * entry["quantization"]["scale"] + entry["quantization"]["min"]
        weights[entry["name"]] = values.astype(np.float32)
    return weights


@jax.jit
def _network(weights: dict[str, jax.Array], faces: jax.Array) -> jax.Array:
    """(n, 150, 150, 3) in [0, 255] -> (n, 128)."""
    x = (faces - jnp.array(_MEAN)) / 256.0
    x = jax.nn.relu(_convolved(weights, "conv32_down", x, 2))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
    for name in _BLOCKS:
        x = _block(weights, name, x, 2 if "down" in name else 1)
    return x.mean(axis=(1, 2)) @ weights["fc"]


def _block(weights: dict[str, jax.Array], name: str, x: jax.Array, stride: int) -> jax.Array:
    y = jax.nn.relu(_convolved(weights, f"{name}/conv1", x, stride))
    y = _convolved(weights, f"{name}/conv2", y, 1)
    if stride == 2:
        x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0
    # dlib adds what is not of one size by filling up with zeros.
    shape = np.maximum(x.shape, y.shape)
    x, y = (jnp.pad(z, [(0, n - m) for n, m in zip(shape, z.shape, strict=True)]) for z in (x, y))
    return jax.nn.relu(x + y)


def _convolved(weights: dict[str, jax.Array], name: str, x: jax.Array, stride: int) -> jax.Array:
    kernel = weights[f"{name}/conv/filters"]
    pad = 0 if stride == 2 else kernel.shape[0] // 2
    x = lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x + weights[f"{name}/conv/bias"]
    return x * weights[f"{name}/scale/weights"] + weights[f"{name}/scale/biases"]
