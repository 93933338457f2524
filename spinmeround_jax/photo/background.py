"""Which part of an aligned crop is the person, with soft edges and without the old background's colour.

Segmentation itself is done by `mediapipe`, by face parsing (BiSeNet), or by any remover of rembg.

As the released code does, everything that the parser does not call background stays: skin, hair,
hat, glasses, neck and clothes. Its mask is hard; here the edge is as soft as the parser is unsure.
"""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image
from scipy import ndimage

from spinmeround_jax.photo import assets
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.faces import INSTALL

_CLASSES = 19  # of CelebAMask-HQ; 0 is the background
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
# Shares of the crop: radius of the guided filter; of blur fusion, first from far, then from near.
_FILTER_SHARE, _FILTER_EPSILON = 64, 1e-4
_FOREGROUND_SHARES = (6, 85)
_REMBG_MODEL = "u2net_human_seg"


class Parser:
    """BiSeNet face parsing, an ONNX model (1, 3, s, s) -> (1, 19, s, s) scores.

    Raises:
        AssetError: onnxruntime or the model is missing, or the file is no such model.
    """

    def __init__(self, models: pathlib.Path):
        self.path = assets.require(assets.PARSING, models)
        self.name = self.path.name
        try:
            import onnxruntime
        except ImportError as error:
            raise AssetError(f"models are run by onnxruntime; {INSTALL} ({error})") from error
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path), providers=onnxruntime.get_available_providers()
            )
        except Exception as error:  # onnxruntime raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise AssetError(
                f"{self.path}: not a readable ONNX model; get it again with "
                f"{assets.FETCH_COMMAND} ({reason})"
            ) from error
        self._input = self._session.get_inputs()[0]
        sizes = self._input.shape[2:]
        self._size = sizes[0] if isinstance(sizes[0], int) else 512

    def person(self, image: np.ndarray) -> np.ndarray:
        """(h, w) float32 in [0, 1], 1 = person, of an (h, w, 3) uint8 RGB crop.

        Raises:
            AssetError: the model's output is not that of face parsing.
        """
        height, width = image.shape[:2]
        small = Image.fromarray(image).resize((self._size, self._size), Image.Resampling.BILINEAR)
        scaled = (np.asarray(small, np.float32) / 255.0 - _MEAN) / _DEVIATION
        (scores, *_) = self._session.run(
            None, {self._input.name: scaled.transpose(2, 0, 1)[None].astype(np.float32)}
        )
        if scores.ndim != 4 or scores.shape[:2] != (1, _CLASSES):
            raise AssetError(
                f"{self.path}: its output is {scores.shape}, face parsing gives (1, {_CLASSES}, s, s)"
            )
        exponentials = np.exp(scores[0] - scores[0].max(axis=0))
        person = 1.0 - exponentials[0] / exponentials.sum(axis=0)
        mask = Image.fromarray(np.rint(255.0 * person).astype(np.uint8))
        return _unit(mask.resize((width, height), Image.Resampling.BILINEAR))


class Remover:
    """rembg's segmentation of people; it downloads its own model (Apache-2.0) when first used.

    Raises:
        AssetError: rembg is not installed, or its model cannot be had.
    """

    def __init__(self) -> None:
        try:
            import rembg
        except ImportError as error:
            raise AssetError("pip install 'rembg[cpu]' for --background rembg") from error
        self.name = f"rembg {_REMBG_MODEL}"
        self._remove = rembg.remove
        try:
            self._session = rembg.new_session(_REMBG_MODEL)
        except Exception as error:  # a failed download, a broken model
            reason = " ".join(str(error).split())[:200]
            raise AssetError(f"rembg cannot load {_REMBG_MODEL} ({reason})") from error

    def person(self, image: np.ndarray) -> np.ndarray:
        """(h, w) float32 in [0, 1], 1 = person, of an (h, w, 3) uint8 RGB crop."""
        return _unit(self._remove(Image.fromarray(image), session=self._session, only_mask=True))


def refined(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(h, w) mask whose edges follow those of the (h, w, 3) uint8 image, as hair does.

    The guided filter (He, Sun and Tang, PAMI 2013) with grey as the guide; where the mask is sure far
    from any edge, it stays.
    """
    guide = image.astype(np.float32).mean(axis=-1) / 255.0
    radius = max(1, len(mask) // _FILTER_SHARE)
    mean_guide, mean_mask = _box(guide, radius), _box(mask, radius)
    covariance = _box(guide * mask, radius) - mean_guide * mean_mask
    variance = _box(guide * guide, radius) - mean_guide**2
    slope = covariance / (variance + _FILTER_EPSILON)
    offset = mean_mask - slope * mean_guide
    mask = _box(slope, radius) * guide + _box(offset, radius)
    return np.clip(mask, 0.0, 1.0).astype(np.float32)


def foreground(colour: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(h, w, 3) colours in [0, 1] of the person alone, where the mask is between person and background.

    Without it the old background shines through hair on white. Blur fusion (Forte 2021): both layers are
    guessed from their surroundings, then held to `colour` = mask foreground + (1 - mask) background.
    """
    alpha = mask[..., None]
    person = behind = colour
    for share in _FOREGROUND_SHARES:
        radius = max(1, len(mask) // share)
        person = _box(person * alpha, radius) / np.maximum(_box(alpha, radius), 1e-4)
        behind = _box(behind * (1.0 - alpha), radius) / np.maximum(_box(1.0 - alpha, radius), 1e-4)
        person = person + alpha * (colour - alpha * person - (1.0 - alpha) * behind)
        person = np.clip(person, 0.0, 1.0)
    return np.where(alpha > 1e-3, person, colour).astype(np.float32)


def _box(values: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a square of 2 radius + 1 pixels a side, the border repeated; (h, w) or (h, w, c)."""
    size = 2 * radius + 1
    size = (size, size, 1)[: values.ndim]
    return ndimage.uniform_filter(values, size, np.float64, mode="nearest")


def connected(mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The (h, w) mask without people and objects that do not touch `seed`, a boolean (h, w)."""
    pieces, _ = ndimage.label(mask > 0.5)
    reached = np.isin(pieces, np.setdiff1d(pieces[seed], 0))
    # Soft edges belong to whatever they touch.
    return mask * ndimage.binary_dilation(reached, iterations=4)


def _unit(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask.convert("L"), np.float32) / 255.0
