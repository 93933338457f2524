"""Report whether a config fits an accelerator, and what a step takes there, without having one.

Examples:
  # Does the paper's model train on 8 v4 chips with one example each?
  python -m launch.compile --config=configs/tpu_v4.py --topology=v4:2x2x2 --config.mesh.fsdp=8

  # The largest batch that fits; the reports also as JSON
  python -m launch.compile --config=configs/tpu_v4.py --topology=v4:2x2x2 --largest --out=out/v4.json

  # A node of 8 H100; sampling; a small model in a minute
  python -m launch.compile --config=configs/h100.py --topology=h100:1x8 --examples=4 --effort=O2
  python -m launch.compile --config=configs/tpu_v4.py --topology=v5e:1x1 --program=sample
  python -m launch.compile --config=configs/quickstart.py --topology=v5e:2x4

The compiler of the accelerator runs on this CPU: pip install '.[tpu]' or '.[cuda]'. A full-size step takes
minutes and about 7 GB at the lowest effort (the default), 13 minutes and 21 GB at --effort=O2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from launch import chips
from launch.chips import GIB


class CompileError(Exception):
    """A program could not be compiled; the message is the compiler's."""


class TooLarge(CompileError):
    """A program does not fit the chip's memory; the message says by how much."""


# --------------------------------------------------------------------------------------------------
# One compilation, in a process of its own: the compiler never returns its memory, and may crash


