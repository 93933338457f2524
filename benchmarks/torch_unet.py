"""The UNet, a training step and a sampler in PyTorch: diffusers' modules with our weights.

The only module of the benchmarks that imports PyTorch; it needs the extra [parity].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.optim.swa_utils import get_ema_multi_avg_fn

from spinmeround_jax.config import OptimizerConfig
from spinmeround_jax.diffusion.denoiser import Conditioning
from spinmeround_jax.models import MultiViewUNet, UNetConfig
from spinmeround_jax.weights import diffusers as diffusers_names


@dataclasses.dataclass(frozen=True)
class Options:
    """`torch.compile` (on a CPU it needs a C++ compiler), and the memory format of feature maps."""

    compile: bool = False
    channels_last: bool = False


class AllViews(AttnProcessor2_0):
    """diffusers' attention over the tokens of all views of an example together."""

    def __init__(self, views: int):
        super().__init__()
        self.views = views

    def __call__(self, attn, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        rows, tokens, width = hidden_states.shape
        together = hidden_states.reshape(rows // self.views, self.views * tokens, width)
        return super().__call__(attn, together, *args, **kwargs).reshape(rows, tokens, width)


def build(config: UNetConfig, views: int) -> UNet2DConditionModel:
    """diffusers' UNet of our shape, without memory for its weights (on the "meta" device)."""
    levels = range(len(config.channel_mult))
    attends = [level in config.attention_levels for level in levels]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=config.widths,
            layers_per_block=config.res_blocks,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
            transformer_layers_per_block=config.transformer_depth,
            norm_num_groups=config.norm_groups,
            cross_attention_dim=config.context_dim,
            attention_head_dim=config.heads,  # diffusers' name for the number of heads
        )
    joint = {f"down_blocks.{level}." for level in config.joint_levels}
    joint |= {f"up_blocks.{len(levels) - 1 - level}." for level in config.joint_levels}
    joint.add("mid_block.")
    unet.set_attn_processor(
        {
            name: AllViews(views)
            if ".attn1." in name and name.startswith(tuple(joint))
            else AttnProcessor2_0()
            for name in unet.attn_processors
        }
    )
    return unet


def tensors(
    network: MultiViewUNet, values: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, torch.Tensor]:
    """`values` (by our names, see `parameters`) under diffusers' names and in PyTorch's layout.

    Args:
        network: whose parameters they are; it may be abstract.
    """
    # Not `Target.source_shape`: there the first and the last layer have Arc2Face's four channels.
    return {
        theirs: torch.from_numpy(
            np.array(np.transpose(np.asarray(values[target.name]), np.argsort(target.axes)))
        )
        for theirs, target in diffusers_names.targets(network, ()).items()
    }


class TorchUNet:
    """F(x; c_noise, context) with the arguments of `MultiViewUNet`, on PyTorch's device.

    Args:
        values: parameters by our names.
        views: of an example.
        dtype: "float32" or "bfloat16", of weights and arithmetic.
        trained: float32 weights, computing in `dtype` by autocast, as PyTorch trains.

    Raises:
        RuntimeError: diffusers' UNet has other weights than ours.
    """

    def __init__(
        self,
        network: MultiViewUNet,
        values: Mapping[str, jax.Array | np.ndarray],
        views: int,
        dtype: str,
        options: Options,
        trained: bool = False,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype, self.views, self.options = getattr(torch, dtype), views, options
        unet = build(network.config, views)
        stored = torch.float32 if trained else self.dtype
        weights = {name: x.to(stored) for name, x in tensors(network, values).items()}
        unet.load_state_dict(weights, assign=True)
        unet = unet.to(self.device)
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.unet = unet.to(memory_format=self.format).train(trained).requires_grad_(trained)
        self.forward = torch.compile(self.unet) if options.compile else self.unet

    def input(self, array: np.ndarray | jax.Array) -> torch.Tensor:
        """On the device, in float32."""
        return torch.from_numpy(np.array(array, np.float32)).to(self.device)

    def __call__(
        self, x: torch.Tensor, c_noise: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        """x (b, v, h, w, c), c_noise (b,), context (b, t, d) -> (b, v, h, w, out) float32."""
        b, v = x.shape[:2]
        x = x.flatten(0, 1).permute(0, 3, 1, 2).to(self.unet.dtype, memory_format=self.format)
        context = context.to(self.unet.dtype).repeat_interleave(v, dim=0)
        out = self.forward(x, c_noise.repeat_interleave(v), context).sample
        return out.float().permute(0, 2, 3, 1).unflatten(0, (b, v))

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Peak memory of arrays so far, on a GPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def describe(self) -> str:
        used = ["scaled dot-product attention"]
        used += ["torch.compile"] if self.options.compile else []
        used += ["channels last"] if self.options.channels_last else []
        return f"PyTorch {torch.__version__}, diffusers, {self.device.type}, " + ", ".join(used)


class TorchTraining:
    """PyTorch's training step: loss, gradient, clipping, AdamW, moving average.

    Args:
        unet: with `trained`.
        problem: of `train_step.what_the_network_sees`, the same for every step.
    """

    def __init__(self, unet: TorchUNet, config: OptimizerConfig, problem: Mapping[str, np.ndarray]):
        self.unet, self.config = unet, config
        self.given = [unet.input(problem[name]) for name in ("x", "c_noise", "context")]
        self.target = unet.input(problem["target"])
        self.weight = unet.input(~problem["observed"])[..., None, None, None]
        self.count = float(self.weight.sum()) * self.target[0, 0].numel()
        self.parameters = list(unet.unet.parameters())
        self.average = [value.detach().clone() for value in self.parameters]
        self.update_average = get_ema_multi_avg_fn(config.ema_decay)
        groups = [
            {
                "params": [p for p in self.parameters if (p.ndim > 1) == matrices],
                "weight_decay": config.weight_decay if matrices else 0.0,
            }
            for matrices in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
        )

    def step(self) -> dict[str, float]:
        """One step, finished on return: loss and gradient norm before clipping."""
        unet = self.unet
        with torch.autocast(unet.device.type, unet.dtype, enabled=unet.dtype != torch.float32):
            out = unet(*self.given)
        loss = ((out - self.target) ** 2 * self.weight).sum() / self.count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update_average(self.average, self.parameters, None)
        unet.wait()
        return {"loss": float(loss), "gradient_norm": float(norm)}


class TorchSampler:
    """The released sampler: Euler steps, both branches of guidance in one batch.

    Args:
        branches: the unconditional and the conditional `Conditioning` of numpy arrays, or the latter alone.
        sigmas: (n + 1,), the last is 0.
    """

    def __init__(
        self,
        unet: TorchUNet,
        branches: Sequence[Conditioning],
        sigmas: np.ndarray,
        guidance_scale: float,
    ):
        self.unet, self.sigmas, self.guidance_scale = unet, sigmas.tolist(), guidance_scale
        self.branches = len(branches)

        def together(name: str) -> torch.Tensor:
            return torch.cat([unet.input(getattr(branch, name)) for branch in branches])

        self.seen = together("observed").bool()[..., None, None, None]
        self.observed_latents = together("observed_latents")
        self.extra = torch.cat([together("raymap"), together("mask")], dim=-1)
        self.context = together("context")

    @torch.inference_mode()
    def sample(self) -> np.ndarray:
        """(b, v, h, w, c) latents, from zero."""
        x = torch.zeros_like(self.observed_latents.chunk(self.branches)[0])
        for sigma, following in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            slope = (x - self._denoise(x, sigma)) / sigma
            x = x + (following - sigma) * slope
        return self._place(torch.cat([x] * self.branches)).chunk(self.branches)[-1].cpu().numpy()

    def _place(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.seen, self.observed_latents, x)

    def _denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        x = self._place(torch.cat([x] * self.branches))
        scale = (sigma**2 + 1.0) ** -0.5  # SPEC section 2, preconditioning
        c_noise = torch.full((len(x),), math.log(sigma) / 4.0, device=x.device)
        out = self.unet(torch.cat([scale * x, self.extra], dim=-1), c_noise, self.context)
        estimate = scale**2 * x - sigma * scale * out
        if self.branches == 1:
            return estimate
        without, with_ = estimate.chunk(2)
        return without + self.guidance_scale * (with_ - without)
