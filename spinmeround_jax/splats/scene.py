"""Views with cameras to fit: nerfstudio's transforms.json and the images it names, in a world with y up."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.photo.images import TO_STORED
from spinmeround_jax.results import transforms
from spinmeround_jax.results.transforms import Frame, Intrinsics

MIN_VIEWS = 8
MAX_VIEWS = 2000
MAX_SIZE = 2048  # px; larger images are refused before they are decoded
MIN_SIZE = 16
MAX_GAP = 180.0  # degrees without a camera beyond which half of the head is unseen
WHITE_TOLERANCE = 8.0 / 255.0
FAR = 100.0  # distances from the cameras: a scene further from the origin is moved there, float32 is coarse
SNAP = 5.0  # degrees: an estimated up this near to an axis of the world is that axis
AXES = {
    sign + axis: (-1.0 if sign else 1.0) * np.eye(3)[i]
    for i, axis in enumerate("xyz")
    for sign in ("", "-")
}
UPS = ("auto", *AXES)


@dataclasses.dataclass(frozen=True)
class Scene:
    """v views of one thing, h x w pixels, in a world with y up.

    images: (v, h, w, 3) float16 in [0, 1], on `background`.
    masks: (v, h, w) float16 in [0, 1], what is not background.
    normals: (v, h, w, 3) float16 in the world, length 1 or shorter at edges, 0 on the background, and all
        0 in a view without; None if all are without.
    world_to_camera: (v, 4, 4) float32, OpenGL cameras (`cameras.py`).
    focal, centre: (2,) pixels, x and y, of all views.
    background: (3,) in [0, 1].
    names: of the images.
    masks_from: of each view "mask", "alpha", "normals" or "background": where its mask comes from.
    up: what was up in the world of the file, and who says so.
    applied_transform: (4, 4) float64 from the original data's coordinates to this world.
    """

    images: np.ndarray
    masks: np.ndarray
    normals: np.ndarray | None
    world_to_camera: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    background: np.ndarray
    names: tuple[str, ...]
    masks_from: tuple[str, ...]
    up: str = "y"
    applied_transform: np.ndarray = dataclasses.field(default_factory=lambda: np.eye(4))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[1:3]

    @property
    def has_normals(self) -> np.ndarray:
        """(v,) bool."""
        if self.normals is None:
            return np.zeros(len(self), bool)
        return (self.normals != 0.0).any(axis=(1, 2, 3))

    def take(self, views: np.ndarray) -> Scene:
        """The views with these numbers."""
        return dataclasses.replace(
            self,
            images=self.images[views],
            masks=self.masks[views],
            normals=None if self.normals is None else self.normals[views],
            world_to_camera=self.world_to_camera[views],
            names=tuple(self.names[i] for i in views),
            masks_from=tuple(self.masks_from[i] for i in views),
        )


def middle_and_radius(scene: Scene) -> tuple[np.ndarray, float]:
    """(3,) point nearest to all optical axes, and the radius around it that the images show.

    Raises:
        InputError: the cameras do not look at one place.
    """
    middle, distance = _middle_and_distance(scene.world_to_camera)
    height, width = scene.size
    half = np.array([width, height]) / (2 * scene.focal)
    return middle, float(distance * np.linalg.norm(half))


def _middle_and_distance(world_to_camera: np.ndarray) -> tuple[np.ndarray, float]:
    """(3,) point nearest to all optical axes, and the median depth of it."""
    rotation = world_to_camera[:, :3, :3].astype(np.float64)
    positions = camera_positions(world_to_camera)
    near = positions.mean(0)  # what is summed below stays small in a world far from its origin
    forward = -rotation[:, 2]
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    middle, _, rank, _ = np.linalg.lstsq(
        across.sum(0), np.einsum("vij,vj->i", across, positions - near), rcond=1e-6
    )
    middle = middle + near
    depth = np.einsum("vj,vj->v", forward, middle - positions)
    if rank < 3 or (depth <= 0).any():
        raise InputError(
            "the cameras do not look at one place from around it; reconstruction needs views of one thing"
        )
    return middle, float(np.median(depth))


def camera_positions(world_to_camera: np.ndarray) -> np.ndarray:
    """(v, 3) float64 positions of (v, 4, 4) cameras."""
    pose = np.asarray(world_to_camera, np.float64)
    return -np.einsum("vji,vj->vi", pose[:, :3, :3], pose[:, :3, 3])


def check(scene: Scene, where: str, one_sided: bool = False) -> None:
    """Whether there is enough to reconstruct from.

    Args:
        where: the file to name.
        one_sided: accept cameras on one side only.

    Raises:
        InputError: too few views, cameras on one side, empty masks.
    """
    if len(scene) < MIN_VIEWS:
        raise InputError(f"{where}: {len(scene)} views; reconstruction needs at least {MIN_VIEWS}")
    empty = [
        name for name, mask in zip(scene.names, scene.masks, strict=True) if mask.mean() < 1e-3
    ]
    if empty:
        raise InputError(f"{where}: nothing but background in {empty[0]}; take the view out")
    try:
        middle, _ = middle_and_radius(scene)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    offset = camera_positions(scene.world_to_camera) - middle
    yaw = np.sort(np.rad2deg(np.arctan2(offset[:, 0], offset[:, 2])))
    gap = np.max(np.diff(np.concatenate([yaw, yaw[:1] + 360.0])))
    if gap >= MAX_GAP and not one_sided:
        raise InputError(
            f"{where}: no camera within {gap:.0f} degrees of azimuth, so one side is never seen; add "
            "views from there, or allow it with --one-sided"
        )


def of_views(
    images: np.ndarray,
    normals: np.ndarray,
    world_to_camera: np.ndarray,
    names: Sequence[str],
    masks: np.ndarray | None = None,
) -> Scene:
    """Views as `sample` and `data_prep` make them.

    Args:
        images: (v, s, s, 3) in [-1, 1] on white.
        normals: (v, s, s, 3) in the world; 0, or shorter than 1/2, on the background.
        masks: (v, s, s); None takes what has normals.
    """
    size = images.shape[1]
    normals = transforms.without_grey(normals)
    return Scene(
        images=np.clip(0.5 * images + 0.5, 0.0, 1.0).astype(np.float32),
        masks=np.float32(np.any(normals != 0.0, axis=-1) if masks is None else masks),
        normals=normals.astype(np.float32),
        world_to_camera=world_to_camera,
        focal=np.full(2, cameras.FOCAL * size),
        centre=np.full(2, size / 2),
        background=np.ones(3, np.float32),
        names=tuple(names),
        masks_from=("normals" if masks is None else "alpha",) * len(images),
    )


def load(path: str | pathlib.Path, background: np.ndarray | None = None, up: str = "auto") -> Scene:
    """Read transforms.json, or the folder that holds it, and the images; the world is turned to y up.

    A view's mask comes from its mask file or alpha (`transforms.read_mask`), else from its normals (0 on the
    background), else from the pixels that differ from the background.

    Args:
        background: (3,) in [0, 1], of images without mask file or alpha; replaces the background of the
            others. None is white.
        up: one of UPS, an axis of the file's world; "auto" is what the file says, else how the cameras
            are held.

    Raises:
        InputError: naming the file, for anything that does not fit.
    """
    given = transforms.read(pathlib.Path(path))
    intrinsics = _shared_intrinsics(given)
    turned, up_from = up_rotation(given, up)
    poses = np.stack([frame.world_to_camera for frame in given.frames])
    poses, applied = _moved(poses, turned)
    background = np.ones(3) if background is None else np.asarray(background, np.float64)
    width, height = intrinsics.size
    shape = (len(given.frames), height, width)
    # Half precision: 14 bytes a pixel instead of 28, off by a sixteenth of a level of 8 bits.
    images, masks = np.empty((*shape, 3), np.float16), np.empty(shape, np.float16)
    has_normals = any(frame.normals is not None for frame in given.frames)
    normals = np.zeros((*shape, 3), np.float16) if has_normals else None
    sources = []
    for i, frame in enumerate(given.frames):
        picture = transforms.read_image(frame.image, frame.orientation)
        mask = transforms.read_mask(picture, frame.mask, frame.orientation)
        alpha = picture.pixels[..., 3] / np.float32(255.0) if mask is None else mask
        image = picture.pixels[..., :3] * (alpha[..., None] / 255.0)
        image += background * (1.0 - alpha[..., None])
        images[i] = image
        world = transforms.read_normals(frame)
        if world is not None:
            world = world @ turned.T.astype(np.float32)
            normals[i] = world
        if mask is not None:
            masks[i] = mask
            sources.append("alpha" if frame.mask is None else "mask")
        elif world is not None:
            masks[i] = np.linalg.norm(world, axis=-1) > 0.5
            sources.append("normals")
        else:
            masks[i] = (abs(image - background) > WHITE_TOLERANCE).any(-1)
            sources.append("background")
    return Scene(
        images=images,
        masks=masks,
        normals=normals,
        world_to_camera=poses.astype(np.float32),
        focal=np.array(intrinsics.focal),
        centre=np.array(intrinsics.centre),
        background=background.astype(np.float32),
        names=tuple(frame.file_path for frame in given.frames),
        masks_from=tuple(sources),
        up=up_from,
        applied_transform=applied @ given.applied_transform,
    )


def _shared_intrinsics(given: transforms.Transforms) -> Intrinsics:
    """The one camera of all views.

    Raises:
        InputError: too many views, sizes out of range, several cameras, distortion.
    """
    path, first = given.path, given.frames[0]
    if len(given.frames) > MAX_VIEWS:
        raise InputError(f"{path}: {len(given.frames)} frames; this takes at most {MAX_VIEWS}")
    given.refuse_distortion()
    for frame in given.frames:
        width, height = frame.intrinsics.size
        if not MIN_SIZE <= min(width, height) or max(width, height) > MAX_SIZE:
            raise InputError(
                f"{frame.image}: {width}x{height} pixels; this takes {MIN_SIZE} to {MAX_SIZE}"
            )
        if frame.intrinsics.size != first.intrinsics.size:
            raise InputError(
                f"{frame.image}: {width}x{height} pixels, {first.image.name} "
                f"{first.intrinsics.size[0]}x{first.intrinsics.size[1]}; all views must be of one size"
            )
    numbers = np.array([frame.intrinsics.focal + frame.intrinsics.centre for frame in given.frames])
    if np.ptp(numbers, axis=0).max() > 1e-3 * first.intrinsics.size[0]:
        low, high = (", ".join(f"{x:g}" for x in f(axis=0)) for f in (numbers.min, numbers.max))
        raise InputError(
            f"{path}: frames of different intrinsics (fl_x, fl_y, cx, cy from {low} to {high}), but all "
            "views must be of one camera; calibrate them as one (COLMAP: --ImageReader.single_camera 1), "
            "or undistort them to one"
        )
    return first.intrinsics


# --------------------------------------------------------------------------------------------------
# Which way is up


def up_rotation(given: transforms.Transforms, up: str) -> tuple[np.ndarray, str]:
    """(3, 3) rotation of the file's world that brings its up to y, and where it comes from.

    Raises:
        InputError: `up` is "auto", the file does not say, and it cannot be seen from the cameras.
    """
    if up != "auto":
        return rotation_to_y(AXES[up]), f"{up}, as given"
    if given.up is not None:
        return rotation_to_y(given.up), f"{_axis_name(given.up)}, as {given.path.name} says"
    found = estimate_up(given.frames)
    if found is None:
        raise InputError(
            f"{given.path}: which way is up cannot be seen from the cameras; give it, for example --up z"
        )
    nearest = max(AXES.values(), key=lambda axis: axis @ found)
    if nearest @ found > np.cos(np.deg2rad(SNAP)):
        found = nearest
    return rotation_to_y(found), f"{_axis_name(found)}, as the cameras are held"


def estimate_up(frames: tuple[Frame, ...]) -> np.ndarray | None:
    """(3,) unit vector of the direction in the world that is upward in the images, None if there is none.

    People hold cameras level: up is the direction that is most nearly at a right angle to the horizontal
    axes of all images. Where all of them look the same way, or past one another, only the mean of the
    images' own up is left.
    """
    # Rows of a camera's rotation are the image's right and up in the world; an image that is stored
    # turned has its upright right and up among its stored ones (y down).
    turns = np.array([TO_STORED[frame.orientation] for frame in frames], np.float64)
    rows = np.stack([frame.world_to_camera[:2, :3] for frame in frames]) * [[1.0], [-1.0]]
    right, down = np.moveaxis(np.einsum("vij,vik->vjk", turns, rows), 1, 0)
    mean = -down.mean(0)
    spread, directions = np.linalg.eigh(right.T @ right / len(frames))
    if spread[1] > 0.03:  # the rights span a plane, sin(10 degrees)^2 or more
        found = directions[:, 0]
    else:
        found = mean - directions[:, 2] * (directions[:, 2] @ mean)
    length = np.linalg.norm(found)
    if length < 0.1 or abs(found @ mean) < 0.1 * length:
        return None
    return np.sign(found @ mean) * found / length


def rotation_to_y(up: np.ndarray) -> np.ndarray:
    """(3, 3) the smallest rotation from a unit vector to y; half a turn is about x."""
    target = np.array(transforms.UP)
    cosine = float(up @ target)
    if cosine > 1.0 - 1e-12:
        return np.eye(3)
    if cosine < -1.0 + 1e-12:
        return np.diag([1.0, -1.0, -1.0])
    x, y, z = np.cross(up, target)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + cross + cross @ cross / (1.0 + cosine)


def _axis_name(up: np.ndarray) -> str:
    for name, axis in AXES.items():
        if np.allclose(axis, up, atol=1e-6):
            return name
    return "(" + ", ".join(f"{x:.3f}" for x in up) + ")"


def _moved(poses: np.ndarray, turned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(v, 4, 4) cameras in the turned world, its middle at the origin if it was far; and the (4, 4) motion."""
    motion = np.eye(4)
    motion[:3, :3] = turned
    try:
        middle, distance = _middle_and_distance(poses)
    except InputError:
        pass  # `check` reports it
    else:
        if np.linalg.norm(middle) > FAR * distance:
            motion[:3, 3] = -turned @ middle
    poses = poses.copy()
    back = -turned.T @ motion[:3, 3]  # the new origin in the old world
    poses[:, :3, 3] += poses[:, :3, :3] @ back
    poses[:, :3, :3] = poses[:, :3, :3] @ turned.T
    return poses, motion
