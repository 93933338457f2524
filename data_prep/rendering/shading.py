"""How skin, eyes, hair and cloth answer to the light. Linear RGB in, linear RGB out, numpy.

The light stands still in the world (as if the cameras walked around a sitter): a key light from
the front side, a weak fill, a light from behind, and a sky-to-floor gradient.
"""

import dataclasses

import numpy as np

SKIN, EYE, HAIR, CLOTH, PLASTIC = range(5)


@dataclasses.dataclass(frozen=True)
class Light:
    """Directions (3,) unit, toward the light; colours (3,) linear."""

    key: np.ndarray
    key_colour: np.ndarray
    fill: np.ndarray
    fill_colour: np.ndarray
    back: np.ndarray
    back_colour: np.ndarray
    sky: np.ndarray
    floor: np.ndarray

    def ambient(self, directions: np.ndarray) -> np.ndarray:
        """(n, 3) directions -> (n, 3) radiance of the surroundings."""
        up = 0.5 + 0.5 * directions[:, 1:2]
        return self.floor + (self.sky - self.floor) * up


def direction(azimuth: float, elevation: float) -> np.ndarray:
    """Unit vector; degrees, azimuth 0 = +z (front), positive toward +x."""
    a, e = np.radians([azimuth, elevation])
    return np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], np.float32)


def make_light(azimuth: float, elevation: float, strength: float, warmth: float) -> Light:
    """`warmth` -1..1 tints key (warm) against surroundings (cool); `strength` around 1."""
    warm = np.array([1 + 0.08 * warmth, 1.0, 1 - 0.10 * warmth], np.float32)
    cool = np.array([1 - 0.05 * warmth, 1.0, 1 + 0.06 * warmth], np.float32)
    return Light(
        key=direction(azimuth, elevation),
        key_colour=np.float32(0.95 * strength) * warm,
        fill=direction(-1.3 * azimuth, 8),
        fill_colour=0.24 * cool,
        back=direction(180 - 0.8 * azimuth, 40),
        back_colour=0.5 * warm,
        sky=0.46 * cool,
        floor=0.17 * warm,
    )


def to_linear(srgb) -> np.ndarray:
    """sRGB in [0, 1] -> linear."""
    srgb = np.asarray(srgb, np.float64)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear radiance -> sRGB in [0, 1], with a soft shoulder so that highlights keep colour."""
    bright = np.clip(linear, 0, None)
    bright = np.where(bright > 0.6, 0.6 + 0.4 * (1 - np.exp(-(bright - 0.6) / 0.4)), bright)
    low = bright * 12.92
    return np.where(bright <= 0.0031308, low, 1.055 * np.maximum(bright, 1e-8) ** (1 / 2.4) - 0.055)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,...j->i", a, b)[:, None] if b.ndim == 1 else np.sum(a * b, 1)[:, None]


def _wrapped(cosine: np.ndarray, wrap: np.ndarray) -> np.ndarray:
    return np.clip((cosine + wrap) / (1 + wrap), 0, None) ** 1.25


def _highlight(normals, view, light_direction, power):
    half = light_direction + view
    half = half / np.linalg.norm(half, axis=1, keepdims=True)
    return np.clip(_dot(normals, half), 0, 1) ** power * (power + 8) / (8 * np.pi)


def _fresnel(normals, view):
    return 0.04 + 0.96 * (1 - np.clip(_dot(normals, view), 0, 1)) ** 5


def _surface(normals, view, values, light: Light, wrap, power, shine) -> np.ndarray:
    """Diffuse + one highlight lobe, shared by everything that is not hair."""
    albedo, gloss = values[:, 3:6], values[:, 9:10]
    key_open, open_sky = values[:, 10:11], values[:, 11:12]
    # Blocked light still reddens skin: red travels furthest (wrap is largest for red).
    shadow = key_open ** (1 - 0.45 * wrap)
    bounce = open_sky ** (1 - 0.5 * wrap)
    lit = light.key_colour * shadow * _wrapped(_dot(normals, light.key), wrap)
    lit = lit + light.fill_colour * bounce * _wrapped(_dot(normals, light.fill), wrap)
    lit = lit + light.back_colour * bounce * _wrapped(_dot(normals, light.back), wrap)
    lit = lit + light.ambient(normals) * bounce
    spec = light.key_colour * key_open * _highlight(normals, view, light.key, power)
    spec = spec + light.back_colour * open_sky * _highlight(normals, view, light.back, power)
    spec = spec + 0.5 * light.ambient(normals) * open_sky * _fresnel(normals, view) / 0.3
    return albedo * lit + shine * gloss * spec


def _hair(normals, view, values, light: Light) -> np.ndarray:
    """Kajiya and Kay (1989): sine diffuse, two shifted highlights (as Marschner R and TRT)."""
    albedo, tangent = values[:, 3:6], values[:, 6:9]
    tangent = tangent / np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-6)
    key_open, open_sky = values[:, 10:11], values[:, 11:12]
    colour = np.zeros_like(albedo)
    for where, tint, visible in (
        (light.key, light.key_colour, key_open),
        (light.back, light.back_colour, open_sky),
    ):
        along = _dot(tangent, where)
        facing = np.clip((_dot(normals, where) + 0.3) / 1.3, 0, 1)
        sine = np.sqrt(np.clip(1 - along**2, 0, 1))
        colour += tint * visible * facing * sine * albedo * 1.1
        half = where + view
        half = half / np.linalg.norm(half, axis=1, keepdims=True)
        for shift, power, weight, own in ((0.1, 70, 0.07, 0.15), (-0.12, 18, 0.16, 0.9)):
            moved = tangent + shift * normals
            moved = moved / np.linalg.norm(moved, axis=1, keepdims=True)
            glint = np.sqrt(np.clip(1 - _dot(moved, half) ** 2, 0, 1)) ** power
            glow = own * 2.2 * albedo + (1 - own) * 0.5
            colour += tint * visible * facing * weight * glint * glow * values[:, 9:10]
    fill = light.fill_colour * np.clip(0.5 + 0.5 * _dot(normals, light.fill), 0, 1)
    return colour + albedo * open_sky * (fill + light.ambient(normals))


_SKIN_WRAP = np.array([0.42, 0.2, 0.12], np.float32)
_NO_WRAP = np.zeros(3, np.float32)


def shade(material, normals, view, values, light: Light) -> np.ndarray:
    """Outgoing linear colour (n, 3) of n hits.

    material (n,) int; normals, view (n, 3) unit, view points to the camera; values (n, 12) as in
    render.Scene.attributes.
    """
    colour = np.zeros((len(material), 3), np.float32)
    for kind in np.unique(material):
        at = np.flatnonzero(material == kind)
        n, v, x = normals[at], view[at], values[at]
        if kind == HAIR:
            colour[at] = _hair(n, v, x, light)
        elif kind == EYE:
            colour[at] = _surface(n, v, x, light, 0.3 + _NO_WRAP, 400.0, 0.5)
        elif kind == SKIN:
            colour[at] = _surface(n, v, x, light, _SKIN_WRAP, 14.0, 0.14)
        elif kind == PLASTIC:
            colour[at] = _surface(n, v, x, light, _NO_WRAP, 60.0, 0.4)
        else:
            colour[at] = _surface(n, v, x, light, 0.15 + _NO_WRAP, 8.0, 0.02)
    return colour
