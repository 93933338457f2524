"""Compiles a config's programs for accelerators that need not be there, and reports what they take.

Examples:
  # Does the paper's model train on 8 v5e chips with one example each, and how fast at best?
  python -m launch.compile --config=configs/tpu_v4.py --topology=v5e:2x4

  # The largest batch that fits; memory, FLOPs, bytes, collectives and times, as JSON and a picture too
  python -m launch.compile --config=configs/tpu_v4.py --topology=v4:2x2x2 --largest --out=out/v4

  # A node of 8 H100
  python -m launch.compile --config=configs/h100.py --topology=h100:1x8 --examples=4 --effort=O2

  # Sampling; and a small model in a minute
  python -m launch.compile --config=configs/tpu_v4.py --topology=v5e:1x1 --program=sample
  python -m launch.compile --config=configs/quickstart.py --topology=v5e:2x4 --examples=1

It needs '.[tpu]' (libtpu holds the compiler) and no TPU; for GPUs '.[cuda]', and no GPU. At the lowest effort,
the default, a full-size step takes minutes; memory is then within a few per cent of that at the highest.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launch import chips, costs, plots
from launch.chips import GIB

TIMEOUT = 3 * 3600.0


class CompileError(Exception):
    """A program could not be compiled; the message is the compiler's."""


class TooLarge(CompileError):
    """It does not fit into the chip's memory; the message names the largest arrays."""


# --------------------------------------------------------------------------------------------------
# One compilation, in a process of its own: the compiler keeps its memory, and may end the process


def compile_here(request: dict[str, Any]) -> dict[str, Any]:
    """What the child process does with `request` (see `compile_apart`)."""
    import jax

    from launch import hlo, programs

    jax.config.update("jax_optimization_level", request["effort"])
    config = load_config(request["config"], request["overrides"])
    devices = devices_of(request["topology"], request["slices"])
    own_batch = config.optimizer.batch_size
    config = programs.with_batch(config, len(devices), request["examples"])
    if request["program"] == "train":
        lowered, held = programs.train_step(config, devices, request["cached"])
    else:
        lowered, held = programs.sampler(config, devices, int(request["examples"]))
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}  # of a GPU, none
    try:
        text = compiled.as_text()
    except Exception as error:  # that of a good program cannot always be had
        print(f"no HLO text: {error}", file=sys.stderr)
        text = ""
    found = costs.costs(text)
    return {
        "devices": len(devices),
        "chip": chips.parse(request["topology"])[0],
        "program": request["program"],
        "slices": request["slices"],
        "mesh": dataclasses.asdict(config.mesh),
        "remat": config.remat,
        "forward_flops": programs.forward_flops(config),
        "encoder_flops": 0.0 if request["cached"] else programs.encoder_flops(config),
        "held": held,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": peak(memory),
        "largest": hlo.largest(text),
        "flops": cost.get("flops"),
        # The compiler's own count takes what stays in the core's memory for traffic, at high effort.
        "bytes": sum(kind.bytes for kind in found.values()) or cost.get("bytes accessed"),
        "collectives": by_kind(hlo.collectives(text, len(devices))),
        "costs": by_kind(found),
        "steps": config.sampling.steps,
        "sampler": config.sampling.sampler,
        "own_batch_size": own_batch,
        "batch_size": config.optimizer.batch_size,
        "paper_steps": sum(stage.steps for stage in config.stages),
    }


