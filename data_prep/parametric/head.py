"""From a person to a posed head mesh, and where that head stands in the canonical world frame.

Modelling happens in decimetres in MakeHuman's frame (x person's left = image right, y up,
z forward); `Placement` maps to the world of spinmeround_jax.cameras at the very end.
"""

import dataclasses
import functools

import numpy as np

from data_prep.parametric import template
from data_prep.parametric.people import RACES, Person, morph_weights
from spinmeround_jax import cameras
from spinmeround_jax.photo.pose import FRAMINGS

# Chin to crown of the bald head, as a fraction of the image height, and how far below the image
# centre its middle sits (hair needs room above, and the neck is cut by the lower edge).
HEAD_FRACTION = 0.585
DROP_FRACTION = 0.02
IMAGE_HEIGHT = cameras.RADIUS / cameras.FOCAL  # world units at the origin


@dataclasses.dataclass(frozen=True)
class Placement:
    """world = (point - origin) * scale; points in decimetres."""

    origin: np.ndarray
    scale: float

    def to_world(self, points: np.ndarray) -> np.ndarray:
        return (points - self.origin) * self.scale


@dataclasses.dataclass(frozen=True)
class Head:
    """The bare head and shoulders of one person, in decimetres.

    skin: (m, 3) positions, normals (m, 3) unit, of template.part('skin', level).
    eyes: two arrays (e, 3), the person's left one first. vertices: (n, 3) unsubdivided positions
    of template.vertex_numbers(). landmarks: (5, 3): eye on the image's left and right (the
    person's right and left), nose tip, mouth corner on the image's left and right.
    """

    person: Person
    level: int
    vertices: np.ndarray
    skin: np.ndarray
    normals: np.ndarray
    eyes: tuple[np.ndarray, np.ndarray]
    landmarks: np.ndarray
    placement: Placement


def _age_mix(age: float) -> dict[str, float]:
    """MakeHuman's targets know 'young' (25 years) and 'old' (90 years)."""
    old = float(np.clip((age - 25) / 65, 0, 1))
    return {"young": 1 - old, "old": old}


def _level_mix(value: float, name: str) -> dict[str, float]:
    """Piecewise linear min / average / max around 0.5."""
    value = 2 * value - 1
    mix = {"min": max(-value, 0.0), "average": 1 - abs(value), "max": max(value, 0.0)}
    return {level + name: w for level, w in mix.items() if w > 0}


def morphed_vertices(person: Person) -> np.ndarray:
    """(n, 3) positions of template.vertex_numbers() for this person, decimetres."""
    vertices = template.rest_vertices().copy()
    for sex, w_sex in (("male", person.male), ("female", 1 - person.male)):
        for age, w_age in _age_mix(person.age).items():
            for race, w_race in zip(RACES, person.races, strict=True):
                if (w := w_sex * w_age * w_race) > 1e-3:
                    vertices += w * template.macro_morph(f"{race}-{sex}-{age}")
            for muscle, w_muscle in _level_mix(person.muscle, "muscle").items():
                for weight, w_weight in _level_mix(person.weight, "weight").items():
                    if (w := w_sex * w_age * w_muscle * w_weight) > 1e-3:
                        name = f"universal-{sex}-{age}-{muscle}-{weight}"
                        vertices += w * template.macro_morph(name)
    _, offsets = template.facial_morphs()
    vertices += np.tensordot(morph_weights(person), offsets, axes=1)
    race = RACES[int(np.argmax(person.races))]
    for unit, w in _expression_units(person).items():
        vertices += w * template.expression_morph(race, unit)
    return _lower_arms(vertices)


def _expression_units(person: Person) -> dict[str, float]:
    """MakeHuman's unit -> weight; those of eyes and brows are symmetric here."""
    brows = "up" if person.brow_raise > 0 else "down"
    wanted = {
        "mouth-corner-puller": 0.55 * person.smile,
        "mouth-retraction": 0.1 * person.smile,
        f"eyebrows-{brows}": 0.5 * abs(person.brow_raise),
        "eye-slit": 0.2 * person.smile,
    }
    for unit, w in person.expression.items():
        wanted[unit] = wanted.get(unit, 0.0) + w
    units = {}
    for unit, w in wanted.items():
        stem, _, rest = unit.partition("-")
        sides = ("left", "right") if stem in ("eye", "eyebrows") else ()
        units |= {f"{stem}-{side}-{rest}": w for side in sides} or {unit: w}
    return units


