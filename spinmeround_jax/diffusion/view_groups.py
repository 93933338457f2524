"""Which views are sampled together: the paper's anchors (step 2) and groups (step 3).

Angles are (yaw, pitch) in degrees relative to the first observed view, which is yaw 0, pitch 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from spinmeround_jax import cameras

IN_GROUP = 3  # views that a group of step 3 observes


def anchor_angles(observed_angles: np.ndarray, views: int) -> np.ndarray:
    """Angles of the `views - m` anchors sampled next to m observed views (step 2).

    With one observed view these are the paper's: the other `views - 1` of an even turntable. Every further
    observed view replaces the nearest anchor. Without observed views the whole turntable is sampled.
    """
    ring = cameras.turntable(views)
    for angles in observed_angles:
        ring = np.delete(ring, np.argmin(cameras.angular_distance(ring, angles)), axis=0)
    return ring


@dataclasses.dataclass(frozen=True)
class Plan:
    """Groups of step 3; indices into `known` and into the trajectory.

    Attributes:
        reused: (n,) index of the equal known view, -1 if the target must be sampled.
        triplets: (g, 3) known views that each group observes: the input, then two anchors.
        targets: (g, size) views that it samples. Smaller groups repeat their last target; the copies are
            discarded.
    """

    reused: np.ndarray
    triplets: np.ndarray
    targets: np.ndarray


def plan_views(known: np.ndarray, trajectory: np.ndarray, size: int, resampled: int = 0) -> Plan:
    """Group targets that observe the same three known views (step 3).

    The three are the input, `known[0]`, and the two anchors nearest to the target. Targets with the same two
    are divided evenly into groups, in order of yaw. Of 48 turntable views 8 are known; the others form 10
    groups: 5 views between two anchors behind the head, 7 with the anchors at 45 and 90 degrees, 6 in front.

    Args:
        known: (r, 2) angles, r >= 3.
        trajectory: (n, 2) angles.
        size: targets of a group.
        resampled: number of leading known views that are sampled nevertheless.
    """
    distance = cameras.angular_distance(trajectory[:, None], known[None])
    reused = np.where(distance.min(1) < cameras.SAME_VIEW, distance.argmin(1), -1)
    reused[reused < resampled] = -1

    # Of two equally near anchors, the one nearer to the input.
    from_input = np.broadcast_to(cameras.angular_distance(known, known[0]), distance.shape)
    order = np.lexsort((from_input[:, 1:].round(2), distance[:, 1:].round(2)), axis=1)
    nearest = 1 + np.sort(order[:, : IN_GROUP - 1], axis=1)

    triplets, targets = [], []
    for pair in np.unique(nearest[reused < 0], axis=0):
        members = np.flatnonzero((nearest == pair).all(1) & (reused < 0))
        along = (trajectory[members, 0] - known[pair[0], 0] + 180.0) % 360.0
        members = members[np.argsort(along, kind="stable")]
        for group in np.array_split(members, -(-len(members) // size)):
            triplets.append([0, *pair])
            targets.append(np.pad(group, (0, size - len(group)), mode="edge"))
    return Plan(
        reused=reused,
        triplets=np.array(triplets, int).reshape(-1, IN_GROUP),
        targets=np.array(targets, int).reshape(-1, size),
    )