def devices_of(topology: str, slices: int) -> Sequence[Any]:
    """Devices that need not be there.

    Raises:
        ValueError: several slices of what has none.
    """
    from jax.experimental import topologies

    name, shape = chips.parse(topology)
    chip = chips.CHIPS[name]
    if chip.target:
        if slices > 1:
            raise ValueError(f"{topology}: GPUs have no slices; nodes are the first number")
        nodes, gpus = shape
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=chip.target,
            topology=f"1x{nodes}x{gpus}",
        )  # fmt: skip
        return description.devices
    options = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    if all(side == 1 for side in shape):
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def by_kind(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of dataclasses, as JSON."""
    return {kind: dataclasses.asdict(value) for kind, value in found.items()}


def peak(memory: Any) -> int:
    """Bytes in use at once: arguments, results that are not written over them, and temporaries."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def load_config(path: str, overrides: Sequence[str]) -> Any:
    """The `Config` of a file of configs/, with --config.NAME=VALUE overrides.

    Raises:
        ValueError: there is no such file, or it is no complete config.
    """
    from absl import flags
    from ml_collections import config_flags

    from spinmeround_jax.config import Config, from_mapping, no_such_value

    values = flags.FlagValues()
    words = ["launch.compile", f"--config={path}", *overrides]
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    try:
        values(words)
        return from_mapping(Config, holder.value)
    except OSError as error:  # which ml_collections wraps into several lines
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        raise ValueError(f"{path}: {reason}") from error
    except AttributeError as error:  # of --config.NAME=VALUE
        raise ValueError(f"{path} has no such value: {no_such_value(error)}") from error
    except flags.Error as error:
        raise ValueError(f"{path}: {error}") from error


def compile_apart(request: dict[str, Any]) -> dict[str, Any]:
    """`compile_here` in a new process.

    Args:
        request: config, overrides, topology, slices, program ("train" | "sample"), examples per
            device, cached (latents computed ahead), effort.

    Raises:
        TooLarge, CompileError: with the compiler's words.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no other process is in the way
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "launch.compile", "--child"], input=json.dumps(request),
        capture_output=True, text=True, env=environment, timeout=TIMEOUT,
    )  # fmt: skip
    if done.returncode == 0:
        result = json.loads(done.stdout.splitlines()[-1])
        memory = chips.CHIPS[result["chip"]].memory
        if result["peak"] > memory:  # which the compiler for GPUs does not mind
            raise TooLarge(
                f"{result['peak'] / GIB:.1f} GiB at once, of {memory / GIB:.1f}; the largest arrays:\n"
                + "\n".join(result["largest"])
            )
        return result
    words = done.stderr.strip()
    if "RESOURCE_EXHAUSTED" in words or "Ran out of memory" in words:
        raise TooLarge(largest_arrays(words))
    if done.returncode < 0:
        words = f"the compiler ended with signal {-done.returncode}; try --effort=O2\n{words}"
    raise CompileError(words[-3000:])


def largest_arrays(words: str) -> str:
    """The lines of an out-of-memory message that tell how much, and of what."""
    lines = [line.strip() for line in words.splitlines()]
    told = [
        line for line in lines if "hbm" in line.lower() or "Size:" in line or "Operator:" in line
    ]
    return "\n".join(told[:12]) or words[-2000:]


# --------------------------------------------------------------------------------------------------
# What it means


def times(result: dict[str, Any], program: str) -> dict[str, float]:
    """Seconds that each resource needs at its peak for one step (of sampling: the whole)."""
    chip = chips.CHIPS[result["chip"]]
    sent = sum(kind["sent"] for kind in result["collectives"].values())
    repeats = 1 if program == "train" else result["steps"]
    return {
        "arithmetic": useful_flops(result, program) / chip.flops,
        # The compiler counts one pass of a loop's body: of the sampler, one step.
        "memory": repeats * (result["bytes"] or 0.0) / chip.bandwidth,
        "interconnect": repeats * sent / chip.interconnect,
    }


def useful_flops(result: dict[str, Any], program: str) -> float:
    """Per device and step, without what is computed again: 3 forward passes, or 2 for each step."""
    examples = result["batch_size"] / result["devices"]
    if program == "train":
        return (3.0 * result["forward_flops"] + result["encoder_flops"]) * examples
    steps = result["steps"]
    calls = 2 * steps - 1 if result["sampler"] == "heun" else steps
    return 2.0 * calls * result["forward_flops"] * examples


def points(results: Sequence[tuple[str, dict[str, Any], str]]) -> list[plots.Point]:
    """Of (label, result, program) each, for a plot."""
    found = []
    for label, result, program in results:
        bound = times(result, program)
        moved = bound["memory"] * chips.CHIPS[result["chip"]].bandwidth
        rate = useful_flops(result, program) / max(bound.values())
        found.append(
            plots.Point(label, result["chip"], useful_flops(result, program) / moved, rate)
        )
    return found


def report(result: dict[str, Any], request: dict[str, Any]) -> str:
    """The text that is printed."""
    chip = chips.CHIPS[result["chip"]]
    bound = times(result, request["program"])
    slowest = max(bound, key=bound.get)
    step = bound[slowest]
    examples = result["batch_size"] / result["devices"]
    repeats = 1 if request["program"] == "train" else result["steps"]
    program = (
        "training step" if request["program"] == "train" else f"{result['steps']}-step sampling"
    )
    lines = [
        f"{request['config']} on {request['topology']}"
        + (f" x {request['slices']} slices" if request["slices"] > 1 else "")
        + f": {program}, {result['devices']} devices, {examples:g} example(s) of all views on each",
        "",
        f"memory     {result['peak'] / GIB:6.2f} GiB of {chip.memory / GIB:.0f} at once, of which "
        f"{result['temporary'] / GIB:.2f} temporary",
        *(f"             {size / GIB:6.2f} {name}" for name, size in result["held"].items()),
        f"bytes      {(result['bytes'] or 0) / examples / 1e9:6.1f} GB read and written per example",
        f"FLOPs      {(result['flops'] or 0) / 1e12:6.2f} T counted by the compiler, "
        f"{useful_flops(result, request['program']) / 1e12:.2f} T needed (kernels and loops' later "
        "passes are not counted)",
    ]
    for kind, value in result["collectives"].items():
        lines.append(f"{kind:18} {value['count']:5d}  {value['bytes'] / 1e9:8.3f} GB")
    lines += ["", "At each resource's peak a step takes"]
    lines += [f"  {name:13} {1000 * seconds:9.1f} ms" for name, seconds in bound.items()]
    lines.append(
        f"so the {slowest} bounds it: at best {bound['arithmetic'] / step:.0%} of peak FLOP/s, "
        f"{result['batch_size'] / step:.1f} examples/s"
    )
    cycles = sum(cost["cycles"] for cost in result["costs"].values())  # a GPU's compiler tells none
    if request["effort"] != "O0" and cycles:
        lines += ["", *breakdown(result, useful_flops(result, request["program"]), repeats)]
    if request["program"] == "train":
        batches = result["own_batch_size"] / result["batch_size"]
        hours = batches * step * result["paper_steps"] * result["devices"] / 3600
        lines.append(
            f"The config's {result['paper_steps']:,} steps with a batch of "
            f"{result['own_batch_size']} would take {hours:,.0f} chip-hours at best"
        )
    return "\n".join(lines)


def breakdown(result: dict[str, Any], useful: float, repeats: int) -> list[str]:
    """Lines: where the time of one step goes by the compiler's cycles and the kernels' products."""
    chip = chips.CHIPS[result["chip"]]
    found = {kind: costs.Cost(**values) for kind, values in result["costs"].items()}
    seconds = {
        kind: repeats * cost.seconds(chip)
        for kind, cost in found.items()
        if kind not in ("collectives", "prefetches")  # beside the others
    }
    step = sum(seconds.values())
    lines = [
        "By the compiler's cycles, and for kernels by their products with heads padded to lanes:"
    ]
    for kind in sorted(seconds, key=seconds.get, reverse=True):
        at_bandwidth = repeats * found[kind].bytes / chip.bandwidth
        lines.append(
            f"  {kind:13} {1000 * seconds[kind]:9.1f} ms, {found[kind].bytes / 1e9:6.1f} GB "
            f"({1000 * at_bandwidth:.1f} ms at full bandwidth), {found[kind].count} instructions"
        )
    lines.append(
        f"  together      {1000 * step:9.1f} ms: {useful / chip.flops / step:.0%} of peak FLOP/s "
        "(MFU), collectives and prefetches hidden"
    )
    return lines


# --------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--topology", required=True, type=_topology, help="such as v4:2x2x2")
    parser.add_argument("--slices", type=int, default=1, help="of that topology (1)")
    parser.add_argument("--program", choices=("train", "sample"), default="train")
    parser.add_argument(
        "--examples", type=float, default=1.0,
        help="on each device (1); 0.25 where the views are split over 4",
    )  # fmt: skip
    parser.add_argument(
        "--largest", action="store_true", help="double --examples for as long as it fits"
    )
    parser.add_argument(
        "--encode", action="store_true", help="encode pictures in the step, without cached latents"
    )
    parser.add_argument(
        "--effort", choices=("O0", "O1", "O2", "O3"), default="O0",
        help="of the compiler (O0, minutes; O2, its own default, up to 20); v6e needs O2",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="folder for report.json and roofline.svg")
    parser.epilog = "Any further --config.NAME=VALUE overrides a value of the config."
    arguments, rest = parser.parse_known_args(argv)
    if wrong := [word for word in rest if not word.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    arguments.overrides = rest
    return arguments


def _topology(text: str) -> str:
    try:
        chips.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def missing_compiler(chip: str) -> str:
    """What to install to compile for it; empty where it is there."""
    if chips.CHIPS[chip].target:
        plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
        if any(importlib.util.find_spec(plugin) for plugin in plugins):
            return ""
        return "JAX's plugin for CUDA is missing, it holds the compiler: pip install '.[cuda]'"
    if importlib.util.find_spec("libtpu"):
        return ""
    return "libtpu is missing, it holds the compiler: pip install '.[tpu]'"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--child"]:
        print(json.dumps(compile_here(json.load(sys.stdin))))
        return 0
    arguments = parse_arguments(argv)
    if arguments.program == "sample" and arguments.examples % 1:
        print("error: --examples must be whole for sampling", file=sys.stderr)
        return 2
    if missing := missing_compiler(chips.parse(arguments.topology)[0]):
        print(f"error: {missing}", file=sys.stderr)
        return 1
    request = {
        "config": arguments.config, "overrides": arguments.overrides,
        "topology": arguments.topology, "slices": arguments.slices,
        "program": arguments.program, "examples": arguments.examples,
        "cached": not arguments.encode, "effort": arguments.effort,
    }  # fmt: skip
    results: list[tuple[str, dict[str, Any], str]] = []
    try:
        load_config(arguments.config, arguments.overrides)
        while True:
            print(
                f"compiling for {request['examples']:g} example(s) per device ...", file=sys.stderr
            )
            try:
                result = compile_apart(request)
            except TooLarge as error:
                print(f"{request['examples']:g} example(s) per device do not fit:\n{error}")
                if not results:
                    return 1
                break
            label = f"{request['topology']} {request['program']} {request['examples']:g}"
            results.append((label, result, request["program"]))
            print(report(result, request), "\n")
            if not arguments.largest:
                break
            request["examples"] *= 2
    except (CompileError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = [{"label": label, **result} for label, result, _ in results]
        (arguments.out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        plots.roofline(points(results), arguments.out / "roofline.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
