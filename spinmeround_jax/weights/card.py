"""The model card: README.md beside weights, as the Hugging Face Hub shows it, made from their provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spinmeround_jax.models import ModelConfig

_USE = {
    "model": """With spinmeround_jax and its extra `[hub]`:

```
python -m spinmeround_jax.sample --checkpoint hf://OWNER/NAME --input portraits/ --out out/
```""",
    "released": """`spmr.safetensors` has the names of SpinMeRound's released checkpoint. Its metadata
hold what that has no field for: sizes, rays, frame of the normals, statistics of latents. Code that ignores
them samples wrongly where they differ from the release's. With spinmeround_jax:

```
python -m spinmeround_jax.convert --released spmr.safetensors --out model
python -m spinmeround_jax.sample --checkpoint model --input portraits/ --out out/
```""",
    "diffusers": """```python
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
```

There is no diffusers pipeline of this model:

- The sample of `unet` is noisy latents (RGB, then normals), rays and mask; its timestep is ln(sigma)/4, its
  output F of EDM's preconditioning. As it is, it denoises one view. For several, an attention processor has to
  hand the tokens of all of them to self-attention together, at levels {joint} and in the middle.
- The context is the text encoder's last hidden state for the tokens {prompt}, where the
  embedding of token {token} is the ArcFace vector, padded with zeros.
- Latents of normals have statistics of their own, the second half of those below, where there are any;
  `vae/config.json` holds those of RGB.""",
}


def text(
    config: ModelConfig, provenance: Mapping[str, Any], sizes: Mapping[str, int], format_: str
) -> str:
    """The card, in Markdown with the hub's front matter.

    Args:
        sizes: parameters by network.
        format_: "model", our folder, or one of `export.FORMATS`.
    """
    data = provenance.get("data")
    data = data if isinstance(data, dict) else {}
    recogniser = provenance.get("recogniser")
    facts = {
        "Made by": provenance.get("command") or provenance.get("converter"),
        "Kind": provenance.get("kind"),
        "Steps": provenance.get("steps"),
        "Seed": provenance.get("seed"),
        "Date": provenance.get("date") or provenance.get("converted"),
        "Hardware": provenance.get("hardware"),
        "Data": data.get("source"),
        "Licence of the data": data.get("license"),
        "Identities by": recogniser.get("name") if isinstance(recogniser, dict) else None,
        "Framing": provenance.get("framing"),
        "Parameters": ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        "Latent mean (RGB, normals)": _numbers(config.latent_mean),
        "Latent deviation": _numbers(config.latent_std),
    }
    sources = provenance.get("sources")
    if isinstance(sources, list):
        names = [source.get("file") for source in sources if isinstance(source, dict)]
        facts["Converted from"] = ", ".join(map(str, names))
    limits = [
        "What the portrait does not show is invented. Faces unlike those of the data come out worse.",
        f"Portraits are square, {config.image_size} pixels, and framed as in the data.",
    ]
    if str(data.get("source", "")).startswith("data_prep.render_heads"):
        limits.append("The data are rendered heads: expect little of photographs.")
    use = _USE[format_].format(
        joint=list(config.unet.joint_levels),
        prompt=list(config.identity.prompt_ids),
        token=config.identity.id_token,
    )
    table = "\n".join(
        f"| {name} | {_code(value)} |" for name, value in facts.items() if value not in (None, "")
    )
    return f"""---
license: unknown
library_name: spinmeround_jax
pipeline_tag: image-to-3d
tags:
- spinmeround
- multi-view
- surface-normals
- {"jax" if format_ == "model" else "safetensors"}
---

# SpinMeRound, {config.image_size} pixels

One portrait of a person in; {config.views} views around the head with surface normals out: weights of
[SpinMeRound](https://arxiv.org/abs/2504.10716) (ICCV 2025) for spinmeround_jax.

{use}

## Origin

| | |
|---|---|
{table}

## Metrics

None are recorded with the weights. `python -m spinmeround_jax.evaluate` measures them on held-out heads.

## Intended use and limits

For research on views and shape of heads. Not for recognising people, nor for images of a person without their
consent.

{chr(10).join(f"- {limit}" for limit in limits)}

## Licence

Whoever publishes the weights states their licence, under `license` at the top of this file. The data's is in
the table. The code is Apache-2.0.
"""


def _numbers(values: tuple[float, ...]) -> str:
    """RGB latents, then those of normals; "" for latents that are used as they are."""
    return ", ".join(f"{value:.6g}" for value in values)


def _code(value: Any) -> str:
    """A value of somebody's model.json as inert text of one cell."""
    line = " ".join(str(value).split())[:400]
    return f"`{line.replace('`', chr(39)).replace('|', '/')}`"
