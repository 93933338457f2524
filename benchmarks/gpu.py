"""All measurements on one GPU in one command, within minutes, as one JSON file.

    python -m benchmarks.gpu --out out/gpu.json              # about 8 minutes on an H100
    python -m benchmarks.gpu --only sampler --out out/gpu2.json
    python -m benchmarks.gpu --tiny --out out/tiny.json      # a small model, to rehearse on a CPU

Each step is a process with a time limit of its own; the file is written after each step, so that a failure
loses one step only. It needs '.[cuda,train]', and '.[parity]' for the comparisons with PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from spinmeround_jax import files

TINY = (
    "--config=configs/quickstart.py", "--config.model.image_size=16",
    "--config.model.unet.model_channels=8", "--config.model.unet.channel_mult=(1,)",
    "--config.model.unet.attention_levels=(0,)", "--config.model.unet.joint_levels=(0,)",
    "--config.model.unet.heads=2", "--config.model.unet.norm_groups=4",
    "--config.model.autoencoder.channels=8", "--config.train_identity_encoder=False",
    "--config.compute_dtype=bfloat16", "--config.sampling.normals_steps=4",
    "--config.sampling.steps=4", "--config.sampling.guidance_scale=3.0",
)  # fmt: skip
FULL = ("--config=configs/h100.py",)
TORCH = ("--against", "torch", "--channels-last")


@dataclasses.dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        words: arguments of python -m.
        seconds: time limit.
        batches: values of --examples, tried in order until one fits the memory.
        environment: additional variables.
    """

    words: tuple[str, ...]
    seconds: float
    batches: tuple[int, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def steps(tiny: bool) -> dict[str, Step]:
    """By name, in the order of a run."""
    model, size = (TINY, ("--tiny",)) if tiny else (FULL, ())
    torch = TORCH if tiny else (*TORCH, "--compile")
    alone = (("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94"),)
    shared = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)  # PyTorch needs its part of the memory
    return {
        "kernels": Step(("benchmarks.gpu", "--child", "kernels", *size), 70),
        "splats": Step(("benchmarks.gpu", "--child", "splats", *size), 50),
        "train": Step(("benchmarks.train_step", *model, "--profile"), 150, (6, 4), alone),
        "train-torch": Step(
            ("benchmarks.train_step", *model, *torch), 200, (2, 1), shared
        ),
        "sampler": Step(
            ("benchmarks.sampler", *model, *torch, "--views", "48", "--groups", "4", "--repeats", "1"),
            240, environment=shared,
        ),
    }  # fmt: skip


