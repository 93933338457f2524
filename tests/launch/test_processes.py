"""Several processes on this machine as one run: stopped together, killed, resumed, as one process."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from spinmeround_jax import checkpoints
from spinmeround_jax.training import distributed
from tests.support import launch_worker
from tests.support.paths import ROOT
from tests.support.synthetic_shards import write_dataset

STEPS = 200
CONFIG = """
from configs.quickstart import get_config as quickstart

def get_config():
    config = quickstart()
    config.model.update({micro!r})
    config.data.directory = {data!r}
    config.init_from = {init!r}
    config.latents.directory = ""
    config.optimizer.batch_size = 2
    config.stages = ({{"steps": {steps}, "observed": (1,)}},)
    config.autoencoder_training.steps = 0
    config.update(dict(log_every=1, sample_every=10_000, checkpoint_every=10))
    return config
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, subjects=4)
    return folder


def start(count, *command, output, process_group=None, **environment):
    """`count` processes of one run; what each prints goes to output/<number>."""
    output.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for i in range(count):
        own = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            **environment,
        }
        if count > 1:
            own |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_PROCESS_COUNT": str(count),
                    "JAX_PROCESS_ID": str(i)}  # fmt: skip
        with (output / str(i)).open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", *map(str, command)], cwd=ROOT, env=own, stdout=file,
                    stderr=subprocess.STDOUT, process_group=process_group,
                )
            )  # fmt: skip
    return processes


def wait_until(condition, processes, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "ended too early"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def ends(processes, seconds=120.0):
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir) -> dict[int, float]:
    path = workdir / "losses.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(line) for line in lines)


def saved(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal())


def test_a_run_of_processes_is_stopped_killed_and_resumed_and_ends_as_one_of_one(
    directory, tmp_path, monkeypatch, capfd
):
    worker = ROOT / "tests" / "support" / "launch_worker.py"
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    # A SIGTERM to one process stops both, at the same step, with its checkpoint.
    both = start(2, worker, directory, parts, STEPS, 0.05, output=tmp_path / "1")
    wait_until(lambda: len(losses(parts)) >= 3, both)
    both[1].send_signal(signal.SIGTERM)
    assert ends(both) == [0, 0]
    stopped = max(losses(parts))
    for i in range(2):
        assert f"stopped at step {stopped} of {STEPS}" in (tmp_path / "1" / str(i)).read_text()
    assert 3 <= stopped < STEPS - 60 and saved(parts)[-1] == stopped

    # One is killed: the other ends with an error, and the last checkpoint is good.
    both = start(2, worker, directory, parts, STEPS, 0.02, output=tmp_path / "2")
    wait_until(lambda: saved(parts)[-1] >= stopped + 10, both)
    both[1].kill()
    assert ends(both)[0] not in (0, -signal.SIGKILL)
    assert f"from step {stopped} of 2 process(es)" in (tmp_path / "2" / "0").read_text()
    last = saved(parts)[-1]

    # One process resumes for two, and the result is that of one from the start.
    monkeypatch.setenv("JAX_PROCESS_COUNT", "1")
    launch_worker.main(str(directory), str(parts), str(STEPS), "0")
    assert f"from step {last} of 1 process(es)" in capfd.readouterr().out
    launch_worker.main(str(directory), str(whole), str(STEPS), "0")
    expected, found = losses(whole), losses(parts)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-3)


