"""The rasteriser against closed forms, the definition in NumPy, finite differences and gsplat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.splats import gaussians as gs
from spinmeround_jax.splats import rasterise, views
from spinmeround_jax.splats.gaussians import Gaussians
from spinmeround_jax.splats.rasterise import render
from tests.support.splat_scenes import draw, random_gaussians, rotation
from tests.support.splat_views import ellipsoid, ring

SIZE = 24
FOCAL = cameras.FOCAL * SIZE
FRONT = cameras.orbit(0.0, 0.0)
BACKGROUND = np.array([0.2, 0.5, 0.9])


def ball(z: float, scale: float, opacity: float, colour: tuple[float, float, float]) -> Gaussians:
    """A round Gaussian on the axis of the frontal camera."""
    return Gaussians(
        means=jnp.array([[0.0, 0.0, z]]),
        log_scales=jnp.log(jnp.full((1, 3), scale)),
        quaternions=jnp.array([[1.0, 0.0, 0.0, 0.0]]),
        opacity_logits=jax.scipy.special.logit(jnp.array([opacity])),
        sh=(jnp.array([[colour]]) - 0.5) / gs.SH_C0,
    )


def both(*some: Gaussians) -> Gaussians:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *some)


def bell(z: float, scale: float, opacity: float) -> np.ndarray:
    """Alpha of `ball` on the picture: a bell whose width is the projected one and the filter's."""
    variance = (FOCAL * scale / (cameras.RADIUS - z)) ** 2 + 0.3
    offsets = np.arange(SIZE) + 0.5 - SIZE / 2
    alpha = opacity * np.exp(-0.5 * (offsets[:, None] ** 2 + offsets**2) / variance)
    return np.where(alpha < 1 / 255, 0.0, alpha)


def test_one_gaussian_is_a_bell():
    drawn = render(ball(0.2, 0.05, 0.8, (0.9, 0.3, 0.1)), FRONT, FOCAL, SIZE, BACKGROUND)
    alpha = bell(0.2, 0.05, 0.8)
    rgb = alpha[..., None] * [0.9, 0.3, 0.1] + (1 - alpha[..., None]) * BACKGROUND
    np.testing.assert_allclose(drawn["alpha"], alpha, atol=1e-5)
    np.testing.assert_allclose(drawn["rgb"], rgb, atol=1e-5)
    np.testing.assert_allclose(
        drawn["depth"], np.where(alpha > 0, cameras.RADIUS - 0.2, 0), atol=1e-4
    )


def test_the_nearer_of_two_gaussians_covers_the_other():
    near, far = ball(0.3, 0.04, 0.7, (1.0, 0.0, 0.0)), ball(-0.1, 0.08, 0.9, (0.0, 1.0, 0.0))
    a, b = bell(0.3, 0.04, 0.7)[..., None], bell(-0.1, 0.08, 0.9)[..., None]
    rgb = a * [1, 0, 0] + (1 - a) * (b * [0, 1, 0] + (1 - b) * BACKGROUND)
    for order in (both(near, far), both(far, near)):
        drawn = render(order, FRONT, FOCAL, SIZE, BACKGROUND)
        np.testing.assert_allclose(drawn["rgb"], rgb, atol=1e-5)
        depth = (a * 2.4 + (1 - a) * b * 2.8)[..., 0] / np.maximum(1 - (1 - a) * (1 - b), 1e-9)[
            ..., 0
        ]
        np.testing.assert_allclose(drawn["depth"], depth, atol=1e-4)


def test_alpha_never_exceeds_its_bound():
    drawn = render(ball(0.0, 0.3, 0.99999, (0.0, 0.0, 0.0)), FRONT, FOCAL, SIZE)
    assert float(drawn["alpha"].max()) == pytest.approx(rasterise.MAX_ALPHA, abs=1e-6)


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize(("size", "tile"), [((24, 24), 4), ((17, 30), 8)])
def test_agrees_with_the_definition(degree, size, tile):
    for seed, (yaw, pitch) in enumerate([(0, 0), (70, 25), (-160, -30)]):
        scene = random_gaussians(40, degree, seed)
        pose = cameras.orbit(yaw, pitch)
        drawn = render(scene, pose, FOCAL, size, BACKGROUND, tile=tile)
        for name, wanted in draw(scene, pose, FOCAL, size, BACKGROUND).items():
            np.testing.assert_allclose(drawn[name], wanted, atol=2e-4, err_msg=f"{name} {seed}")
        assert drawn["overflow"] == 0


