"""Frechet Inception Distance (Heusel et al., arXiv 1706.08500): how alike two sets of images are.

The network is not shipped: it is the Inception-V3 of 2015-12-05 that published FIDs use, as an ONNX file
that takes (b, 3, 299, 299) in [-1, 1] and gives the (b, 2048) of the last pooling. pytorch-fid has it:

    import torch
    from pytorch_fid.inception import InceptionV3

    network = InceptionV3([3], resize_input=False, normalize_input=False).eval()
    torch.onnx.export(network, torch.zeros(2, 3, 299, 299), "inception.onnx", input_names=["x"],
                      dynamic_axes={"x": {0: "b"}}, dynamo=False)

Images are enlarged as clean-fid does (Parmar et al., arXiv 2104.11222): bicubic, in floating point.
"""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from spinmeround_jax import files
from spinmeround_jax.files import InputError

FEATURES = 2048
SIDE = 299
BATCH = 32
INSTALL = "pip install 'spinmeround_jax[photo]'"


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of the sets' covariances A and B, in float64.

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), whose eigenvalues are real: unlike the
    usual root of A B it needs no repair when A or B is nearly singular.

    Args:
        features_a, features_b: (n, d) and (m, d), one row per image.

    Raises:
        ValueError: n or m is not larger than d, so that a covariance lacks directions and the distance
            says how few images there were; at 2048 features the least is 2049 a side. The bias falls
            as 1 / n: compare only equal counts, and 10,000 or more with published figures. Also if
            shapes do not fit or a number is not finite.
    """
    sets = [np.asarray(features, np.float64) for features in (features_a, features_b)]
    if any(x.ndim != 2 for x in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"expected (n, d) and (m, d), got {sets[0].shape} and {sets[1].shape}")
    dimensions = sets[0].shape[1]
    if min(len(x) for x in sets) <= dimensions:
        raise ValueError(
            f"a Frechet distance of {dimensions} features needs more than {dimensions} images on "
            f"each side, got {len(sets[0])} and {len(sets[1])}"
        )
    if not all(np.isfinite(x).all() for x in sets):
        raise ValueError("features hold numbers that are not finite")
    (mean_a, covariance_a), (mean_b, covariance_b) = (_moments(x) for x in sets)
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    middle = root @ covariance_b @ root
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2.0), 0.0)).sum()
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * overlap
    return float(np.sum((mean_a - mean_b) ** 2) + max(spread, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d)."""
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


class InceptionFeatures:
    """Images to the 2048 numbers that FID compares. `sha256` identifies the file.

    Args:
        path: the ONNX file, see this module's text.

    Raises:
        InputError: onnxruntime or the file is missing, or it is not that network.
    """

    def __init__(self, path: pathlib.Path | str):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise InputError(
                f"{self.path}: no such file; spinmeround_jax/evaluation/fid.py says how to make it"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"Inception is run by onnxruntime; {INSTALL} ({error})") from error
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path), providers=onnxruntime.get_available_providers()
            )
        except Exception as error:  # onnxruntime raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.path}: not a readable ONNX model ({reason})") from error
        self.sha256 = files.sha256(self.path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        expected = (3, SIDE, SIDE)
        shape = inputs[0].shape
        fits = len(inputs) == 1 and len(shape) == 4 and inputs[0].type == "tensor(float)"
        if not fits or any(
            isinstance(n, int) and n != m for n, m in zip(shape[1:], expected, strict=True)
        ):
            raise InputError(
                f"{self.path}: takes {inputs[0].type} {shape}, expected floats (b, 3, {SIDE}, {SIDE})"
            )
        given = outputs[0].shape[1:]  # (2048,) or, as poolings leave it, (2048, 1, 1)
        if all(isinstance(n, int) for n in given) and np.prod(given) != FEATURES:
            raise InputError(
                f"{self.path}: gives {outputs[0].shape}, expected the (b, {FEATURES}) of the last "
                "pooling, not a classifier's scores"
            )
        self._input, self._output = inputs[0].name, outputs[0].name
        self._batch = shape[0] if isinstance(shape[0], int) else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(..., h, w, 3) images in [-1, 1] to (..., 2048) float32.

        Raises:
            InputError: the network's answer is not of that shape.
        """
        flat = np.reshape(images, (-1, *np.shape(images)[-3:]))
        size = self._batch or BATCH
        features = np.empty((len(flat), FEATURES), np.float32)
        starts = range(0, len(flat), size)
        for start in tqdm(starts, desc="inception", unit="batch", disable=len(starts) < 10):
            batch = np.stack([_enlarged(image) for image in flat[start : start + size]])
            count = len(batch)
            if self._batch:  # its batch size is fixed
                batch = np.concatenate([batch, np.repeat(batch[-1:], size - count, axis=0)])
            (answer,) = self._session.run([self._output], {self._input: batch})
            answer = answer.reshape(len(answer), -1)
            if answer.shape != (len(batch), FEATURES):
                raise InputError(
                    f"{self.path}: gave {answer.shape} for {len(batch)} images, "
                    f"expected {(len(batch), FEATURES)}"
                )
            features[start : start + count] = answer[:count]
        return features.reshape(*np.shape(images)[:-3], FEATURES)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) in [-1, 1] to (3, 299, 299) float32 in [-1, 1], by way of 8 bits as files have."""
    pixels = np.rint((np.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(np.float32)
    channels = [
        np.asarray(
            Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32
        )
        for channel in np.moveaxis(pixels, -1, 0)
    ]
    return np.clip(np.stack(channels), 0.0, 255.0) / 127.5 - 1.0
