"""The shell commands of hosts, run by a real bash: over ssh (launch.nodes) and on a pod (launch.pod_hosts)."""

import os
import pathlib
import shlex
import subprocess
import time

import pytest

from launch import nodes, pod_hosts, training
from tests.support.launch_tools import commands_of, fake_tools, run  # noqa: F401

NAMES = ("--hosts", "user@node1,node2")
TRAINING = ("--config=configs/h100.py", "--workdir=/shared/a b; $(touch x) `y` 'q' \"d\" \\ $HOME")

# Stands in for python -m spinmeround_jax.train: notes its arguments, ends with 42 after a SIGTERM.
TRAINER = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done > "args.$$"
echo begun
trap 'echo stopped; exit 42' TERM
if [ -e finish ]; then exit 0; fi
i=0; while [ $i -lt 200 ]; do /bin/sleep 0.05; i=$((i+1)); done; exit 3
"""
# A host of its own for each name, which runs what ssh would have it run.
SSH = """#!/bin/sh
printf '%s\\n' "$*" >> {log}
while [ "$1" = -o ]; do shift 2; done
export HOSTNAME="$1"; PATH=/usr/bin:/bin exec /bin/sh -c "$2"
"""


def wait_for(condition, seconds=15.0):
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


# --------------------------------------------------------------------------------------------------
# Hosts reached by ssh


@pytest.fixture
def shared(tools, tmp_path):
    folder = tmp_path / "it's shared"
    executable(folder / ".venv" / "bin" / "python", TRAINER)
    executable(tools.folder / "bin" / "ssh", SSH.format(log=tools.folder / "ssh.log"))
    return folder


def call(shared, verb, *arguments, name="head-1"):
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    where = (*NAMES, "--directory", str(shared))
    return run(nodes.main, verb, name, *where, *arguments[:at], *arguments[at:])


def test_a_run_on_two_hosts_starts_stops_and_resumes(shared, capfd):
    assert call(shared, "start", "--", *TRAINING) == 0
    seen = wait_for(lambda: len(a := arguments_seen(shared)) == 2 and all(a) and a)
    common = [
        "-m",
        "spinmeround_jax.train",
        *TRAINING,
        "--coordinator=node1:8476",
        "--process_count=2",
    ]
    assert sorted(seen) == [
        [*common, f"--process_id={i}", "--stopped_exit_code=42"] for i in range(2)
    ]
    assert not list(shared.glob("x")), "a part of an argument was run"
    logs = shared / "runs" / "logs"
    wait_for(lambda: "begun" in (logs / "head-1-0.log").read_text())

    assert call(shared, "start", "--", *TRAINING) != 0
    assert "head-1 runs already" in capfd.readouterr().err

    assert call(shared, "stop") == 0
    assert wait_for(lambda: (logs / "head-1-0.exit").is_file()) and call(shared, "watch") == 42
    assert "stopped" in capfd.readouterr().out
    assert not (logs / "head-1-1.exit").exists()  # in truth the first process tells it
    assert call(shared, "stop") == 1 and "does not run here" in capfd.readouterr().err

    assert call(shared, "delete", "--yes") == 0
    pid = int((logs / "head-1-1.pid").read_text())
    wait_for(lambda: not pathlib.Path(f"/proc/{pid}/exe").exists() or _is_zombie(pid))

    (shared / "finish").touch()
    assert call(shared, "start", "--", *TRAINING, name="head-2") == 0
    assert wait_for(lambda: (logs / "head-2-0.exit").is_file())
    assert call(shared, "watch", name="head-2") == 0


def _is_zombie(pid: int) -> bool:
    return ") Z " in pathlib.Path(f"/proc/{pid}/stat").read_text()


def test_a_dry_run_is_a_script_that_does_the_same(shared, capfd, tools):
    assert call(shared, "start", "--dry-run", "--", *TRAINING) == 0
    script = "\n".join(commands_of(capfd.readouterr().out))
    assert not (tools.folder / "ssh.log").exists() and not (shared / "runs").exists()
    (shared / "finish").touch()
    path = f"{tools.folder / 'bin'}:/usr/bin:/bin"
    subprocess.run(["/bin/bash", "-ec", script], check=True, env={**os.environ, "PATH": path})
    seen = wait_for(lambda: len(a := arguments_seen(shared)) == 2 and all(a) and a)
    assert all(words[2:4] == list(TRAINING) for words in seen)


@pytest.mark.parametrize(
    "hosts", ["-oProxyCommand=reboot", "a;b", "a,,b", "a,a", "$(x)", "a b", "u@"]
)
def test_hosts_that_ssh_could_take_for_options_are_refused(shared, tools, hosts, capfd):
    where = ("--directory", str(shared))
    assert run(nodes.main, "watch", "head-1", f"--hosts={hosts}", *where) == 2
    assert "error" in capfd.readouterr().err and not (tools.folder / "ssh.log").exists()


def test_a_host_that_does_not_answer_is_told(shared, tools, capfd):
    executable(tools.folder / "bin" / "ssh", "#!/bin/sh\necho 'ssh: no route' >&2; exit 255\n")
    assert call(shared, "start", "--", *TRAINING) == 255
    assert capfd.readouterr().err.count("ssh: no route") == 2


# --------------------------------------------------------------------------------------------------
# Hosts of a pod


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