def test_tiles_change_nothing(monkeypatch):
    scene = random_gaussians(60, 2, 3)
    pose = cameras.orbit(20, 10)
    wanted = render(scene, pose, FOCAL, SIZE, tile=SIZE)

    def total(scene, tile):
        drawn = render(scene, pose, FOCAL, SIZE, tile=tile)
        return jnp.sum(drawn["rgb"] ** 2) + jnp.sum(drawn["depth"])

    gradient_of = jax.grad(total)
    gradient = gradient_of(scene, SIZE)
    monkeypatch.setattr(rasterise, "_PIXELS_AT_ONCE", 64)  # a few tiles at a time
    drawn = render(scene, pose, FOCAL, SIZE, tile=4)
    for name in ("rgb", "alpha", "depth", "normals"):
        np.testing.assert_allclose(drawn[name], wanted[name], atol=2e-4)
    for one, other in zip(
        jax.tree.leaves(gradient_of(scene, 4)), jax.tree.leaves(gradient), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-3 * float(abs(other).max()))


def test_other_intrinsics():
    """A wider picture with its own focal lengths and centre: the bell moves and stretches."""
    drawn = render(
        ball(0.0, 0.05, 0.8, (0, 0, 0)), FRONT, (90.0, 60.0), (20, 40), centre=(12.0, 7.0)
    )
    x, y = np.arange(40) + 0.5 - 12.0, np.arange(20) + 0.5 - 7.0
    wide, high = ((f * 0.05 / cameras.RADIUS) ** 2 + 0.3 for f in (90.0, 60.0))
    alpha = 0.8 * np.exp(-0.5 * (x**2 / wide + (y**2 / high)[:, None]))
    np.testing.assert_allclose(drawn["alpha"], np.where(alpha < 1 / 255, 0, alpha), atol=1e-5)


def test_a_full_tile_keeps_the_nearest_and_counts_the_others():
    stack = [ball(0.4 - 0.01 * i, 0.2, 0.05, (i % 2, 0.5, 0.0)) for i in range(70)]
    one = render(both(*stack), FRONT, FOCAL, 4, tile=4, capacity=32)
    wanted = render(both(*stack[:32]), FRONT, FOCAL, 4, tile=4)
    assert int(one["overflow"]) == 70 - 32
    np.testing.assert_allclose(one["rgb"], wanted["rgb"], atol=1e-6)


def test_gaussians_behind_the_camera_are_not_drawn_and_give_no_gradient():
    scene = both(
        ball(0.0, 0.05, 0.8, (1, 0, 0)),
        ball(2.7, 0.05, 0.8, (1, 0, 0)),
        ball(5.0, 0.1, 0.9, (0, 1, 0)),
    )
    only = render(ball(0.0, 0.05, 0.8, (1, 0, 0)), FRONT, FOCAL, SIZE)
    np.testing.assert_allclose(render(scene, FRONT, FOCAL, SIZE)["rgb"], only["rgb"], atol=1e-6)
    gradient = jax.grad(lambda g: jnp.sum(render(g, FRONT, FOCAL, SIZE)["rgb"]))(scene)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and abs(leaf[0]).max() >= 0 and not leaf[1:].any()


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        scene = jax.tree.map(lambda x: x.astype(jnp.float64), random_gaussians(12, 1, 5, size=0.06))
        pose = jnp.asarray(cameras.orbit(30, 10), jnp.float64)
        weights = np.random.default_rng(0).normal(size=(12, 12, 8))

        @jax.jit
        def loss(scene):
            drawn = render(scene, pose, cameras.FOCAL * 12, 12)
            parts = [
                drawn["rgb"],
                drawn["normals"],
                drawn["depth"][..., None],
                drawn["alpha"][..., None],
            ]
            return jnp.sum(jnp.concatenate(parts, -1) * weights)

        gradient = jax.grad(loss)(scene)
        rng = np.random.default_rng(1)
        for field in dataclasses.fields(Gaussians):
            value = getattr(scene, field.name)
            step = 1e-6 * rng.normal(size=value.shape)
            ahead, behind = (
                loss(dataclasses.replace(scene, **{field.name: value + sign * step}))
                for sign in (1, -1)
            )
            slope = float(jnp.sum(getattr(gradient, field.name) * step))
            assert slope == pytest.approx(float(ahead - behind) / 2, rel=2e-3), field.name


