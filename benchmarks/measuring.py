"""Shared by the benchmarks: interleaved rounds, peaks, memory, profiles, tables, command lines."""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from launch import compile as compile_report
from spinmeround_jax import cli, files
from spinmeround_jax.files import InputError
from spinmeround_jax.training import flops

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers")
# Largest root mean square of the difference from PyTorch, in standard deviations of PyTorch's output.
LIMITS = {"float32": 1e-3, "bfloat16": 0.2}
_MATRIX = 4096  # side of the matrices whose product measures the peak of a CPU


# --------------------------------------------------------------------------------------------------
# Time


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def compare(cases: Mapping[str, Callable[[], Any]], rounds: int, desc: str) -> dict[str, Any]:
    """Time the cases in interleaved rounds, A B A B ...

    Args:
        cases: functions that return when the work is done; call each before, so that nothing compiles here.
        desc: label of the progress bar.

    Returns:
        "rounds": by case and clock ("wall", or "processor" of all threads of this process) seconds of each;
        "seconds": their `spread`; with the cases "jax" and "torch" also "torch_over_jax": by clock, PyTorch's
        time over ours in each round, above 1 where ours is faster.
    """
    measured: dict[str, dict[str, list[float]]] = {x: {"wall": [], "processor": []} for x in cases}
    for name in tqdm.tqdm([*cases] * rounds, desc=desc, unit="run"):
        wall, processor = time.perf_counter(), time.process_time()
        cases[name]()
        measured[name]["wall"].append(time.perf_counter() - wall)
        measured[name]["processor"].append(time.process_time() - processor)
    report: dict[str, Any] = {"rounds": measured, "seconds": {}}
    for name, clocks in measured.items():
        report["seconds"][name] = {clock: spread(values) for clock, values in clocks.items()}
    if {"jax", "torch"} <= set(cases):
        report["torch_over_jax"] = {
            clock: spread(np.divide(measured["torch"][clock], ours).tolist())
            for clock, ours in measured["jax"].items()
        }
    return report


def largest_operations(run: Callable[[], Any], count: int = 10) -> list[dict[str, Any]]:
    """The operations that take longest on the first device while `run` runs, from JAX's profiler.

    Returns:
        "name" (without its number), "calls", "seconds" and "share" of the time of all operations.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
    planes = sorted(profile.planes, key=lambda plane: plane.name)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    found: dict[str, list[float]] = collections.defaultdict(list)
    for line in (line for plane in devices[:1] or planes for line in plane.lines):
        if devices and not line.name.startswith(("Stream", "XLA Ops")):
            continue  # modules, steps and the like, which contain the operations
        for event in line.events:
            # On a CPU, operations stand between other events, and loops contain operations.
            name = re.sub(r"[._]?[0-9]+$", "", event.name)
            if devices or ("hlo_op" in dict(event.stats) and name not in ("while", "call")):
                found[name].append(event.duration_ns / 1e9)
    seconds = {name: sum(times) for name, times in found.items()}
    largest = sorted(seconds, key=seconds.get, reverse=True)[:count]
    return [
        {"name": name, "calls": len(found[name]), "seconds": seconds[name],
         "share": seconds[name] / sum(seconds.values())}
        for name in largest
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The machine


def speed(needed: float, seconds: float, dtype: str) -> dict[str, Any]:
    """FLOP/s and MFU (model FLOPs utilisation) of `needed` FLOPs in `seconds`."""
    peak, source = peak_flops(dtype)
    return {
        "flops": needed, "flops_per_second": needed / seconds,
        "peak_flops_per_second": peak, "peak_source": source, "mfu": needed / seconds / peak,
    }  # fmt: skip


def peak_flops(dtype: str) -> tuple[float, str]:
    """Peak FLOP/s of this process's devices, and the source of the figure.

    For accelerators the data sheet's, in bfloat16; for a CPU the fastest of four large matrix products.
    """
    device, count = jax.devices()[0], jax.device_count()
    if peak := flops.PEAKS.get(device.device_kind):
        return peak * count, f"{count} x {device.device_kind}, bfloat16, data sheet"
    if device.platform != "cpu":
        return float("nan"), f"unknown device {device.device_kind!r}, see training/flops.py"
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((_MATRIX, _MATRIX)), dtype)
    product = jax.jit(jnp.matmul)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        best = min(best, time.perf_counter() - start)
    source = f"the fastest of four {dtype} products of {_MATRIX} x {_MATRIX} matrices in this run"
    return 2.0 * _MATRIX**3 / best, source


def memory(compiled: jax.stages.Compiled) -> dict[str, int | None]:
    """Bytes that the program needs at once by XLA's memory analysis, and `seen_memory`."""
    return {"program_bytes": compile_report.peak(compiled.memory_analysis()), **seen_memory()}


