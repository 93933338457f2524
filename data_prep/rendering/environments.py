"""Light of real places, as 27 numbers and one strongest lamp or window each: `environments.json`.

The table is made from the environment maps of the npm package @pmndrs/assets 1.7.0 (CC0-1.0) by

    npm pack @pmndrs/assets@1.7.0 && tar xzf pmndrs-assets-1.7.0.tgz && pip install OpenEXR
    python -m data_prep.rendering.environments package/hdri
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import pathlib
import sys

import numpy as np

TABLE = pathlib.Path(__file__).with_name("environments.json")
LICENSE = "CC0-1.0"
# Convolution with the clamped cosine, over pi: Ramamoorthi and Hanrahan (2001), equation 8.
_COSINE = np.array([1.0] + 3 * [2.0 / 3.0] + 5 * [0.25])
_LAMP_RADIUS = 35.0  # degrees around the brightest direction that count as the lamp


@dataclasses.dataclass(frozen=True)
class Environment:
    """Light from all around, y up; linear RGB, scaled to a mean radiance of 1.

    irradiance (9, 3): spherical harmonics of irradiance / pi without the lamp, see `basis`.
    lamp (3,) unit, toward the strongest light; lamp_colour (3,) its irradiance / pi.
    """

    irradiance: np.ndarray
    lamp: np.ndarray
    lamp_colour: np.ndarray


def basis(directions: np.ndarray) -> np.ndarray:
    """(n, 3) unit -> (n, 9) orthonormal real spherical harmonics up to degree 2."""
    x, y, z = directions.T
    return np.stack(
        [
            np.full(len(directions), 0.28209479, directions.dtype),
            0.48860251 * y,
            0.48860251 * z,
            0.48860251 * x,
            1.09254843 * x * y,
            1.09254843 * y * z,
            0.31539157 * (3 * z * z - 1),
            1.09254843 * x * z,
            0.54627422 * (x * x - y * y),
        ],
        axis=1,
    )


def turn(vectors: np.ndarray, degrees: float) -> np.ndarray:
    """(..., 3) turned about the vertical, from +z toward +x."""
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    return vectors @ np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])


def turned(coefficients: np.ndarray, degrees: float) -> np.ndarray:
    """(9, c) spherical harmonics of the same light turned about the vertical, as `turn`."""
    # Values at more directions than there are coefficients determine them.
    directions = np.random.default_rng(0).standard_normal((32, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    values = basis(directions) @ coefficients
    return np.linalg.lstsq(basis(turn(directions, degrees)), values, rcond=None)[0]


@functools.cache
def table() -> dict[str, Environment]:
    """Name -> light, of all places."""
    stored = json.loads(TABLE.read_text())["environments"]
    return {
        name: Environment(**{key: np.array(value) for key, value in entry.items()})
        for name, entry in stored.items()
    }


def derive(radiance: np.ndarray) -> Environment:
    """The light of an equirectangular map (h, w, 3), linear, its top row up."""
    height, width, _ = radiance.shape
    elevation = np.pi * (0.5 - (np.arange(height) + 0.5) / height)
    azimuth = 2 * np.pi * (np.arange(width) + 0.5) / width
    e, a = (x.ravel() for x in np.meshgrid(elevation, azimuth, indexing="ij"))
    directions = np.stack([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], axis=1)
    solid = np.cos(e) * (2 * np.pi / width) * (np.pi / height)
    # The maps' lossy compression leaves negative pixels and single bright ones of strange colours.
    light = np.maximum(radiance.reshape(-1, 3).astype(np.float64), 0)
    light = np.minimum(light, 2 * np.median(light, axis=1, keepdims=True))
    light /= (light * solid[:, None]).sum() / (3 * 4 * np.pi)
    luminance = light.mean(axis=1)
    # The brightest direction, blurred by about ten degrees, among a few thousand.
    some = directions[:: max(len(directions) // 4000, 1)]
    blurred = [(np.exp(60 * (directions @ d - 1)) * luminance * solid).sum() for d in some]
    near = directions @ some[int(np.argmax(blurred))] > np.cos(np.radians(_LAMP_RADIUS))
    surroundings = 1.5 * (luminance * solid)[~near].sum() / solid[~near].sum()
    share = np.where(near, np.clip(1 - surroundings / np.maximum(luminance, 1e-9), 0, 1), 0)
    energy = (share * solid)[:, None] * light
    lamp = energy.mean(axis=1) @ directions
    rest = light - share[:, None] * light
    coefficients = basis(directions).T @ (rest * solid[:, None])
    return Environment(
        irradiance=coefficients * _COSINE[:, None],
        lamp=lamp / np.linalg.norm(lamp),
        lamp_colour=energy.sum(axis=0) / np.pi,
    )


def main(folder: str) -> None:
    import OpenEXR  # only to make the table again

    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.exr.js")):
        encoded = path.read_text().partition("base64,")[2].partition("'")[0]
        binary = pathlib.Path(folder) / path.stem
        binary.write_bytes(base64.b64decode(encoded))
        light = derive(OpenEXR.File(str(binary)).channels()["RGB"].pixels)
        found[path.name.partition(".")[0]] = {
            field: np.round(value, 5).tolist() for field, value in vars(light).items()
        }
    about = {"source": "@pmndrs/assets 1.7.0, hdri/*.exr", "license": LICENSE}
    TABLE.write_text(json.dumps({**about, "environments": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