def compile_here(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a request in the child process of `compile_apart`."""
    import jax

    from launch import hlo, programs
    from spinmeround_jax.config import load_config
    from spinmeround_jax.training import flops

    jax.config.update("jax_optimization_level", request["effort"])
    config = load_config(request["config"], request["overrides"])
    devices = devices_of(request["topology"], request["slices"])
    examples = request["examples"]
    config = programs.with_batch(config, len(devices), examples)
    if request["program"] == "train":
        if config.accumulation > 1:
            raise ValueError(
                "the compiler counts one pass of a loop, here one part of the batch: give "
                "--config.accumulation=1 and the --examples of a part"
            )
        program = programs.train_step(config, devices, request["cached"])
        lowered = program.step.lower(program.state, program.frozen, program.batch)
        held = program.held()
        needed = flops.of_step(config, images=not request["cached"]) / len(devices)
    else:
        lowered, held = programs.sampler(config, devices, int(examples))
        # One evaluation with guidance, the body of the loop.
        needed = 2.0 * flops.of_unet(config) * examples
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        **request,
        "devices": len(devices),
        "memory": peak(memory),
        "temporary": memory.temp_size_in_bytes,
        "held": held,
        "flops": cost.get("flops"),
        "needed_flops": needed,
        "bytes": cost.get("bytes accessed"),
        "collectives": hlo.collectives(compiled.as_text(), len(devices)),
    }


def devices_of(topology: str, slices: int) -> Sequence[Any]:
    """Descriptions of devices, to compile for.

    Raises:
        ValueError: several slices of GPUs.
    """
    from jax.experimental import topologies

    name, shape = chips.parse(topology)
    chip = chips.CHIPS[name]
    if chip.target:
        if slices > 1:
            raise ValueError(f"{topology}: GPUs have no slices; the first number counts nodes")
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=chip.target,
            topology=f"1x{shape[0]}x{shape[1]}",
        ).devices  # fmt: skip
    options = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    if all(side == 1 for side in shape):
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def peak(memory: Any) -> int:
    """Bytes in use at once, from a `memory_analysis()`; results that overwrite arguments count once."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def compile_apart(request: dict[str, Any]) -> dict[str, Any]:
    """Compile in a new process.

    Args:
        request: config, overrides, topology, slices, program ("train" | "sample"), examples per
            device, cached (latents computed ahead), effort.

    Raises:
        TooLarge, CompileError: with the compiler's message.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "launch.compile", "--child"], input=json.dumps(request),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode == 0:
        result = json.loads(done.stdout.splitlines()[-1])
        available = chips.CHIPS[chips.parse(result["topology"])[0]].memory
        if result["memory"] > available:  # the compiler for GPUs does not check
            raise TooLarge(f"{result['memory'] / GIB:.1f} GiB of {available / GIB:.1f}")
        return result
    message = done.stderr.strip()
    if "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message:
        largest_arrays = re.findall(r"(?im)^\s*(.*(?:hbm|size:|operator:).*)$", message)[:12]
        raise TooLarge("\n".join(largest_arrays) or message[-2000:])
    if done.returncode < 0:
        message = f"the compiler crashed (signal {-done.returncode}); try --effort=O2\n{message}"
    raise CompileError(message[-3000:])


# --------------------------------------------------------------------------------------------------
# Reports


def report(result: dict[str, Any]) -> str:
    """The text that is printed for a result of `compile_apart`."""
    examples, training = result["examples"], result["program"] == "train"
    available = chips.CHIPS[chips.parse(result["topology"])[0]].memory
    slices = f" x {result['slices']} slices" if result["slices"] > 1 else ""
    step = "step" if training else "sampling step"
    lines = [
        f"{result['config']} on {result['topology']}{slices}: "
        + ("training" if training else "sampling with guidance")
        + f" fits, {result['devices']} devices, {examples:g} examples of all views on each",
        "",
        f"memory       {result['memory'] / GIB:8.2f} GiB of {available / GIB:.1f} on each device",
        *(f"             {size / GIB:8.2f} {name}" for name, size in result["held"].items()),
        f"             {result['temporary'] / GIB:8.2f} temporary",
        f"FLOPs        {result['needed_flops'] / examples / 1e12:8.2f} T per example and {step}, "
        "products and convolutions, none computed twice",
    ]
    if result["flops"]:
        lines.append(
            f"             {result['flops'] / examples / 1e12:8.2f} T in the program by XLA's count, "
            "without Pallas kernels"
        )
    if result["bytes"]:
        lines.append(
            f"bytes        {result['bytes'] / examples / 1e9:8.1f} GB accessed per example and {step}, "
            "by XLA's count"
        )
    for kind, found in result["collectives"].items():
        lines.append(f"{kind:18} {found['count']:5d}, {found['bytes'] / 1e9:8.3f} GB per {step}")
    return "\n".join(lines)


def largest(fits: Callable[[float], bool], first: float) -> float:
    """The largest multiple of `first` that fits, by doubling and bisection; 0 if `first` does not."""
    if not fits(first):
        return 0.0
    good, bad = 1, None
    while bad is None or bad - good > 1:
        middle = 2 * good if bad is None else (good + bad) // 2
        if fits(middle * first):
            good = middle
        else:
            bad = middle
    return good * first


# --------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further --config.NAME=VALUE arguments override values of the config.",
    )
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--topology", required=True, help="such as v4:2x2x2")
    parser.add_argument("--slices", type=int, default=1, help="of that topology (1)")
    parser.add_argument("--program", choices=("train", "sample"), default="train")
    parser.add_argument(
        "--examples", type=float, default=1.0,
        help="on each device (1); 0.25 where the views are split over 4",
    )  # fmt: skip
    parser.add_argument(
        "--largest", action="store_true", help="search the largest multiple of --examples that fits"
    )
    parser.add_argument(
        "--encode", action="store_true", help="encode images in the step, without cached latents"
    )
    parser.add_argument(
        "--effort", choices=("O0", "O1", "O2", "O3"), default="O0",
        help="of the compiler (O0; its own default is O2); v6e needs O2",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="JSON file of all reports")
    arguments, rest = parser.parse_known_args(argv)
    if wrong := [word for word in rest if not word.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if arguments.program == "sample" and arguments.examples % 1:
        parser.error("--examples must be whole for sampling")
    arguments.overrides = rest
    return arguments


def check_compiler(chip: str) -> None:
    """Raise ValueError if the compiler for the chip is not installed."""
    gpu = bool(chips.CHIPS[chip].target)
    packages = ("jax_cuda13_plugin", "jax_cuda12_plugin") if gpu else ("libtpu",)
    if not any(importlib.util.find_spec(package) for package in packages):
        extra = "cuda" if gpu else "tpu"
        raise ValueError(f"the compiler for {chip} is missing: pip install '.[{extra}]'")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--child"]:
        print(json.dumps(compile_here(json.load(sys.stdin))))
        return 0
    arguments = parse_arguments(argv)
    results: list[dict[str, Any]] = []

    def fits(examples: float) -> bool:
        print(f"compiling for {examples:g} examples per device ...", file=sys.stderr)
        request = {
            "config": arguments.config, "overrides": arguments.overrides,
            "topology": arguments.topology, "slices": arguments.slices,
            "program": arguments.program, "examples": examples,
            "cached": not arguments.encode, "effort": arguments.effort,
        }  # fmt: skip
        try:
            results.append(compile_apart(request))
        except TooLarge as error:
            print(f"{examples:g} examples per device do not fit:\n{error}\n")
            return False
        print(report(results[-1]), "\n")
        return True

    try:
        check_compiler(chips.parse(arguments.topology)[0])
        from spinmeround_jax.config import load_config  # imports JAX

        load_config(arguments.config, arguments.overrides)
        if arguments.largest:
            found = largest(fits, arguments.examples)
            print(f"largest batch that fits: {found:g} examples per device")
        else:
            found = fits(arguments.examples)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    except (CompileError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
