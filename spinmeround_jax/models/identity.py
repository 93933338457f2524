"""Arc2Face's identity context: CLIP ViT-L/14's text encoder reading "photo of a <face> person".

The ArcFace embedding replaces the prompt's token "id" (Arc2Face, arXiv 2403.11641).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from spinmeround_jax import ID_EMBEDDING_SIZE
from spinmeround_jax.models.attention import attention
from spinmeround_jax.models.layers import Keys, LayerNorm, linear


@dataclasses.dataclass(frozen=True)
class IdentityEncoderConfig:
    """Shape of the text encoder, and its two prompts.

    Raises:
        ValueError: prompts, vocabulary and widths do not fit together.
    """

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    context_length: int = 77
    prompt_ids: tuple[int, ...] = (49406, 1125, 539, 320, 1014, 2533, 49407)
    empty_ids: tuple[int, ...] = (49406, 49407)
    id_token: int = 1014  # its embedding is replaced by the ArcFace vector
    pad_id: int = 49407

    def __post_init__(self) -> None:
        if self.width < ID_EMBEDDING_SIZE:
            raise ValueError(
                f"width {self.width} cannot hold an ArcFace vector of {ID_EMBEDDING_SIZE}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        if self.prompt_ids.count(self.id_token) != 1:
            raise ValueError(f"id_token {self.id_token} must occur once in {self.prompt_ids}")
        if max(*self.prompt_ids, *self.empty_ids, self.pad_id) >= self.vocab_size:
            raise ValueError(f"token ids must be below vocab_size {self.vocab_size}")
        if max(len(self.prompt_ids), len(self.empty_ids)) > self.context_length:
            raise ValueError(f"prompts are longer than context_length {self.context_length}")


class EncoderLayer(nnx.Module):
    """Pre-norm transformer layer with causal attention and quick-GELU."""

    def __init__(self, config: IdentityEncoderConfig, *, dtype: jnp.dtype, rngs: Keys):
        self.heads = config.heads
        common = {"dtype": dtype, "rngs": rngs}
        options = {"kernel_init": nnx.initializers.normal(0.02), **common}
        width = config.width
        self.norm_1 = LayerNorm(width, **common)
        self.query = linear(width, width, **options)
        self.key = linear(width, width, **options)
        self.value = linear(width, width, **options)
        self.out = linear(width, width, **options)
        self.norm_2 = LayerNorm(width, **common)
        self.mlp_1 = linear(width, config.mlp_width, **options)
        self.mlp_2 = linear(config.mlp_width, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, t, width) -> (b, t, width)."""
        h = self.norm_1(x)
        q, k, v = (
            rearrange(project(h), "b t (heads d) -> b t heads d", heads=self.heads)
            for project in (self.query, self.key, self.value)
        )
        x = x + self.out(rearrange(attention(q, k, v, causal=True), "b t heads d -> b t (heads d)"))
        h = self.mlp_1(self.norm_2(x))
        return x + self.mlp_2(h * nnx.sigmoid(1.702 * h))


class IdentityEncoder(nnx.Module):
    """ArcFace embedding -> the context of the UNet's cross-attention."""

    def __init__(
        self, config: IdentityEncoderConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        common = {"dtype": dtype, "rngs": Keys(rngs)}
        embedding = {"embedding_init": nnx.initializers.normal(0.02), **common}
        self.token_embedding = nnx.Embed(config.vocab_size, config.width, **embedding)
        self.position_embedding = nnx.Embed(config.context_length, config.width, **embedding)
        self.layers = nnx.List(EncoderLayer(config, **common) for _ in range(config.layers))
        self.norm_out = LayerNorm(config.width, **common)

    def __call__(self, id_embedding: jax.Array) -> jax.Array:
        """Context of (b, 512) unit-norm embeddings: (b, context_length, width) float32.

        A vector of zeros (unknown identity) gives the empty prompt's context.
        """
        config = self.config
        tokens = self.token_embedding(self._padded(config.prompt_ids))
        tokens = jnp.broadcast_to(tokens, (id_embedding.shape[0], *tokens.shape))
        padded = jnp.pad(id_embedding, ((0, 0), (0, config.width - id_embedding.shape[-1])))
        position = config.prompt_ids.index(config.id_token)
        context = self._encode(tokens.at[:, position].set(padded.astype(tokens.dtype)))
        known = jnp.any(id_embedding != 0.0, axis=-1)
        return jnp.where(known[:, None, None], context, self.empty())

    def empty(self) -> jax.Array:
        """Context of the empty prompt, for guidance: (1, context_length, width) float32."""
        return self._encode(self.token_embedding(self._padded(self.config.empty_ids))[None])

    def _padded(self, ids: tuple[int, ...]) -> jax.Array:
        padding = (self.config.pad_id,) * (self.config.context_length - len(ids))
        return jnp.array(ids + padding, jnp.int32)

    def _encode(self, tokens: jax.Array) -> jax.Array:
        x = tokens + self.position_embedding(jnp.arange(self.config.context_length))
        for layer in self.layers:
            x = layer(x)
        return self.norm_out(x).astype(jnp.float32)
