"""How skin, eyes, hair and cloth answer to the light. Linear RGB in, linear RGB out, numpy.

The light stands still in the world (as if the cameras walked around a sitter): that of a studio
(a key light from the front side, a weak fill, a light from behind, a sky-to-floor gradient) or that
of a place (its strongest lamp and the surroundings as spherical harmonics).
"""

import dataclasses

import numpy as np

from data_prep.rendering import environments

SKIN, EYE, HAIR, CLOTH, PLASTIC = range(5)
_EVEN_LIGHT = 0.35  # share of a place's light that comes from everywhere, as from a reflector
_FACE_LIGHT = 0.95  # irradiance / pi on a face, as in the studio


@dataclasses.dataclass(frozen=True)
class Light:
    """Directions (3,) unit, toward the light; colours (3,) linear.

    surroundings (9, 3): spherical harmonics of irradiance / pi (environments.basis).
    """

    key: np.ndarray
    key_colour: np.ndarray
    fill: np.ndarray
    fill_colour: np.ndarray
    back: np.ndarray
    back_colour: np.ndarray
    surroundings: np.ndarray

    def ambient(self, directions: np.ndarray) -> np.ndarray:
        """(n, 3) directions -> (n, 3) irradiance / pi of the surroundings."""
        return np.maximum(environments.basis(directions) @ self.surroundings, 0)


_CONSTANT = 0.28209479  # the spherical harmonic of degree 0


def direction(azimuth: float, elevation: float) -> np.ndarray:
    """Unit vector; degrees, azimuth 0 = +z (front), positive toward +x."""
    a, e = np.radians([azimuth, elevation])
    return np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], np.float32)


def make_light(azimuth: float, elevation: float, strength: float, warmth: float) -> Light:
    """A studio: `warmth` -1..1 tints key (warm) against surroundings (cool); `strength` around 1."""
    warm = np.array([1 + 0.08 * warmth, 1.0, 1 - 0.10 * warmth], np.float32)
    cool = np.array([1 - 0.05 * warmth, 1.0, 1 + 0.06 * warmth], np.float32)
    # A gradient from floor to sky is harmonics 0 and 1 (y).
    sky, floor = 0.46 * cool, 0.17 * warm
    surroundings = np.zeros((9, 3), np.float32)
    surroundings[0] = (sky + floor) / 2 / _CONSTANT
    surroundings[1] = (sky - floor) / 2 / 0.48860251
    return Light(
        key=direction(azimuth, elevation),
        key_colour=np.float32(0.95 * strength) * warm,
        fill=direction(-1.3 * azimuth, 8),
        fill_colour=0.24 * cool,
        back=direction(180 - 0.8 * azimuth, 40),
        back_colour=0.5 * warm,
        surroundings=surroundings,
    )


def place_light(
    place: environments.Environment, turn: float, exposure: float, balance: float
) -> Light:
    """The light of a place turned by `turn` degrees, its lamp as key, exposed for the face.

    exposure: around 1. balance: 0 keeps the colour of the light, 1 makes it white (on average).
    """
    # No portrait shows the light behind the head: not too much of another colour and strength.
    surroundings = (1 - _EVEN_LIGHT) * environments.turned(place.irradiance, turn)
    lamp_colour = (1 - _EVEN_LIGHT) * place.lamp_colour
    surroundings[0] += _EVEN_LIGHT * (place.irradiance[0] + place.lamp_colour / 4 / _CONSTANT)
    key = environments.turn(place.lamp, turn)
    # A camera exposes for what it sees: faces turned to the front, and a little to each side.
    facing = np.stack([direction(azimuth, 10.0) for azimuth in (-40.0, 0.0, 40.0)])
    lit = environments.basis(facing) @ surroundings
    lit = lit + np.clip(facing @ key, 0, None)[:, None] * lamp_colour
    mean = lit.mean(axis=0)
    gain = (mean.mean() / mean) ** balance
    scale = np.float32(exposure * _FACE_LIGHT) * gain / (mean * gain).mean()
    nothing = np.zeros(3, np.float32)
    return Light(
        key=np.float32(key),
        key_colour=np.float32(scale * lamp_colour),
        fill=np.array([0, 0, 1], np.float32),
        fill_colour=nothing,
        back=np.array([0, 0, -1], np.float32),
        back_colour=nothing,
        surroundings=np.float32(scale * surroundings),
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
    return (a @ b if b.ndim == 1 else np.einsum("ij,ij->i", a, b))[:, None]


def _unit(a: np.ndarray) -> np.ndarray:
    return a / np.maximum(np.sqrt(_dot(a, a)), 1e-6)


def _wrapped(cosine: np.ndarray, wrap: np.ndarray) -> np.ndarray:
    return np.clip((cosine + wrap) / (1 + wrap), 0, None) ** 1.25


def _highlight(normals, view, light_direction, power):
    half = _unit(light_direction + view)
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
    ambient = light.ambient(normals)
    lit = lit + ambient * bounce
    spec = light.key_colour * key_open * _highlight(normals, view, light.key, power)
    spec = spec + light.back_colour * open_sky * _highlight(normals, view, light.back, power)
    spec = spec + 0.5 * ambient * open_sky * _fresnel(normals, view) / 0.3
    return albedo * lit + shine * gloss * spec


def _hair(normals, view, values, light: Light) -> np.ndarray:
    """Kajiya and Kay (1989): sine diffuse, two shifted highlights (as Marschner R and TRT)."""
    albedo, tangent = values[:, 3:6], values[:, 6:9]
    tangent = _unit(tangent)
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
        half = _unit(where + view)
        for shift, power, weight, own in ((0.1, 70, 0.07, 0.15), (-0.12, 18, 0.16, 0.9)):
            moved = _unit(tangent + shift * normals)
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
