"""The shell commands for the hosts of a pod, run by a real bash."""

import os
import pathlib
import shlex
import subprocess
import time

import pytest

from launch import pod_hosts, training

TRAINING = (
    "--config=configs/tpu_v4.py",
    "--workdir=/shared/a b; $(touch x) `y` 'q' \"d\" \\ $HOME",
)

# Stands in for python -m spinmeround_jax.train: notes its arguments, ends with 42 after a SIGTERM.
TRAINER = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done > "args.$$"
echo begun
trap 'echo stopped; exit 42' TERM
if [ -e finish ]; then exit 0; fi
i=0; while [ $i -lt 1200 ]; do /bin/sleep 0.05; i=$((i+1)); done; exit 3
"""


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        os.sched_yield()
        subprocess.run(["/bin/sleep", "0.02"], check=True)
    return result


def executable(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def arguments_seen(folder: pathlib.Path) -> list[list[str]]:
    return [path.read_text().split("\0")[:-1] for path in sorted(folder.glob("args.*"))]


@pytest.fixture
def pod_home(tmp_path):
    """A host of a pod as `install` leaves it."""
    home = tmp_path / "home"
    executable(home / "spinmeround" / "venv" / "bin" / "python", TRAINER)
    (home / "spinmeround" / "code").mkdir()
    return home


def on_host(home, script):
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_a_training_on_a_pod_is_started_once_followed_and_stopped(pod_home):
    base = pod_home / "spinmeround"
    assert pod_hosts.parse(on_host(pod_home, pod_hosts.look(0)), 0).state == "absent"
    on_host(pod_home, pod_hosts.start(TRAINING))
    (seen,) = wait_for(lambda: all(a := arguments_seen(base / "code")) and a)
    assert seen == ["-m", "spinmeround_jax.train", *TRAINING, "--stopped_exit_code=42"]
    report = wait_for(
        lambda: (r := pod_hosts.parse(on_host(pod_home, pod_hosts.look(0)), 0)).log and r
    )
    assert (report.state, report.log, report.offset) == ("running", "begun\n", 6)
    assert "runs already" in on_host(pod_home, pod_hosts.start(TRAINING))
    assert len(arguments_seen(base / "code")) == 1

    on_host(pod_home, pod_hosts.stop())
    wait_for(lambda: (base / "exit").is_file() and (base / "exit").read_text())
    report = pod_hosts.parse(on_host(pod_home, pod_hosts.look(6)), 6)
    assert (report.state, report.exit_code, report.by_hand) == ("ended", training.STOPPED, True)
    assert report.log.endswith("stopped\n")

    (base / "code" / "finish").touch()
    on_host(pod_home, pod_hosts.start(TRAINING))
    wait_for(lambda: (base / "exit").is_file() and (base / "exit").read_text())
    report = pod_hosts.parse(on_host(pod_home, pod_hosts.look(14)), 14)
    assert (report.state, report.exit_code, report.by_hand) == ("ended", 0, False)


def test_installing_unpacks_and_asks_for_what_training_needs(tmp_path):
    """With a pip and a uv that only note what they are told."""
    home = tmp_path / "home"
    note = f'#!/bin/sh\nprintf "%s " "$0" "$@" >> {shlex.quote(str(tmp_path / "notes"))}\n'
    executable(home / "tools" / "python3", note)
    executable(home / ".local" / "bin" / "uv", note)
    source = tmp_path / "constraints.txt"
    source.write_text("jax\n")
    subprocess.run(
        ["/bin/tar", "-czf", str(home / pod_hosts.ARCHIVE), "-C", str(tmp_path), source.name],
        check=True,
    )
    script = pod_hosts.install("touch $HOME/mounted")
    environment = {"HOME": str(home), "PATH": f"{home / 'tools'}:/usr/bin:/bin"}
    for _ in range(2):  # again does no harm
        subprocess.run(["/bin/bash", "-c", script], env=environment, check=True)
    assert (home / "spinmeround" / "code" / "constraints.txt").read_text() == "jax\n"
    assert (home / "mounted").exists()
    assert "-c constraints.txt -e .[train,tpu]" in (tmp_path / "notes").read_text()