def test_rotations_and_shortest_axes():
    scene = random_gaussians(30)
    turned = gs.rotations(scene.quaternions)
    for matrix, quaternion in zip(turned, np.asarray(scene.quaternions), strict=True):
        np.testing.assert_allclose(
            matrix, rotation(quaternion / np.linalg.norm(quaternion)), atol=1e-5
        )
    camera = jnp.array([0.0, 0.0, 2.7])
    normals = np.asarray(gs.normals(scene, camera))
    across = np.einsum("ni,nij,nj->n", normals, np.asarray(gs.covariances(scene)), normals)
    np.testing.assert_allclose(across, np.exp(2 * np.asarray(scene.log_scales)).min(-1), rtol=1e-3)
    assert (np.sum(normals * (camera - scene.means), -1) >= 0).all()


def test_harmonics_are_orthonormal():
    """Over the sphere, the mean of products is 1 / (4 pi) times the identity."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(200_000, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    values = np.asarray(gs.basis(jnp.asarray(directions, jnp.float32), 3), np.float64)
    np.testing.assert_allclose(4 * np.pi * values.T @ values / len(values), np.eye(16), atol=0.02)


def test_agrees_with_gsplat():
    """Projection and harmonics of gsplat's reference in PyTorch; pip install gsplat."""
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("gsplat.cuda._torch_impl")
    scene = random_gaussians(40, 3, 2)
    scene = dataclasses.replace(scene, opacity_logits=scene.opacity_logits.clip(-2, 3))
    pose = cameras.orbit(25, 15)
    to_opencv = np.diag([1.0, -1.0, -1.0, 1.0]) @ pose

    def tensor(x):
        return torch.tensor(np.asarray(x), dtype=torch.float32)

    quaternions = np.asarray(scene.quaternions)
    quaternions = quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)
    covariances, _ = reference._quat_scale_to_covar_preci(
        tensor(quaternions), tensor(np.exp(scene.log_scales)), True, False
    )
    intrinsics = tensor([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])[None]
    _, means, depths, conics, _ = reference._fully_fused_projection(
        tensor(scene.means), covariances, tensor(to_opencv)[None], intrinsics, SIZE, SIZE
    )
    eye = cameras.camera_to_world(pose)[:3, 3]
    colours = reference._spherical_harmonics(3, tensor(scene.means) - tensor(eye), tensor(scene.sh))
    colours = torch.clamp_min(colours + 0.5, 0.0)
    opacities = tensor(jax.nn.sigmoid(scene.opacity_logits))
    # Its own blending asks for CUDA; eq. 3 of Kerbl et al. is short enough.
    order = torch.argsort(depths[0])
    v, u = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij")
    dx, dy = u[..., None] - means[0, order, 0], v[..., None] - means[0, order, 1]
    a, b, c = conics[0, order].unbind(-1)
    alpha = opacities[order] * torch.exp(-0.5 * (a * dx**2 + c * dy**2) - b * dx * dy)
    alpha = torch.where(alpha < 1 / 255, 0.0, alpha.clamp_max(rasterise.MAX_ALPHA))
    passed = torch.cumprod(torch.cat([torch.ones(SIZE, SIZE, 1), 1 - alpha], -1), -1)
    rgb = torch.einsum("hwn,nc->hwc", alpha * passed[..., :-1], colours[order])
    drawn = render(scene, pose, FOCAL, SIZE, 0.0)
    np.testing.assert_allclose(drawn["rgb"], rgb.numpy(), atol=2e-4)
    np.testing.assert_allclose(drawn["alpha"], 1 - passed[..., -1].numpy(), atol=2e-4)


def test_larger_pictures_show_what_was_fitted():
    """Needles thinner than a pixel: eight times larger, averaged over 8 x 8 pixels, the picture is the same."""
    needles = random_gaussians(40, size=1e-4)
    needles = dataclasses.replace(needles, log_scales=needles.log_scales.at[:, 0].set(np.log(0.05)))
    scene = ellipsoid(ring(8), 24)
    yaw = np.array([0.0, 100.0])
    fitted = views.draw_views(needles, scene, views.orbit(scene, yaw))
    large = list(views.turn(views.for_any_size(needles, scene), scene, yaw, (192, 192)))
    images = np.concatenate([drawn.images for drawn in large])
    assert images.shape == (2, 192, 192, 3)
    small = images.reshape(2, 24, 8, 24, 8, 3).mean(axis=(2, 4))
    contrast = abs(fitted.images - 1.0).mean()
    assert contrast > 0.05
    assert abs(small - fitted.images).mean() < 0.15 * contrast
