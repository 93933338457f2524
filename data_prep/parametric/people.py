"""Random adults: what one person is, and how persons are drawn.

`sample_person(seed)` is a pure function of the seed. Identity (face shape, age, sex, ancestry,
skin, iris, brows) and styling (hair, beard, glasses, clothes, light, expression) are kept apart.
Colours of skin, hair, iris and cloth are drawn over their whole range, independently of all else.
Colours are sRGB in [0, 1]; the renderer linearises them.
"""

import colorsys
import dataclasses
import functools

import numpy as np

from data_prep.parametric import template
from data_prep.rendering import environments

RACES = ("african", "asian", "caucasian")
HAIR_STYLES = (
    "bald", "buzz", "short", "side_part", "quiff", "bob", "long", "bun", "ponytail", "curly",
    "ringlets", "afro",
)  # fmt: skip
HATS = ("none", "beanie", "cap")
BEARD_STYLES = ("none", "stubble", "full", "moustache", "goatee")
_OPPOSITES = (
    ("decr", "incr"), ("down", "up"), ("in", "out"), ("backward", "forward"),
    ("concave", "convex"), ("compress", "uncompress"),
)  # fmt: skip
_HEAD_SHAPES = (
    "diamond", "invertedtriangular", "oval", "rectangular", "round", "square", "triangular",
)  # fmt: skip

# Skin albedo (sRGB) from lightest to darkest: hand-picked anchors spanning the human range.
_SKIN_LEVELS = np.array([0.0, 0.18, 0.36, 0.54, 0.7, 0.86, 1.0])
_SKIN_COLOURS = np.array([
    (240, 208, 192), (230, 190, 166), (210, 165, 134), (180, 131, 98), (143, 98, 70), (103, 69, 50),
    (72, 49, 39),
]) / 255.0  # fmt: skip
_HAIR_COLOURS = {
    "black": (24, 21, 20), "dark_brown": (48, 34, 26), "brown": (82, 56, 38),
    "light_brown": (124, 90, 60), "blond": (190, 152, 98), "light_blond": (221, 192, 144),
    "auburn": (104, 44, 26), "red": (150, 66, 30), "ginger": (196, 104, 52),
    "grey": (140, 138, 134), "white": (214, 212, 206),
}  # fmt: skip
_IRIS_COLOURS = {
    "brown": (74, 46, 28), "dark_brown": (48, 30, 20), "hazel": (112, 84, 44),
    "green": (88, 106, 66), "blue": (84, 118, 148), "grey": (112, 122, 128),
    "amber": (142, 98, 40),
}  # fmt: skip
# Weights of MakeHuman's expression units at full strength: what an ordinary face does.
_EXPRESSIONS = {
    "mouth-open": 0.55, "mouth-pursing": 0.6, "mouth-protusion": 0.6, "mouth-compression": 0.7,
    "mouth-depression": 0.6, "mouth-depression-retraction": 0.5, "mouth-elevation": 0.6,
    "mouth-eversion": 0.5, "mouth-upward-retraction": 0.3, "mouth-part-later": 0.6,
    "nose-compression": 0.6, "eyebrows-inner-up": 0.8, "eyebrows-extern-up": 0.7,
    "eye-closure": 0.9, "eye-opened-up": 0.7, "eye-slit": 0.6, "neck-platysma": 0.5,
}  # fmt: skip


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
    glasses: str  # 'none', 'round', 'square', 'sun'
    glasses_colour: tuple[float, float, float]
    hat: str
    hat_colour: tuple[float, float, float]
    neckline: str  # 'crew', 'vee', 'wide', 'high'
    cloth_colour: tuple[float, float, float]
    second_cloth_colour: tuple[float, float, float]  # of stripes; the same where there are none
    smile: float
    brow_raise: float  # -1 to 1
    expression: dict[str, float]  # unit of _EXPRESSIONS -> weight
    gaze: tuple[float, float]  # degrees, to the person's left and up
    place: str  # of environments.table() whose light it is, or 'studio'
    light_side: float  # degrees: where the lamp of a place stands, positive at the person's left
    light_balance: float  # 0 as it is, 1 white on average; of a place
    light_azimuth: float  # degrees, positive from the person's left; of the studio
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