def run_step(step: Step, seconds: float, cache: pathlib.Path) -> dict[str, Any]:
    """The report of the step, or "error"; "wall_seconds" in both."""
    start = time.monotonic()
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), **dict(step.environment)
    }  # fmt: skip
    errors = []
    for batch in step.batches or (None,):
        examples = () if batch is None else ("--examples", str(batch))
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "report.json"
            left = seconds - (time.monotonic() - start)
            try:
                done = subprocess.run(
                    [sys.executable, "-m", *step.words, *examples, "--out", str(out)],
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                    env=environment, timeout=max(left, 1.0),
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                words = error.stderr.decode(errors="replace") if error.stderr else ""
                errors.append(f"no end after {left:.0f} s: {words[-1500:]}")
                break
            if done.returncode == 0:
                report = json.loads(out.read_text())
                report["wall_seconds"] = time.monotonic() - start
                return {**report, "smaller_batch_because": errors} if errors else report
            errors.append(done.stderr[-1500:])
        if not any(word in done.stderr.lower() for word in ("out of memory", "resource_exhausted")):
            break
    return {"error": errors, "wall_seconds": time.monotonic() - start}


# --------------------------------------------------------------------------------------------------
# Steps that no other benchmark has


def kernels(tiny: bool) -> dict[str, Any]:
    """Attention and its gradients at the shapes of the UNet: errors against float32, and times.

    Errors are ||x - reference|| / ||reference|| of the output and the gradients of q, k and v, of plain
    attention in bfloat16 as of the kernel.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import measuring
    from spinmeround_jax.models.attention_kernels import KERNELS

    shapes = {  # batch, queries, keys, channels of a head
        "self, level 0": (8, 4096, 4096, 40),
        "joint, level 1": (1, 8192, 8192, 80),
        "joint, level 2": (1, 2048, 2048, 160),
        "cross, level 0": (8, 4096, 77, 40),
    }
    if tiny:
        shapes = {name: (1, min(s, 256), min(t, 256), d) for name, (_, s, t, d) in shapes.items()}

    def both_passes(attend, *qkv):
        """Output, and gradients of half the sum of its squares."""
        out, pull = jax.vjp(attend, *qkv)
        return out, *pull(out)

    report: dict[str, Any] = {"machine": measuring.machine()}
    for name, (n, s, t, d) in shapes.items():
        rng = np.random.default_rng(0)
        qkv = [jnp.asarray(rng.standard_normal((n, x, 8, d)), jnp.bfloat16) for x in (s, t, t)]
        plain = jax.jit(lambda *x: both_passes(jax.nn.dot_product_attention, *x))
        with jax.default_matmul_precision("highest"):
            reference = [np.asarray(x) for x in plain(*(x.astype(jnp.float32) for x in qkv))]
        cases, errors = {}, {}
        for kernel, attend in {"plain": jax.nn.dot_product_attention, **KERNELS}.items():
            if kernel in ("flash", "splash"):
                continue  # of TPUs
            run = jax.jit(lambda *x, attend=attend: both_passes(attend, *x))
            try:
                found = [np.asarray(x, np.float32) for x in run(*qkv)]
            except Exception as error:  # a kernel that does not take this shape or device
                errors[kernel] = str(error).strip().splitlines()[0][:200]
                continue
            errors[kernel] = {
                what: float(np.linalg.norm(a - b) / np.linalg.norm(b))
                for what, a, b in zip(("output", "q", "k", "v"), found, reference, strict=True)
            }
            cases[kernel] = functools.partial(
                lambda run, x: jax.block_until_ready(run(*x)), run, qkv
            )
        seconds = measuring.compare(cases, 2 if tiny else 20, name)["seconds"]
        flops = 7 * 2.0 * n * 8 * s * t * d  # two products forward, five backward
        report[name] = {
            "errors": errors,
            "seconds": {kernel: found["wall"] for kernel, found in seconds.items()},
            "flops_per_second": {k: flops / x["wall"]["median"] for k, x in seconds.items()},
        }
    return report


def splats(tiny: bool) -> dict[str, Any]:
    """Drawing Gaussians and its gradient, by our rasteriser and by splax where it can run."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import measuring
    from spinmeround_jax import cameras
    from spinmeround_jax.splats import nvidia, rasterise
    from spinmeround_jax.splats.gaussians import Gaussians

    count, size = (300, 32) if tiny else (40_000, 512)
    rng = np.random.default_rng(0)
    given = Gaussians(
        means=jnp.asarray(0.1 * rng.standard_normal((count, 3)), jnp.float32),
        log_scales=jnp.full((count, 3), -5.0),
        quaternions=jnp.asarray(rng.standard_normal((count, 4)), jnp.float32),
        opacity_logits=jnp.zeros(count),
        sh=jnp.asarray(0.3 * rng.standard_normal((count, 4, 3)), jnp.float32),
    )
    pose, focal = jnp.asarray(cameras.orbit(20.0, 10.0), jnp.float32), cameras.FOCAL * size
    report: dict[str, Any] = {"machine": measuring.machine(), "gaussians": count, "pixels": size}
    rasterisers = {nvidia.choose(): "splax", rasterise.render: "jax"}  # one entry without splax
    cases = {}
    for draw, name in rasterisers.items():

        def loss(gaussians, draw=draw):
            return jnp.sum((draw(gaussians, pose, focal, size)["rgb"] - 0.5) ** 2)

        for what, run in {"": jax.jit(loss), " with gradient": jax.jit(jax.grad(loss))}.items():
            jax.block_until_ready(run(given))
            cases[name + what] = lambda run=run: jax.block_until_ready(run(given))
    found = measuring.compare(cases, 2 if tiny else 10, "splats")
    return report | {"seconds": {name: x["wall"] for name, x in found["seconds"].items()}}


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> int:
    names = list(steps(False))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="steps (all)")
    parser.add_argument("--seconds", type=float, default=470.0, help="of all steps (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse on a CPU")
    parser.add_argument("--child", choices=("kernels", "splats"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        report = {"kernels": kernels, "splats": splats}[args.child](args.tiny)
        args.out.write_text(json.dumps(report))
        return 0
    end, reports = time.monotonic() + args.seconds, {}
    cache = pathlib.Path(tempfile.gettempdir()) / "benchmarks-gpu-cache"
    for name, step in steps(args.tiny).items():
        left = end - time.monotonic()
        if name not in args.only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        if left > 15:
            limit = left if args.tiny else min(step.seconds, left)
            reports[name] = run_step(step, limit, cache)
        else:
            reports[name] = {"error": ["no time left"]}
        files.write_atomically(args.out, (json.dumps(reports, indent=1) + "\n").encode())
    from benchmarks import measuring  # imports JAX: not while a step has the GPU

    print(measuring.table(measuring.rows(reports)))
    return int(any("error" in report for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
