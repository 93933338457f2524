"""Fit Gaussians to views: losses, Adam, relocation of Gaussians that have faded.

Kerbl et al. (SIGGRAPH 2023) with a fixed number of Gaussians, as a Markov chain (Kheradmand et al., "3D
Gaussian Splatting as Markov Chain Monte Carlo", NeurIPS 2024): no splitting, so that shapes never change and
one compiled program serves the whole fit. SpinMeRound adds LPIPS to the loss.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spinmeround_jax import files, metrics
from spinmeround_jax.files import InputError
from spinmeround_jax.splats import hull
from spinmeround_jax.splats.gaussians import Gaussians, from_surface
from spinmeround_jax.splats.rasterise import CAPACITY, render
from spinmeround_jax.splats.relocation import add_noise, forget, relocate
from spinmeround_jax.splats.scene import Scene, camera_positions, middle_and_radius

_logger = logging.getLogger(__name__)

MAX_FAULTS = 20  # steps in a row without a finite gradient
CHECKPOINT_EVERY = 200  # steps
_MAX_CHECKPOINT_BYTES = 1 << 32
RELOCATE_EVERY, RELOCATE_FROM, RELOCATE_UNTIL = 100, 0.1, 0.8  # steps; shares of the fit


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How to fit. The defaults are for the quickstart's 64 pixels.

    steps: of Adam, one view each.
    count: Gaussians.
    degree: of the spherical harmonics, 0 to 3.
    dssim, lpips, mask, normals: weights of the losses beside (1 - dssim) L1.
    lpips_network: "alexnet" or "vgg16".
    opacity_cost, scale_cost: weights of the mean opacity and of the mean scale in pixels, which make
        Gaussians fade that are not needed (Kheradmand et al., eq. 10).
    noise: weight of the noise on nearly invisible Gaussians (there, eq. 8).
    rate: multiple of all learning rates.
    """

    steps: int = 2000
    count: int = 3000
    degree: int = 1
    dssim: float = 0.2
    lpips: float = 0.1
    lpips_network: str = "alexnet"
    mask: float = 0.1
    normals: float = 0.05
    opacity_cost: float = 0.001
    scale_cost: float = 0.0
    noise: float = 1.0
    rate: float = 4.0
    capacity: int = CAPACITY
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    gaussians: Gaussians
    adam: optax.OptState
    step: jax.Array  # () int32
    faults: jax.Array  # () int32, steps in a row whose gradient was not finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _View:
    """Of any floating-point type; one view at a time is on the device."""

    image: jax.Array  # (h, w, 3) in [0, 1]
    mask: jax.Array  # (h, w)
    normals: jax.Array  # (h, w, 3), all 0 if unknown
    world_to_camera: jax.Array  # (4, 4)


# --------------------------------------------------------------------------------------------------
# Losses


def _losses(drawn: dict[str, jax.Array], view: _View, settings: FitSettings) -> jax.Array:
    loss = (1.0 - settings.dssim) * jnp.mean(abs(drawn["rgb"] - view.image))
    if settings.dssim:
        loss += settings.dssim * (1.0 - metrics.ssim_of(drawn["rgb"], view.image))
    if settings.lpips:
        distance = metrics.lpips(settings.lpips_network, precision=None)
        loss += settings.lpips * distance(2 * drawn["rgb"][None] - 1, 2 * view.image[None] - 1)[0]
    if settings.mask:
        loss += settings.mask * jnp.mean(abs(drawn["alpha"] - view.mask))
    if settings.normals:
        known = jnp.any(view.normals != 0.0)
        loss += settings.normals * known * jnp.mean(abs(drawn["normals"] - view.normals))
    return loss


# --------------------------------------------------------------------------------------------------
# One step


def _rates(settings: FitSettings, pixel: float, step: jax.Array) -> Gaussians:
    """Learning rates: 3DGS's, but for the means, which go by the size of a pixel in the world.

    3DGS takes 30000 steps; in a twentieth of them a Gaussian must be able to cross a few pixels.
    """
    done = step / settings.steps
    slowing = settings.rate * 0.1**done
    count = (settings.degree + 1) ** 2
    sh = np.full((count, 1), 2.5e-3 / 20.0, np.float32)
    sh[0] = 2.5e-3
    return Gaussians(
        means=settings.rate * 0.1 * pixel * 0.01**done,
        log_scales=5e-3 * slowing,
        quaternions=2e-3 * slowing,
        opacity_logits=2.5e-2 * slowing,
        sh=2.0 * sh * slowing,
    )