def seen_memory() -> dict[str, int | None]:
    """Peaks so far: arrays on the first device, where its backend counts them; the process's resident set."""
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "device_bytes": stats.get("peak_bytes_in_use"),
        "process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
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
        "load": round(os.getloadavg()[0], 2),  # shows whether other programs were running
        "python": platform.python_version(),
        **versions,
    }


def check_equal(ours: np.ndarray, theirs: np.ndarray, dtype: str, what: str) -> dict[str, float]:
    """Difference of the outputs of two implementations, in standard deviations of the second's.

    Raises:
        ValueError: it is larger than rounding in `dtype` explains.
    """
    error = np.abs(np.asarray(ours, np.float64) - theirs) / np.std(theirs)
    found = {"largest": float(error.max()), "rms": float(np.sqrt(np.mean(error**2)))}
    if not found["rms"] < LIMITS[dtype]:
        raise ValueError(
            f"{what}: ours and PyTorch's differ by {found['rms']:.2g} deviations in {dtype} "
            f"(limit {LIMITS[dtype]:g}): they are not the same function"
        )
    return found


def random_parameters(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, jax.Array]:
    """Values for parameters by name (anything with a shape), such that activations keep their scale.

    New networks end in zeros, which would make a comparison of outputs meaningless.
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
# Command lines and tables


def parser(
    name: str, description: str, examples: str, what: str = "examples of all views at once"
) -> argparse.ArgumentParser:
    """A parser with the arguments that all benchmarks of a config have, for `main`.

    Args:
        what: the thing that --examples counts.
    """
    made = cli.build_parser(
        f"benchmarks.{name}",
        description,
        examples + "\nFurther --config.NAME=VALUE arguments override values of the config.",
    )
    made.add_argument("--config", required=True, help="a file of configs/")
    made.add_argument(
        "--examples", type=cli.integer(1), default=1, help=f"{what}, on each device (1)"
    )
    made.add_argument("--repeats", type=cli.integer(1), default=5, help="timed rounds (5)")
    made.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    made.add_argument(
        "--against", choices=("torch",), help="interleaved with PyTorch; needs the extra [parity]"
    )
    made.add_argument("--compile", action="store_true", help="PyTorch: with torch.compile")
    made.add_argument("--channels-last", action="store_true", help="PyTorch: that memory format")
    return made


def main(
    made: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace], dict[str, Any]],
) -> int:
    """Parse, run, print a table and write the JSON; return the exit code."""

    def parse(argv: Sequence[str] | None) -> argparse.Namespace:
        arguments, overrides = made.parse_known_args(argv)
        arguments.overrides = overrides
        if wrong := [word for word in overrides if not word.startswith("--config.")]:
            made.error(f"unrecognized arguments: {' '.join(wrong)}")
        missing = [
            name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None
        ]
        if arguments.against and missing:
            raise InputError(f"{' and '.join(missing)} missing: pip install '.[parity]'")
        return arguments

    def report(arguments: argparse.Namespace) -> None:
        finish({**about(arguments), **run(arguments)}, arguments.out)

    return cli.main(parse, report, argv)


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings and the machine."""
    settings = {name: str(value) for name, value in vars(arguments).items() if value}
    return {"settings": settings, "machine": machine()}


def finish(report: Mapping[str, Any], out: pathlib.Path | None) -> None:
    """Print the report as a table and write it as JSON."""
    print(table(rows(report)))
    if out:
        files.write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def rows(report: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of all figures in a report; single rounds and other lists are left out."""
    for name, value in report.items():
        label = f"{before}{name.replace('_', ' ')}"
        if isinstance(value, Mapping) and set(value) == {"median", "least", "largest"}:
            middle, least, largest = map(number, value.values())
            yield label, f"{middle} ({least} to {largest})"
        elif isinstance(value, Mapping):
            yield from rows(value, f"{label}, ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield label, number(value)
        elif value is not None and not isinstance(value, (list, tuple)):
            yield label, str(value)


def number(value: float) -> str:
    """Three digits, large numbers with M, G or T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