def _hair_style(rng: np.random.Generator, male: bool, age: float) -> str:
    odds = dict.fromkeys(HAIR_STYLES, 0.02)
    if male:
        odds |= {
            "bald": 0.05 + 0.12 * (age > 45), "buzz": 0.14, "short": 0.22, "side_part": 0.18,
            "quiff": 0.14, "curly": 0.1, "long": 0.05, "afro": 0.05,
        }  # fmt: skip
    else:
        odds |= {
            "long": 0.24, "bob": 0.17, "bun": 0.12, "ponytail": 0.12, "curly": 0.1,
            "ringlets": 0.12, "short": 0.05, "afro": 0.05,
        }  # fmt: skip
    weights = np.array([odds[name] for name in HAIR_STYLES])
    return str(rng.choice(HAIR_STYLES, p=weights / weights.sum()))


def _glasses_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    if rng.random() < 0.25:
        return tuple(_any_colour(rng).tolist())
    metals = [(0.05, 0.05, 0.06), (0.28, 0.15, 0.08), (0.5, 0.48, 0.46), (0.55, 0.4, 0.16)]
    return metals[rng.integers(4)]


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _any_colour(rng: np.random.Generator) -> np.ndarray:
    """Of dyed hair or cloth: every hue, from pale to deep."""
    return _hsv(rng.random(), rng.uniform(0.25, 0.95), rng.uniform(0.2, 0.95))


def _cloth_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    if rng.random() < 0.4:  # grey, between black and white
        colour = rng.uniform(0.04, 0.92) * rng.normal(1, 0.03, 3)
    else:
        colour = _any_colour(rng)
    return tuple(np.clip(colour, 0.03, 0.92).tolist())