@functools.lru_cache(maxsize=4)
def _make_step(
    settings: FitSettings,
    pixel: float,
    size: tuple[int, int],
    focal: tuple[float, float],
    centre: tuple[float, float],
    background: tuple[float, float, float],
    draw: Callable[..., dict[str, jax.Array]],
) -> Callable[[_State, _View], tuple[_State, dict[str, jax.Array]]]:
    """One compiled step, shared by all heads of a run that have the same cameras."""
    adam = optax.scale_by_adam(eps=1e-15)

    def loss_of(gaussians: Gaussians, view: _View) -> tuple[jax.Array, dict[str, jax.Array]]:
        view = jax.tree.map(lambda x: x.astype(jnp.float32), view)  # kept in half precision
        drawn = draw(
            gaussians,
            view.world_to_camera,
            focal,
            size,
            jnp.array(background),
            centre,
            settings.capacity,
        )
        error = jnp.mean((jnp.clip(drawn["rgb"], 0.0, 1.0) - view.image) ** 2)
        loss = _losses(drawn, view, settings)
        loss += settings.opacity_cost * jnp.mean(jax.nn.sigmoid(gaussians.opacity_logits))
        loss += settings.scale_cost * jnp.mean(jnp.exp(gaussians.log_scales)) / pixel
        return loss, {"loss": loss, "error": error, "overflow": drawn["overflow"]}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: _State, view: _View) -> tuple[_State, dict[str, jax.Array]]:
        (loss, measured), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.gaussians, view
        )
        parts = [loss, *jax.tree.leaves(gradient)]
        sound = jnp.all(jnp.array([jnp.isfinite(part).all() for part in parts]))
        direction, moments = adam.update(gradient, state.adam)
        rates = _rates(settings, pixel, state.step)
        moved = jax.tree.map(lambda p, d, r: p - r * d, state.gaussians, direction, rates)
        if settings.noise:
            key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
            moved = add_noise(moved, key, settings.noise * rates.means / pixel**2)
        after = _State(moved, moments, state.step + 1, jnp.zeros_like(state.faults))
        # A gradient that is not finite is not followed; the next view may give a sound one.
        stayed = dataclasses.replace(state, step=state.step + 1, faults=state.faults + 1)
        after = jax.tree.map(lambda a, b: jnp.where(sound, a, b), after, stayed)
        return after, {**measured, "faults": after.faults}

    return step


# --------------------------------------------------------------------------------------------------
# The fit


def fit(
    scene: Scene,
    settings: FitSettings,
    checkpoint: pathlib.Path | None = None,
    progress: Callable[[int, float, float], None] = lambda step, loss, psnr: None,
    draw: Callable[..., dict[str, jax.Array]] = render,
) -> tuple[Gaussians, dict[str, int]]:
    """Gaussians that look like the views.

    What is fitted follows from scene, settings and seed, also across a kill: state and moments are
    kept in `checkpoint` and read again if they are whole, and of the same scene and settings.

    Args:
        progress: called with the step, and means of loss and PSNR over the last steps.
        draw: `rasterise.render`, or another with its arguments and results (`nvidia.choose`).

    Returns:
        The Gaussians, and counts: "resumed_at", "faults" (steps skipped as their gradient was not
        finite), "overflow" (most Gaussians left out in one step by tiles that were full).

    Raises:
        InputError: gradients stay not finite, or the masks have no hull.
    """
    _check(scene, settings)
    pixel = pixel_size(scene)
    state = _begin(scene, settings)
    identity = _identity(scene, settings)
    if checkpoint is not None and checkpoint.exists():
        try:
            state = _restore(checkpoint, state, identity)
        except Exception as error:  # the file can hold anything
            _logger.warning("%s: begun anew, not resumed (%s)", checkpoint, error)
    resumed_at = int(state.step)
    unknown = np.zeros((*scene.size, 3), scene.images.dtype)

    def view(i: int) -> _View:
        normals = unknown if scene.normals is None else scene.normals[i]
        return _View(scene.images[i], scene.masks[i], normals, scene.world_to_camera[i])

    if scene.normals is None:
        settings = dataclasses.replace(settings, normals=0.0)
    plain = (tuple(map(float, x)) for x in (scene.focal, scene.centre, scene.background))
    step = _make_step(settings, pixel, tuple(scene.size), *plain, draw)
    recent: list[dict[str, jax.Array]] = []
    faults, overflow = 0, 0
    for n in range(resumed_at, settings.steps):
        state, measured = step(state, view(_view_of(n, len(scene), settings.seed)))
        recent.append(measured)
        if len(recent) == 20 or n + 1 == settings.steps:
            values = {k: np.array([float(t[k]) for t in recent]) for k in measured}
            recent = []
            faults += int((values["faults"] > 0).sum())
            overflow = max(overflow, int(values["overflow"].max()))
            if values["faults"][-1] >= MAX_FAULTS:
                raise InputError(
                    f"the gradient has not been finite for {MAX_FAULTS} steps; lower --rate, or look "
                    "for wrong cameras among the views"
                )
            psnr = -10.0 * np.log10(max(float(values["error"].mean()), 1e-12))
            progress(n + 1, float(values["loss"].mean()), psnr)
        within = RELOCATE_FROM * settings.steps <= n + 1 <= RELOCATE_UNTIL * settings.steps
        if within and (n + 1) % RELOCATE_EVERY == 0:
            key = jax.random.fold_in(jax.random.key(settings.seed + 1), n)
            moved, changed = relocate(state.gaussians, key)
            state = dataclasses.replace(state, gaussians=moved, adam=forget(state.adam, changed))
        if checkpoint is not None and (n + 1) % CHECKPOINT_EVERY == 0:
            _save(checkpoint, state, identity)
    return state.gaussians, {"resumed_at": resumed_at, "faults": faults, "overflow": overflow}


