"""The 125 directions every subject is rendered from, the same for all subjects.

Index 0..47: the ring at pitch 0, yaw = 7.5 * index degrees wrapped to (-180, 180]: index 0 is the
frontal view, and the anchors of the paper are ANCHOR_INDICES (every sixth).
Index 48..124: 77 more, spread evenly over the zone of pitches in [-25, 40] degrees.
"""

import numpy as np

FRONTAL = (15.0, 10.0)  # degrees of |yaw| and |pitch|
RING = 48
COUNT = 125
PITCH_RANGE = (-25.0, 40.0)
ANCHOR_INDICES = tuple(range(0, RING, RING // 8))  # yaw 0 45 90 135 180 -135 -90 -45


def viewpoints(count: int = COUNT) -> np.ndarray:
    """(count, 2) float64 (yaw, pitch) in degrees; a smaller count keeps the ring's pattern.

    For count < 125 views are taken evenly from the ring first (so 8 gives the anchors), which is
    what previews and tests want; for 48 and more the whole ring comes first.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if count < RING:
        yaw = np.arange(count) * 360.0 / count
        ring = np.stack([yaw, np.zeros(count)], axis=1)
    else:
        ring = np.stack([np.arange(RING) * 360.0 / RING, np.zeros(RING)], axis=1)
    extra = max(count - RING, 0)
    # A Fibonacci lattice: equal steps in sin(pitch) are equal areas, and golden-angle turns in
    # yaw avoid rows. The quarter turn keeps it off the ring's front.
    low, high = np.sin(np.radians(PITCH_RANGE))
    heights = low + (high - low) * (np.arange(extra) + 0.5) / max(extra, 1)
    golden = 180.0 * (3.0 - np.sqrt(5.0))
    lattice = np.stack([90.0 + golden * np.arange(extra), np.degrees(np.arcsin(heights))], axis=1)
    views = np.concatenate([ring, lattice])
    views[:, 0] = 180.0 - (180.0 - views[:, 0]) % 360.0
    return views


def drawn(views: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) numbers of some of the (n, 2) viewpoints, for a subject that is not seen from all.

    First, the same for all subjects, the anchors that are among them, the frontal view first, and
    the other frontal views (within FRONTAL); then others drawn without replacement, in ascending
    order.

    Raises:
        ValueError: `count` is less than the views that are always there, or more than n.
    """
    anchors = np.isclose(views[:, 0] % 45.0, 0) & np.isclose(views[:, 1], 0)
    frontal = (np.abs(views) <= FRONTAL).all(axis=1) & ~anchors
    always = np.concatenate([np.flatnonzero(anchors), np.flatnonzero(frontal)])
    if not len(always) <= count <= len(views):
        raise ValueError(f"of {len(views)} viewpoints, {len(always)} to {len(views)} can be drawn")
    others = np.setdiff1d(np.arange(len(views)), always)
    chosen = rng.choice(others, count - len(always), replace=False)
    return np.concatenate([always, np.sort(chosen)])
