"""The jitted programs of sampling, with the loop over sigmas inside.

Networks are passed as (graphdef, state) of `nnx.split`: the state is an argument, the graphdef static, so
that `Pipeline`s of one architecture share compiled programs. Every program runs on each device of a mesh with
that device's examples; devices do not communicate.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from spinmeround_jax import sharding
from spinmeround_jax.cameras import Rays
from spinmeround_jax.diffusion import denoiser as multiview
from spinmeround_jax.diffusion import guidance, samplers
from spinmeround_jax.diffusion.denoiser import Conditioning, Network
from spinmeround_jax.models.attention import Execution


def sample_jointly(
    network: Network,
    noise: jax.Array,
    conditional: Conditioning,
    unconditional: Conditioning | None,
    sigmas: jax.Array,
    guidance_scale: jax.Array,
    temperature: jax.Array,
    sampler: str,
    guidance_interval: jax.Array | None = None,
    guide: guidance.Denoise | None = None,
) -> jax.Array:
    """Clean latents (b, v, h, w, c) of all views; observed ones are returned as given (steps 2 and 3).

    Args:
        noise: (b, v, h, w, c) unit normal.
        unconditional: for guidance; None samples without guidance at half the cost.
        temperature: scale of the initial noise, in [0, 1]. Lower values give less variation, nearer to the
            mean of the model's distribution; 0 is independent of the noise.
        sampler: a key of `samplers.SAMPLERS`.
        guidance_interval: (2,) sigmas between which guidance acts; None: at all.
        guide: a weaker model with its conditioning, for autoguidance in place of classifier-free guidance.
    """
    denoise = functools.partial(multiview.denoise, network)
    plain = guided = functools.partial(_with_conditioning, denoise, conditional)
    if guide is not None:
        guided = guidance.autoguidance(plain, guide, guidance_scale)
    elif unconditional is not None:
        guided = guidance.classifier_free(denoise, conditional, unconditional, guidance_scale)
    if guided is not plain and guidance_interval is not None:
        guided = guidance.on_interval(guided, plain, guidance_interval)
    start = temperature * samplers.initial_noise(noise, sigmas)
    latents = samplers.SAMPLERS[sampler](guided, start, sigmas)
    return multiview.place_observed(latents, conditional)


def sample_normals(
    network: Network,
    noise: jax.Array,
    conditioning: Conditioning,
    image_latents: jax.Array,
    sigmas: jax.Array,
    strength: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """Image and normal latents of single views whose image is known, by in-painting (step 1).

    Args:
        noise: (b, 1, h, w, 2z) unit normal.
        conditioning: one unobserved view.
        image_latents: (b, 1, h, w, z).
        strength: see `guidance.inpaint_channels`.
        temperature: see `sample_jointly`.
    """
    known = jnp.concatenate([image_latents, jnp.zeros_like(image_latents)], axis=-1)
    visible = jnp.arange(known.shape[-1]) < image_latents.shape[-1]
    denoise = functools.partial(multiview.denoise, network)
    one_view = functools.partial(_with_conditioning, denoise, conditioning)
    inpaint = guidance.inpaint_channels(one_view, known, visible, strength)
    return samplers.euler(inpaint, temperature * samplers.initial_noise(noise, sigmas), sigmas)


def _with_conditioning(denoise, conditioning, x, sigma):
    return denoise(x, sigma, conditioning)


def _noise(seeds, streams, shape, shared: bool) -> jax.Array:
    """(b, *shape) unit normal from (b,) integer seeds and (b, 2) streams (step, group).

    shared: all views of an example start from the same noise, as in the release.
    """

    def one(seed, stream):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream[0]), stream[1])
        return jnp.broadcast_to(
            jax.random.normal(key, (1, *shape[1:]) if shared else shape, jnp.float32), shape
        )

    return jax.vmap(one)(seeds, streams)


def _over_examples(program: Callable) -> Callable:
    """Jit of `program(state, batch, *shared, **static)` with the batch's examples split over devices.

    The jitted function has the additional static argument `mesh` (see `sharding`).
    """
    examples = P(sharding.EXAMPLES)

    def run(state, batch, *shared, mesh, **static):
        specs = (P(), examples, *[P()] * len(shared))
        body = functools.partial(program, **static)
        return jax.shard_map(
            body, mesh=mesh, in_specs=specs, out_specs=examples, check_vma=False
        )(state, batch, *shared)  # fmt: skip

    run.__name__, run.__doc__ = program.__name__, program.__doc__
    keywords = inspect.getfullargspec(program).kwonlyargs
    return jax.jit(run, static_argnames=("mesh", *keywords))


@_over_examples
def joint_views(
    state: nnx.State,
    batch: dict[str, jax.Array],
    empty_context: jax.Array,
    empty_latent: jax.Array,
    sigmas: jax.Array,
    guidance_scale: jax.Array,
    temperature: jax.Array,
    guidance_interval: jax.Array | None = None,
    guide: nnx.State | None = None,
    *,
    graphdef: nnx.GraphDef,
    guide_graphdef: nnx.GraphDef | None = None,
    rays: Rays,
    sampler: str,
    guided: bool,
    shared_noise: bool,
    kernel: str,
) -> jax.Array:
    """`sample_jointly` from poses and seeds.

    Args:
        state, graphdef: of the UNet.
        batch: context (b, t, d), observed (b, v) bool, observed_latents (b, v, h, w, c),
            world_to_camera (b, v, 4, 4), seed (b,) and stream (b, 2) integers; with a guide also
            guide_context (b, t, d).
        empty_context, empty_latent: (1, t, d) and (h, w, c), for guidance.
        guide, guide_graphdef: of a weaker UNet, for autoguidance.
        guided: False omits guidance.
        kernel: of attention, see `models.attention_kernels`.
    """
    execution = Execution(kernel=kernel)

    def condition(context: jax.Array) -> Conditioning:
        names = ("observed", "observed_latents", "world_to_camera")
        return multiview.condition(context, *(batch[name] for name in names), rays)

    conditional, without, weaker = condition(batch["context"]), None, None
    if guided and guide_graphdef is not None:
        unet = functools.partial(nnx.merge(guide_graphdef, guide), execution=execution)
        denoise = functools.partial(multiview.denoise, unet)
        weaker = functools.partial(_with_conditioning, denoise, condition(batch["guide_context"]))
    elif guided:
        without = multiview.unconditional(conditional, empty_context, empty_latent)
    shape = batch["observed_latents"].shape[1:]
    noise = _noise(batch["seed"], batch["stream"], shape, shared_noise)
    network = functools.partial(nnx.merge(graphdef, state), execution=execution)
    return sample_jointly(
        network, noise, conditional, without, sigmas, guidance_scale, temperature, sampler,
        guidance_interval, weaker,
    )  # fmt: skip


@_over_examples
def normals(
    state: nnx.State,
    batch: dict[str, jax.Array],
    sigmas: jax.Array,
    strength: jax.Array,
    temperature: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    rays: Rays,
    kernel: str,
) -> jax.Array:
    """`sample_normals` from poses and seeds: (n, h, w, 2z).

    Args:
        state, graphdef: of the UNet.
        batch: context (n, t, d), image_latents (n, h, w, z), world_to_camera (n, 4, 4), seed (n,)
            and stream (n, 2) integers.
    """
    image_latents = batch["image_latents"][:, None]
    nothing = jnp.concatenate([jnp.zeros_like(image_latents)] * 2, axis=-1)
    unobserved = jnp.zeros(nothing.shape[:2], bool)
    poses = batch["world_to_camera"][:, None]
    conditioning = multiview.condition(batch["context"], unobserved, nothing, poses, rays)
    noise = _noise(batch["seed"], batch["stream"], nothing.shape[1:], False)
    network = functools.partial(nnx.merge(graphdef, state), execution=Execution(kernel=kernel))
    return sample_normals(
        network, noise, conditioning, image_latents, sigmas, strength, temperature
    )[:, 0]


@_over_examples
def contexts(state, batch, *, graphdef):
    return nnx.merge(graphdef, state)(batch["id_embedding"])


@functools.partial(jax.jit, static_argnames="graphdef")
def empty_context(state, *, graphdef):
    return nnx.merge(graphdef, state).empty()


@_over_examples
def encode(state, batch, *, graphdef):
    return nnx.merge(graphdef, state).encode(batch["images"])


@_over_examples
def decode(state, batch, *, graphdef):
    return jnp.clip(nnx.merge(graphdef, state).decode(batch["latents"]), -1.0, 1.0)
