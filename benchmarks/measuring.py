"""What the benchmarks of speed share: rounds in turns, peaks, memory, words."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from launch import chips
from launch import compile as compile_report
from spinmeround_jax import files

GIB = 2**30
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers")
_MATRIX = 4096  # side of the matrices whose product stands for a CPU's peak


# --------------------------------------------------------------------------------------------------
# Time


def in_turns(
    cases: Mapping[str, Callable[[], Any]], rounds: int, say: str
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each case in each round, A B A B ...

    Args:
        cases: functions that return when the work is done; whoever calls this has called each before,
            so that nothing is compiled here.
        say: what the progress bar is called.

    Returns:
        By case, {"wall": s, "processor": s of all threads of this process} for every round.
    """
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    with tqdm.tqdm(total=rounds * len(cases), desc=say, unit="run") as bar:
        for _ in range(rounds):
            for name, run in cases.items():
                wall, processor = time.perf_counter(), time.process_time()
                run()
                measured[name].append(
                    {
                        "wall": time.perf_counter() - wall,
                        "processor": time.process_time() - processor,
                    }
                )
                bar.update()
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def ratios(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Their time over ours, round by round: above 1 where ours is faster."""
    return {
        clock: spread([b[clock] / a[clock] for a, b in zip(ours, theirs, strict=True)])
        for clock in ("wall", "processor")
    }


# --------------------------------------------------------------------------------------------------
# The machine


def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s that this process's devices can do at best, and whose word that is.

    Of accelerators their maker's, in bfloat16; of a CPU what a large product of matrices takes here.
    """
    device, count = jax.devices()[0], jax.device_count()
    chip = chips.of_device(device.device_kind)
    if chip:
        return chip.flops * count, f"{count} x {device.device_kind}, bfloat16, data sheet"
    if device.platform != "cpu":
        return float("nan"), f"no peak is known of {device.device_kind!r}, see launch/chips.py"
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((_MATRIX, _MATRIX)), dtype)
    product = jax.jit(jnp.matmul)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        best = min(best, time.perf_counter() - start)
    name = f"the fastest of four {dtype} products of {_MATRIX} x {_MATRIX} matrices in this run"
    return 2.0 * _MATRIX**3 / best, name


def memory(compiled: jax.stages.Compiled) -> dict[str, int | None]:
    """Bytes that the program needs at once by the compiler's account, and `seen_memory`."""
    return {"program": compile_report.peak(compiled.memory_analysis()), **seen_memory()}


def seen_memory() -> dict[str, int | None]:
    """Bytes so far.

    "device" is the largest sum of arrays on the first device, where the backend counts; "process" the
    largest resident set of this process.
    """
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "device": stats.get("peak_bytes_in_use"),
        "process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def machine() -> dict[str, Any]:
    """The device, the processor and the versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 2),  # other programs count, so this tells of them
        "python": platform.python_version(),
        **versions,
    }


def random_parameters(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, jax.Array]:
    """Values for parameters by name (anything with a shape), of a size that keeps signals alive.

    New networks end in zeros, of which a comparison of outputs would learn nothing.
    """
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape.shape, np.float32)
        if len(shape.shape) > 1:
            noise /= np.float32(np.sqrt(np.prod(shape.shape[:-1])))
        else:
            noise = np.float32(0.1) * noise + np.float32(name.endswith("scale"))
        values[name] = jnp.asarray(noise)
    return values


# --------------------------------------------------------------------------------------------------
# Words


def parser(
    name: str, description: str, examples: str, what: str = "examples of all views at once"
) -> argparse.ArgumentParser:
    """With the arguments that all have; `main` parses it.

    Args:
        what: --examples counts.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=examples + "\nAny further --config.NAME=VALUE overrides a value of the config.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--config", required=True, help="a file of configs/")
    made.add_argument("--examples", type=int, default=1, help=f"{what}, on each device (1)")
    made.add_argument("--repeats", type=int, default=5, help="rounds that are counted (5)")
    made.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    made.add_argument(
        "--against", choices=("torch",), help="also PyTorch, in turns; needs the extra [parity]"
    )
    made.add_argument("--compile", action="store_true", help="PyTorch: with torch.compile")
    made.add_argument("--channels-last", action="store_true", help="PyTorch: that memory format")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, and `overrides` of the config."""
    arguments, rest = made.parse_known_args(argv)
    if wrong := [word for word in rest if not word.startswith("--config.")]:
        made.error(f"unrecognized arguments: {' '.join(wrong)}")
    if min(arguments.examples, arguments.repeats) < 1:
        made.error("--examples and --repeats must be positive")
    arguments.overrides = rest
    return arguments


def table(rows: Sequence[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    """Markdown."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


def seconds(values: Mapping[str, float]) -> str:
    """A `spread` in words."""
    return f"{values['median']:.3g} s ({values['least']:.3g} to {values['largest']:.3g})"


def memory_rows(found: Mapping[str, int | None]) -> list[tuple[str, str]]:
    """Of what `memory` returned."""
    names = {
        "program": "memory of the program, by the compiler",
        "device": "largest memory in use on the device",
        "process": "largest resident set of the process",
    }
    return [
        (names[name], f"{value / GIB:.2f} GiB")
        for name, value in found.items()
        if value is not None
    ]


def against_rows(
    measured: Mapping[str, Sequence[Mapping[str, float]]],
    torch_over_jax: Mapping[str, Mapping[str, float]],
) -> list[tuple[str, str]]:
    """Of both sides of a comparison, by both clocks."""
    rows = [
        (f"{name}, {clock}", seconds(spread([round_[clock] for round_ in rounds])))
        for name, rounds in measured.items()
        for clock in ("wall", "processor")
    ]
    for clock, value in torch_over_jax.items():
        text = f"{value['median']:.2f} ({value['least']:.2f} to {value['largest']:.2f})"
        rows.append((f"torch / jax, {clock}, round by round", text))
    return rows


def write(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    files.write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())


def main(
    made: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    words: Callable[[dict[str, Any]], str],
) -> int:
    """Reads the arguments, runs, prints the table and writes the JSON; the exit code."""
    arguments = parse(made, argv)
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if arguments.against and missing:
        print(f"error: {' and '.join(missing)} missing: pip install '.[parity]'", file=sys.stderr)
        return 1
    try:
        report = run(arguments)
        settings = {name: str(value) for name, value in vars(arguments).items() if value}
        report = {"settings": settings, "machine": machine(), **report}
        print(words(report))
        if arguments.out:
            write(arguments.out, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