def _lower_arms(vertices: np.ndarray) -> np.ndarray:
    """Turns the arms of MakeHuman's A-pose down to the sides, where a portrait has them."""
    rest = template.rest_vertices()
    bent = vertices.copy()
    for side in (-1, 1):
        shoulder = np.abs(side * rest[:, 0] - 1.65) < 0.3
        pivot = vertices[shoulder].mean(axis=0)
        weight = np.clip((side * rest[:, 0] - 1.2) / 0.9, 0, 1) * (rest[:, 1] < 6)
        angle = -side * np.radians(48) * weight * weight * (3 - 2 * weight)
        x, y = (vertices - pivot).T[:2]
        bent[:, 0] = np.where(
            weight > 0, pivot[0] + np.cos(angle) * x - np.sin(angle) * y, bent[:, 0]
        )
        bent[:, 1] = np.where(
            weight > 0, pivot[1] + np.sin(angle) * x + np.cos(angle) * y, bent[:, 1]
        )
    return bent


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(m, 3) unit area-weighted vertex normals."""
    corners = vertices[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.stack(
        [
            np.bincount(faces.reshape(-1), np.repeat(face_normals[:, c], 3), len(vertices))
            for c in range(3)
        ],
        axis=1,
    )
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


@functools.lru_cache(maxsize=4)
def _landmark_vertices(level: int) -> tuple[int, int, int, int, int]:
    """Skin vertex numbers: nose tip, mouth corners (image left, image right), chin, crown."""
    part = template.part("skin", level)
    x, y, z = part.rest.T
    middle = np.abs(x) < 0.08
    nose = np.argmax(np.where(middle & (y > 6.7) & (y < 7.2), z, -9))
    lips = (part.masks["lips"] > 0.5) & (z > 1.2)
    left, right = np.argmin(np.where(lips, x, 9)), np.argmax(np.where(lips, x, -9))
    chin = np.argmin(np.where(middle & (z > 1.15) & (y > 6.0), y, 99))
    return int(nose), int(left), int(right), int(chin), int(np.argmax(y))


def _placement(skin: np.ndarray, eyes: np.ndarray, level: int, framing: str) -> Placement:
    _, left, right, chin, _ = _landmark_vertices(level)
    skull = skin[template.part("skin", level).rest[:, 1] > 7.2]
    height = skull[:, 1].max() - skin[chin, 1]
    eye_mouth = eyes.mean(axis=0)[1] - (skin[left, 1] + skin[right, 1]) / 2
    # A photo crop fixes the eye-mouth distance more than the skull: average the two (the factor
    # is the mean ratio over people), so that both long and round heads sit well in the frame.
    size = 0.5 * height + 0.5 * 3.6 * eye_mouth
    scale = HEAD_FRACTION * IMAGE_HEIGHT / size
    middle_y = 0.5 * (skull[:, 1].max() + skin[chin, 1])
    middle_z = 0.5 * (skull[:, 2].max() + skull[:, 2].min())
    origin = np.array([0.0, middle_y + DROP_FRACTION * IMAGE_HEIGHT / scale, middle_z])
    zoom, shift = FRAMINGS[framing]
    scale = float(scale * zoom)
    return Placement(origin=origin - np.array(shift) / scale, scale=scale)


def build_head(person: Person, level: int, framing: str = "canonical") -> Head:
    """Morphs and subdivides the template `level` times and finds the landmarks."""
    vertices = morphed_vertices(person)
    part = template.part("skin", level)
    skin = part.stencil @ vertices
    eyes = tuple(template.part(f"{s}_eye", 2).stencil @ vertices for s in ("left", "right"))
    centres = np.stack([eyes[1].mean(axis=0), eyes[0].mean(axis=0)])
    nose, left, right, _, _ = _landmark_vertices(level)
    return Head(
        person=person,
        level=level,
        vertices=vertices,
        skin=skin,
        normals=vertex_normals(skin, part.faces),
        eyes=eyes,
        landmarks=np.concatenate([centres, skin[[nose, left, right]]]),
        placement=_placement(skin, centres, level, framing),
    )