def _hair_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Natural and worn hair colour: the whole range, whoever wears it."""
    names = list(_HAIR_COLOURS)
    # Between two neighbours of the list: there are no steps in nature.
    place = rng.uniform(0, len(names) - 1)
    table = np.array([_HAIR_COLOURS[name] for name in names]) / 255.0
    natural = np.array([np.interp(place, np.arange(len(names)), column) for column in table.T])
    if rng.random() < 0.16:
        return natural, _any_colour(rng)
    if rng.random() < 0.1:
        return natural, _colour(_HAIR_COLOURS, str(rng.choice(names)))
    return natural, natural


def _expression(rng: np.random.Generator) -> dict[str, float]:
    """One or two units in half of the people; eyes are seldom closed."""
    if rng.random() < 0.5:
        return {}
    names = list(_EXPRESSIONS)
    odds = np.array([0.25 if name == "eye-closure" else 1.0 for name in names])
    chosen = rng.choice(names, rng.integers(1, 3), replace=False, p=odds / odds.sum())
    return {str(name): float(_EXPRESSIONS[name] * rng.uniform(0.3, 1)) for name in chosen}


def sample_person(seed: int) -> Person:
    """Draws an adult; the same seed always gives the same person."""
    rng = np.random.default_rng([7193, seed])
    male = bool(rng.random() < 0.5)
    age = float(18 + 62 * rng.beta(1.1, 1.5))
    races = rng.dirichlet((0.28, 0.28, 0.34))

    shape = np.clip(rng.standard_normal(len(shape_axes())), -2.4, 2.4)
    chosen = f"head-{rng.choice(_HEAD_SHAPES)}"
    for i, (name, minus, _, _) in enumerate(shape_axes()):
        if name.startswith("head-") and minus < 0 and name != chosen:
            shape[i] = -abs(shape[i])  # one head outline at a time
        if name == "head-age":
            shape[i] = 0.5 * shape[i] + (age - 40) / 18

    # Colours and ancestry are independent: whoever the model sees, it must look at their colours.
    tone = float(rng.random())
    natural, hair = _hair_colours(rng)
    iris = _colour(_IRIS_COLOURS, str(rng.choice(list(_IRIS_COLOURS))))

    beard = "none"
    if male:
        beard = str(rng.choice(BEARD_STYLES, p=(0.42, 0.22, 0.2, 0.06, 0.1)))
    hat = str(rng.choice(HATS, p=(0.9, 0.06, 0.04)))
    style = _hair_style(rng, male, age)
    if hat != "none" and style in ("quiff", "curly", "afro", "bun", "ponytail", "ringlets"):
        style = str(rng.choice(["short", "bob", "long", "buzz"]))
    cloth = _cloth_colour(rng)
    recession = (age - 38) / 45 + rng.normal(0, 0.22) if male else min(rng.normal(-0.1, 0.12), 0.1)
    return Person(
        seed=seed,
        age=age,
        male=float(np.clip(rng.normal(0.93 if male else 0.05, 0.06), 0, 1)),
        races=tuple(races.tolist()),
        weight=float(np.clip(rng.normal(0.5, 0.17), 0.1, 1)),
        muscle=float(np.clip(rng.normal(0.55 if male else 0.45, 0.13), 0, 1)),
        shape=shape,
        skin_tone=tone,
        skin_colour=tuple(skin_colour(tone, rng.normal(0.1, 0.6)).tolist()),
        ruddiness=float(np.clip(rng.normal(0.45, 0.22), 0, 1)),
        freckles=float(max(0.0, rng.normal(-0.2, 0.5)) * (tone < 0.4)),
        iris_colour=_jitter(rng, iris, 0.1),
        brow_thickness=float(np.clip(rng.normal(0.62 if male else 0.38, 0.15), 0.1, 1)),
        natural_hair_colour=_jitter(rng, natural, 0.08),
        lip_tint=float(np.clip(rng.normal(0.4 if male else 0.6, 0.18), 0, 1)),
        lipstick=float(rng.uniform(0.3, 0.9) if not male and rng.random() < 0.4 else 0.0),
        lipstick_colour=tuple(
            np.array([(0.72, 0.16, 0.2), (0.78, 0.36, 0.4), (0.55, 0.14, 0.22)])[rng.integers(3)]
        ),
        hair_style=style,
        hair_colour=_jitter(rng, hair, 0.1),
        hair_length=float(rng.random()),
        hair_volume=float(rng.random()),
        hair_waviness=float(rng.beta(1.0, 1.4)),
        hairline=float(np.clip(recession, 0, 1)),
        parting=float(rng.choice([-1, 1]) * rng.uniform(0.2, 1.0)),
        beard_style=beard,
        beard_length=float(rng.random()),
        glasses=str(rng.choice(["none", "round", "square", "sun"], p=(0.76, 0.1, 0.11, 0.03))),
        glasses_colour=_glasses_colour(rng),
        hat=hat,
        hat_colour=_cloth_colour(rng),
        neckline=str(rng.choice(["crew", "vee", "wide", "high"], p=(0.4, 0.25, 0.15, 0.2))),
        cloth_colour=cloth,
        second_cloth_colour=_cloth_colour(rng) if rng.random() < 0.25 else cloth,
        smile=float(max(0.0, rng.normal(0.28, 0.28))),
        brow_raise=float(np.clip(rng.normal(0.0, 0.25), -0.6, 0.6)),
        expression=_expression(rng),
        gaze=(float(rng.normal(0, 2.5)), float(rng.normal(0, 1.5))),
        place="studio" if rng.random() < 0.35 else str(rng.choice(list(environments.table()))),
        light_side=float(rng.uniform(-80, 80)),
        light_balance=float(rng.uniform(0.5, 1)),
        light_azimuth=float(rng.choice([-1, 1]) * rng.uniform(15, 55)),
        light_elevation=float(rng.uniform(20, 50)),
        key_strength=float(rng.uniform(0.8, 1.2)),
        light_warmth=float(np.clip(rng.normal(0, 0.5), -1, 1)),
    )
