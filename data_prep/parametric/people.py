"""Random adults: what one person is, and how persons are drawn.

`sample_person(seed)` is a pure function of the seed. Identity (face shape, age, sex, ancestry,
skin, iris, brows) and styling (hair, beard, glasses, clothes, light, expression) are kept apart,
because `id_embedding` must see the first and, as ArcFace would be, be blind to the second.
Colours are sRGB in [0, 1]; the renderer linearises them.
"""

import dataclasses
import functools

import numpy as np

from data_prep.parametric import template

RACES = ("african", "asian", "caucasian")
HAIR_STYLES = (
    "bald",
    "buzz",
    "short",
    "side_part",
    "quiff",
    "bob",
    "long",
    "bun",
    "ponytail",
    "curly",
    "afro",
)
BEARD_STYLES = ("none", "stubble", "full", "moustache", "goatee")
_OPPOSITES = (
    ("decr", "incr"),
    ("down", "up"),
    ("in", "out"),
    ("backward", "forward"),
    ("concave", "convex"),
    ("compress", "uncompress"),
)
_HEAD_SHAPES = (
    "diamond",
    "invertedtriangular",
    "oval",
    "rectangular",
    "round",
    "square",
    "triangular",
)

# Skin albedo (sRGB) from lightest to darkest: hand-picked anchors spanning the human range.
_SKIN_LEVELS = np.array([0.0, 0.18, 0.36, 0.54, 0.7, 0.86, 1.0])
_SKIN_COLOURS = (
    np.array(
        [
            (240, 208, 192),
            (230, 190, 166),
            (210, 165, 134),
            (180, 131, 98),
            (143, 98, 70),
            (103, 69, 50),
            (72, 49, 39),
        ]
    )
    / 255.0
)
_HAIR_COLOURS = {
    "black": (24, 21, 20),
    "dark_brown": (48, 34, 26),
    "brown": (82, 56, 38),
    "light_brown": (124, 90, 60),
    "blond": (190, 152, 98),
    "light_blond": (221, 192, 144),
    "red": (142, 66, 32),
    "grey": (140, 138, 134),
    "white": (214, 212, 206),
    "blue": (42, 78, 150),
    "pink": (205, 96, 140),
    "green": (58, 122, 84),
    "violet": (104, 60, 136),
}
_HAIR_ODDS = {  # black, dark_brown, brown, light_brown, blond, light_blond, red
    "african": (0.72, 0.22, 0.05, 0.0, 0.01, 0.0, 0.0),
    "asian": (0.66, 0.25, 0.07, 0.01, 0.01, 0.0, 0.0),
    "caucasian": (0.1, 0.25, 0.23, 0.15, 0.13, 0.07, 0.07),
}
_IRIS_COLOURS = {
    "brown": (74, 46, 28),
    "dark_brown": (48, 30, 20),
    "hazel": (112, 84, 44),
    "green": (88, 106, 66),
    "blue": (84, 118, 148),
    "grey": (112, 122, 128),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Person:
    """One person. Numbers are in [0, 1] unless said otherwise; colours are sRGB (3,) tuples."""

    seed: int
    # identity
    age: float  # years, 18 to 80
    male: float
    races: tuple[float, float, float]  # african, asian, caucasian; sums to one
    weight: float
    muscle: float
    shape: np.ndarray  # (k,) standardised (unit variance) coordinates on shape_axes()
    skin_tone: float  # 0 lightest, 1 darkest
    skin_colour: tuple[float, float, float]
    ruddiness: float
    freckles: float
    iris_colour: tuple[float, float, float]
    brow_thickness: float
    natural_hair_colour: tuple[float, float, float]
    lip_tint: float
    # styling
    lipstick: float
    lipstick_colour: tuple[float, float, float]
    hair_style: str
    hair_colour: tuple[float, float, float]
    hair_length: float
    hair_volume: float
    hair_waviness: float
    hairline: float  # 0 low, 1 strongly receding
    parting: float  # -1 right, 1 left
    beard_style: str
    beard_length: float
    glasses: str  # 'none', 'round', 'square'
    glasses_colour: tuple[float, float, float]
    neckline: str  # 'crew', 'vee', 'wide', 'high'
    cloth_colour: tuple[float, float, float]
    smile: float
    brow_raise: float  # -1 to 1
    gaze: tuple[float, float]  # degrees, to the person's left and up
    light_azimuth: float  # degrees, positive from the person's left
    light_elevation: float
    key_strength: float
    light_warmth: float  # -1 cool, 1 warm


@functools.lru_cache(maxsize=1)
def shape_axes() -> tuple[tuple[str, int, int, float], ...]:
    """(name, row at negative, row at positive, scale): rows of template.facial_morphs(), -1 = none.

    A standardised coordinate c adds |c| * scale of the one or the other row. The scale makes one
    standard deviation move the most affected vertex by 1 to 2 mm.
    """
    names, offsets = template.facial_morphs()
    reach = np.linalg.norm(offsets, axis=-1).max(axis=-1)
    row = {name: i for i, name in enumerate(names)}
    axes = []
    for name, i in row.items():
        stem, _, end = name.rpartition("-")
        partner = next((a for a, b in _OPPOSITES if b == end and f"{stem}-{a}" in row), None)
        if partner is not None:
            axes.append((stem, row[f"{stem}-{partner}"], i, reach[i]))
        elif name.startswith("asym") and end == "l":
            axes.append((stem, i, row.get(f"{stem}-r", -1), reach[i]))
        elif not any(end == a and f"{stem}-{b}" in row for a, b in _OPPOSITES):
            if not (name.startswith("asym") and end == "r"):
                axes.append((name, -1, i, reach[i]))
    out = []
    for name, minus, plus, size in axes:
        step = 0.009 if name.startswith("asym") else 0.022  # decimetres at one sigma
        out.append((name, minus, plus, float(np.clip(step / size, 0.04, 0.3))))
    return tuple(out)


def morph_weights(person: Person) -> np.ndarray:
    """(rows of template.facial_morphs(),) weights of this person's detail morphs."""
    weights = np.zeros(len(template.facial_morphs()[0]))
    for coordinate, (_, minus, plus, scale) in zip(person.shape, shape_axes(), strict=True):
        index = plus if coordinate > 0 else minus
        if index >= 0:
            weights[index] += min(abs(coordinate) * scale, 1.0)
    return weights


def _colour(table: dict, name: str) -> np.ndarray:
    return np.array(table[name]) / 255.0


def _jitter(rng: np.random.Generator, colour: np.ndarray, amount: float) -> tuple:
    shifted = colour * rng.normal(1.0, amount) * rng.normal(1.0, amount * 0.12, 3)
    return tuple(np.clip(shifted, 0.01, 0.97).tolist())


def skin_colour(tone: float, yellowness: float) -> np.ndarray:
    """sRGB albedo of skin; `tone` 0 (lightest) to 1, `yellowness` about -1 to 1."""
    levels = [np.interp(tone, _SKIN_LEVELS, _SKIN_COLOURS[:, c]) for c in range(3)]
    return np.clip(np.array(levels) + yellowness * np.array([0.0, 0.006, -0.022]), 0, 1)


def _hair_style(rng: np.random.Generator, male: bool, age: float, african: float) -> str:
    odds = dict.fromkeys(HAIR_STYLES, 0.0)
    if male:
        odds |= {
            "bald": 0.05 + 0.16 * (age > 45),
            "buzz": 0.16,
            "short": 0.28,
            "side_part": 0.2,
            "quiff": 0.14,
            "curly": 0.08,
            "long": 0.05,
            "bun": 0.02,
            "bob": 0.02,
        }
    else:
        odds |= {
            "long": 0.34,
            "bob": 0.19,
            "bun": 0.13,
            "ponytail": 0.13,
            "curly": 0.1,
            "short": 0.05,
            "side_part": 0.04,
            "buzz": 0.02,
        }
    if african > 0.5:
        odds |= {"afro": 0.4, "curly": 0.25, "quiff": 0.0, "side_part": 0.0}
        odds["long"] *= 0.5
        odds["buzz"] *= 2.0
    weights = np.array([odds[name] for name in HAIR_STYLES])
    return str(rng.choice(HAIR_STYLES, p=weights / weights.sum()))


def sample_person(seed: int) -> Person:
    """Draws an adult; the same seed always gives the same person."""
    rng = np.random.default_rng([7193, seed])
    male = bool(rng.random() < 0.5)
    age = float(18 + 62 * rng.beta(1.1, 1.5))
    races = rng.dirichlet((0.28, 0.28, 0.34))
    african, asian, caucasian = races.tolist()

    shape = np.clip(rng.standard_normal(len(shape_axes())), -2.4, 2.4)
    chosen = f"head-{rng.choice(_HEAD_SHAPES)}"
    for i, (name, minus, _, _) in enumerate(shape_axes()):
        if name.startswith("head-") and minus < 0 and name != chosen:
            shape[i] = -abs(shape[i])  # one head outline at a time
        if name == "head-age":
            shape[i] = 0.5 * shape[i] + (age - 40) / 18

    tone_mean = 0.8 * african + 0.28 * asian + 0.14 * caucasian
    tone_spread = 0.12 * african + 0.13 * asian + 0.11 * caucasian
    tone = float(np.clip(rng.normal(tone_mean, tone_spread), 0.0, 1.0))
    race = str(rng.choice(RACES, p=races))
    hair_names = list(_HAIR_COLOURS)[:7]
    natural = _colour(_HAIR_COLOURS, str(rng.choice(hair_names, p=_HAIR_ODDS[race])))
    greying = float(np.clip((age - rng.normal(50, 9)) / 22, 0, 1))
    grey = _colour(_HAIR_COLOURS, "grey" if age < 66 else "white")
    natural = natural * (1 - greying) + grey * greying
    hair = natural
    dyed = rng.random()
    if dyed < 0.04:
        hair = _colour(_HAIR_COLOURS, str(rng.choice(["blue", "pink", "green", "violet"])))
    elif dyed < 0.12 and not male:
        hair = _colour(_HAIR_COLOURS, str(rng.choice(["blond", "red", "brown", "light_blond"])))
    iris_odds = (
        (0.3, 0.7, 0, 0, 0, 0) if race != "caucasian" else (0.3, 0.1, 0.15, 0.12, 0.26, 0.07)
    )
    iris = _colour(_IRIS_COLOURS, str(rng.choice(list(_IRIS_COLOURS), p=iris_odds)))

    beard = "none"
    if male:
        beard = str(rng.choice(BEARD_STYLES, p=(0.42, 0.22, 0.2, 0.06, 0.1)))
        if asian > 0.6 and beard == "full" and rng.random() < 0.6:
            beard = "stubble"
    cloth = np.clip(
        rng.choice([0.08, 0.25, 0.5, 0.8], p=[0.3, 0.25, 0.2, 0.25]) * (1 + rng.normal(0, 0.22, 3)),
        0.03,
        0.92,
    )
    recession = (age - 38) / 45 + rng.normal(0, 0.22) if male else min(rng.normal(-0.1, 0.12), 0.1)
    return Person(
        seed=seed,
        age=age,
        male=float(np.clip(rng.normal(0.93 if male else 0.05, 0.06), 0, 1)),
        races=(african, asian, caucasian),
        weight=float(np.clip(rng.normal(0.5, 0.17), 0.1, 1)),
        muscle=float(np.clip(rng.normal(0.55 if male else 0.45, 0.13), 0, 1)),
        shape=shape,
        skin_tone=tone,
        skin_colour=tuple(
            skin_colour(tone, rng.normal(0.7 * asian - 0.15 * caucasian, 0.5)).tolist()
        ),
        ruddiness=float(np.clip(rng.normal(0.45, 0.22), 0, 1)),
        freckles=float(max(0.0, rng.normal(-0.3, 0.5)) * caucasian * (tone < 0.3)),
        iris_colour=_jitter(rng, iris, 0.1),
        brow_thickness=float(np.clip(rng.normal(0.62 if male else 0.38, 0.15), 0.1, 1)),
        natural_hair_colour=_jitter(rng, natural, 0.08),
        lip_tint=float(np.clip(rng.normal(0.4 if male else 0.6, 0.18), 0, 1)),
        lipstick=float(rng.uniform(0.3, 0.9) if not male and rng.random() < 0.4 else 0.0),
        lipstick_colour=tuple(
            np.array([(0.72, 0.16, 0.2), (0.78, 0.36, 0.4), (0.55, 0.14, 0.22)])[rng.integers(3)]
        ),
        hair_style=_hair_style(rng, male, age, african),
        hair_colour=_jitter(rng, hair, 0.1),
        hair_length=float(rng.random()),
        hair_volume=float(rng.random()),
        hair_waviness=float(np.clip(rng.beta(1.2, 2.0) + 0.5 * african, 0, 1)),
        hairline=float(np.clip(recession, 0, 1)),
        parting=float(rng.choice([-1, 1]) * rng.uniform(0.2, 1.0)),
        beard_style=beard,
        beard_length=float(rng.random()),
        glasses=str(rng.choice(["none", "round", "square"], p=(0.82, 0.08, 0.1))),
        glasses_colour=tuple(
            np.array(
                [(0.05, 0.05, 0.06), (0.28, 0.15, 0.08), (0.5, 0.48, 0.46), (0.55, 0.4, 0.16)]
            )[rng.integers(4)]
        ),
        neckline=str(rng.choice(["crew", "vee", "wide", "high"], p=(0.4, 0.25, 0.15, 0.2))),
        cloth_colour=tuple(cloth.tolist()),
        smile=float(max(0.0, rng.normal(0.28, 0.28))),
        brow_raise=float(np.clip(rng.normal(0.0, 0.25), -0.6, 0.6)),
        gaze=(float(rng.normal(0, 2.5)), float(rng.normal(0, 1.5))),
        light_azimuth=float(rng.choice([-1, 1]) * rng.uniform(15, 55)),
        light_elevation=float(rng.uniform(20, 50)),
        key_strength=float(rng.uniform(0.8, 1.2)),
        light_warmth=float(np.clip(rng.normal(0, 0.5), -1, 1)),
    )


def id_embedding(person: Person) -> np.ndarray:
    """(512,) float32 unit vector of the identity alone: a fixed random projection.

    It stands in for an ArcFace vector: near-orthogonal for different persons, the same under any
    hair, beard, glasses, expression or light.
    """
    macros = np.array(
        [
            (person.age - 45) / 17,
            (person.male - 0.5) / 0.45,
            *((np.array(person.races) - 0.33) / 0.33),
            (person.weight - 0.5) / 0.17,
            (person.muscle - 0.5) / 0.13,
            (person.skin_tone - 0.35) / 0.27,
            (person.ruddiness - 0.45) / 0.22,
            person.freckles / 0.3,
            (person.brow_thickness - 0.5) / 0.2,
            (person.lip_tint - 0.5) / 0.18,
            *((np.array(person.iris_colour) - 0.28) / 0.12),
            *((np.array(person.natural_hair_colour) - 0.25) / 0.22),
        ]
    )
    # Few but telling numbers: weighted up so that they carry about as much as the face shape.
    features = np.concatenate([person.shape, 2.0 * macros])
    projection = np.random.default_rng(512).standard_normal((512, len(features)))
    embedding = projection @ features
    return (embedding / np.linalg.norm(embedding)).astype(np.float32)