def pixel_size(scene: Scene) -> float:
    """Size of a pixel in the world, at the middle of the scene."""
    middle, _ = middle_and_radius(scene)
    distance = np.linalg.norm(camera_positions(scene.world_to_camera) - middle, axis=-1)
    return float(np.median(distance) / np.mean(scene.focal))


def _check(scene: Scene, settings: FitSettings) -> None:
    smallest = metrics.LPIPS_SMALLEST if settings.lpips else metrics.SSIM_WINDOW
    if min(scene.size) < smallest:
        height, width = scene.size
        raise InputError(
            f"images of {width}x{height} pixels; this loss needs {smallest}: --lpips 0, or larger images"
        )
    if settings.steps < 1 or settings.count < 1:
        raise InputError("at least one step and one Gaussian are needed")


def _begin(scene: Scene, settings: FitSettings) -> _State:
    points, normals, colours, spacing = hull.surface(scene, settings.count, settings.seed)
    gaussians = from_surface(points, normals, colours, spacing, settings.degree)
    adam = optax.scale_by_adam(eps=1e-15).init(gaussians)
    return _State(gaussians, adam, jnp.int32(0), jnp.int32(0))


def _view_of(step: int, views: int, seed: int) -> int:
    """Each view once per epoch, in a new order."""
    epoch, place = divmod(step, views)
    return int(np.random.default_rng([seed, epoch]).permutation(views)[place])


# --------------------------------------------------------------------------------------------------
# Checkpoints: a sealed .npz, no pickles


def views_sha256(scene: Scene) -> str:
    """SHA-256 of all that a fit sees of a scene, whatever its files are called."""
    digest = hashlib.sha256()
    for array in (scene.images, scene.masks, scene.world_to_camera, scene.focal, scene.centre):
        digest.update(np.ascontiguousarray(array).tobytes())
    if scene.normals is not None:
        digest.update(scene.normals.tobytes())
    return digest.hexdigest()


def _identity(scene: Scene, settings: FitSettings) -> str:
    return json.dumps(
        {"views": views_sha256(scene), **dataclasses.asdict(settings)}, sort_keys=True
    )


def _save(path: pathlib.Path, state: _State, identity: str) -> None:
    arrays = {f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    buffer = io.BytesIO()
    np.savez(buffer, identity=np.array(identity), **arrays)
    files.write_atomically(path, files.seal(buffer.getvalue()))


def _restore(path: pathlib.Path, like: _State, identity: str) -> _State:
    leaves, structure = jax.tree.flatten(like)
    content = files.unseal(files.read_bytes(path, _MAX_CHECKPOINT_BYTES))
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        if str(stored["identity"]) != identity:
            raise ValueError("it is of other views or settings")
        arrays = [stored[f"a{i}"] for i in range(len(leaves))]
    if [a.shape for a in arrays] != [x.shape for x in leaves]:
        raise ValueError("arrays of other shapes")
    return jax.tree.unflatten(structure, [jnp.asarray(a) for a in arrays])