def living(group: int) -> list[str]:
    """Command lines of a group's processes, without those that have ended and wait to be noted."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_loader_workers_outlive_a_signal_to_the_group_but_not_the_trainer(directory, tmp_path):
    command = (ROOT / "tests" / "support" / "launch_worker.py", directory, tmp_path, STEPS, 0.05, 2)
    (trainer,) = start(1, *command, output=tmp_path / "1", process_group=0)
    wait_until(lambda: len(losses(tmp_path)) >= 3, [trainer], seconds=300)
    assert len(living(trainer.pid)) >= 3  # the workers are of its group
    os.killpg(trainer.pid, signal.SIGTERM)
    assert ends([trainer]) == [0]
    stopped = max(losses(tmp_path))
    assert f"stopped at step {stopped} of {STEPS}" in (tmp_path / "1" / "0").read_text()
    assert 3 <= stopped < STEPS and saved(tmp_path)[-1] == stopped
    wait_until(lambda: not living(trainer.pid), [])

    (trainer,) = start(1, *command, output=tmp_path / "2", process_group=0)
    wait_until(lambda: max(losses(tmp_path)) >= stopped + 3, [trainer], seconds=300)
    assert len(living(trainer.pid)) >= 3
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not living(trainer.pid), [])


@pytest.mark.slow
def test_the_training_command_in_two_processes(directory, tmp_path):
    from spinmeround_jax import train
    from tests import test_train  # its fixtures are not wanted here

    changes = {"init_from": "elsewhere", "autoencoder_training.steps": 0}
    model = train.new_model(test_train.micro_config(directory, **changes))
    checkpoints.save_model(tmp_path / "init", model, {})

    def run(count, steps, workdir, output, *flags):
        path = tmp_path / f"config{steps}.py"
        path.write_text(
            CONFIG.format(
                data=str(directory),
                init=str(tmp_path / "init"),
                steps=steps,
                micro=test_train.MICRO,
            )
        )
        cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
        arguments = (f"--config={path}", f"--workdir={tmp_path / workdir}", *flags)
        return start(
            count, "-m", "spinmeround_jax.train", *arguments, output=tmp_path / output, **cache
        )

    def read(output, process=0):
        return (tmp_path / output / str(process)).read_text()

    assert ends(run(2, 6, "two", "two-out"), 900) == [0, 0]
    assert ends(run(1, 6, "one", "one-out"), 900) == [0]
    two, one = (
        [line for line in read(f"{n}-out").splitlines() if line.startswith("diffusion ")]
        for n in ("two", "one")
    )
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        figures = [line.split("  examples")[0].split()[2:] for line in (a, b)]
        assert figures[0][::2] == figures[1][::2]
        np.testing.assert_allclose(*[[float(x) for x in f[1::2]] for f in figures], rtol=2e-3)

    long = (2, 5000, "long")
    both = run(*long, "long-out", "--stopped_exit_code=42")
    wait_until(lambda: "diffusion 2/5000" in read("long-out"), both, 900)
    both[1].send_signal(signal.SIGTERM)
    assert ends(both, 300) == [42, 42]
    stopped = saved(tmp_path / "long")[-1]
    for i in range(2):
        assert f"stopped at step {stopped} of 5000" in read("long-out", i)
    both = run(*long, "again-out")
    wait_until(lambda: f"diffusion {stopped + 2}/5000" in read("again-out"), both, 900)
    both[0].send_signal(signal.SIGINT)
    assert ends(both, 300) == [0, 0]
    assert f"from step {stopped}" in read("again-out")


# --------------------------------------------------------------------------------------------------
# How processes find each other


@pytest.fixture
def joined(monkeypatch):
    """Collects the arguments of jax.distributed.initialize; no cluster is there."""
    calls = []
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_PROCESS", "SLURM_", "OMPI_", "TPU_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(
        "jax.distributed.initialize", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    return calls


def test_flags_and_environment_say_the_same(joined, monkeypatch):
    distributed.initialize("host:8476", 4, 0)
    for name, value in (
        ("COORDINATOR_ADDRESS", "host:8476"),
        ("PROCESS_COUNT", "4"),
        ("PROCESS_ID", "0"),
    ):
        monkeypatch.setenv(f"JAX_{name}", value)
    distributed.initialize()
    distributed.initialize(process_id=3)
    assert [call[0] for call in joined] == [("host:8476", 4, i) for i in (0, 0, 3)]
    assert all(call[1]["cluster_detection_method"] == "deactivate" for call in joined)


def test_a_single_process_stays_alone(joined, monkeypatch):
    distributed.initialize(process_count=1)
    assert joined == []
    monkeypatch.undo()
    script = (
        "import jax; from spinmeround_jax.training import distributed; distributed.initialize(); "
        "assert jax.process_count() == 1 and not jax.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    "given, message",
    [
        (("host:1", None, None), "--process_count, --process_id missing"),
        (("host:1;x", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), r"must be in 0\.\.1, got 2"),
    ],
)
def test_what_does_not_fit_together_is_named(joined, given, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*given)
    assert joined == []


def test_what_fails_says_what_helps(joined, monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_COUNT", "two")
    with pytest.raises(ValueError, match="JAX_PROCESS_COUNT must be a number, got 'two'"):
        distributed.initialize()
    monkeypatch.delenv("JAX_PROCESS_COUNT")

    def fail(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    with pytest.raises(
        ConnectionError, match="process 1 of 2 did not reach the others through h:1"
    ):
        distributed.initialize("h:1", 2, 1)
    with pytest.raises(ConnectionError, match="With --process_count=1 this one runs alone"):
        distributed.initialize()


def test_a_signal_between_two_loops_is_not_lost(monkeypatch):
    """The service answers yes for one number only, the one after the last it was asked about."""
    asked = []
    point = [0]
    monkeypatch.setattr(distributed, "_asked", 0)
    monkeypatch.setattr(
        distributed.multihost_utils,
        "reached_preemption_sync_point",
        lambda step: asked.append(step) or step == point[0],
    )
    assert not any(distributed.should_stop(step) for step in (1, 2, 3))
    assert asked == [1, 2, 3]
    point[0] = 4  # the signal comes after the last step of the first loop
    assert distributed.should_stop(1)
    point[0] = 3
    assert [distributed.should_stop(step) for step in (2, 3, 4)] == [False, True, False]

    monkeypatch.setattr(distributed, "_asked", 0)
    point[0] = 1  # before the first step of a resumed run
    assert distributed.should_stop(2501)
