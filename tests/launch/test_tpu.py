"""Cloud TPU pods: asking before creating, starting, and watching over preemptions, with a stand-in gcloud."""

import json
import shlex
import subprocess
import sys

import pytest

from launch import pod_hosts, tpu, training
from launch.commands import CommandError, Commands
from tests.support.launch_tools import commands_of, fake_tools, run  # noqa: F401

CREATE = ("create", "head-1", "--zone", "us-central2-b", "--accelerator-type", "v4-64")
TRAINING = ("--config=configs/tpu_v4.py", "--workdir=/mnt/runs/a b; $(touch x) 'q' \"d\"")


@pytest.fixture
def notes(tmp_path):
    return tmp_path / "notes"


@pytest.fixture
def call(tools, notes, capfd):
    """Runs launch.tpu with gcloud and git there: exit code, what it printed."""
    tools.add("gcloud", "git")

    def call(verb, *arguments):
        arguments = list(arguments)
        at = arguments.index("--") if "--" in arguments else len(arguments)
        code = run(tpu.main, verb, *arguments[:at], f"--notes={notes}", *arguments[at:])
        return code, capfd.readouterr()

    return call


def called(tools, *wanted):
    """The calls that have all these words in them."""
    return [c for c in tools.calls if all(any(w in word for word in c) for w in wanted)]


def answer(monkeypatch, text):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: text)


# --------------------------------------------------------------------------------------------------
# Commands


def test_creating_shows_what_it_costs_and_asks(call, tools, notes, monkeypatch):
    code, printed = call(*CREATE, "--spot")
    assert code == 2 and "--yes" in printed.err and tools.calls == []
    assert "32 chips" in printed.out and "768 chip-hours a day" in printed.out  # 64 cores
    answer(monkeypatch, "n")
    assert call(*CREATE)[0] == 1 and tools.calls == [] and not notes.exists()
    answer(monkeypatch, "y")
    assert call(*CREATE)[0] == 0 and len(called(tools, "create")) == 1


def test_a_dry_run_prints_the_commands_and_runs_none(call, tools, notes):
    options = ("--spot", "--project", "my-project", "--valid-until", "6h")
    code, printed = call(*CREATE, *options, "--dry-run")
    assert code == 0 and tools.calls == [] and not notes.exists()
    (line,) = commands_of(printed.out)
    assert call(*CREATE, *options, "--yes")[0] == 0
    assert tools.calls == [shlex.split(line)]
    assert {"--spot", "--project=my-project", "--valid-until-duration=6h"} <= set(tools.calls[0])
    written = json.loads((notes / "head-1.json").read_text())
    assert written["accelerator_type"] == "v4-64" and written["spot"] is True

    for verb, flags in (("start", ("--", *TRAINING)), ("stop", ()), ("delete", ())):
        code, printed = call(verb, "head-1", "--dry-run", *flags)
        assert code == 0 and {shlex.split(x)[0] for x in commands_of(printed.out)} <= {
            "gcloud",
            "git",
        }
    assert len(tools.calls) == 1 and (notes / "head-1.json").exists()


def test_start_waits_for_the_pod_then_installs_and_starts_everywhere(call, tools, notes):
    call(*CREATE, "--yes")
    start = ("start", "head-1", "--setup", "sudo mount /mnt", "--", *TRAINING)
    tools.reply(states("WAITING_FOR_RESOURCES", "ACTIVE"))
    code, printed = call(*start)
    assert code == 0 and "python -m launch.tpu watch head-1" in printed.out
    assert not called(tools, "scp")
    assert json.loads((notes / "head-1.json").read_text())["training"] == list(TRAINING)

    assert call(*start)[0] == 0
    copy, install, begin = tools.calls[-3:]
    assert "scp" in copy and all("--worker=all" in x for x in (copy, install, begin))
    assert install[-1].endswith("; sudo mount /mnt")
    script = begin[-1].removeprefix("--command=")
    subprocess.run(["/bin/bash", "-n", "-c", script], check=True)
    assert all(shlex.quote(word) in script for word in TRAINING)


def test_code_that_is_not_committed_is_refused(call, tools):
    call(*CREATE, "--yes")
    tools.reply((["git", "status"], [{"out": " M spinmeround_jax/train.py\n"}]))
    code, printed = call("start", "head-1", "--", *TRAINING)
    assert code == 2 and "train.py" in printed.err and not called(tools, "scp")


def test_names_that_could_be_options_or_paths_are_refused(call, tools):
    for name in ("../x", "two words", "a" * 64):
        code, printed = call("create", name, *CREATE[2:], "--yes")
        assert code == 2 and "lower-case letters" in printed.err
    assert tools.calls == []


@pytest.mark.parametrize(
    "given, message",
    [
        (("--config=configs/tpu_v4.py",), "--workdir="),
        (("--config=configs/tpu_v4.py", "--workdir=/x\nreboot"), "control characters"),
        (("--config=a.py", "--workdir=/x"), "--config=a.py: no such file"),
    ],
)
def test_trainings_that_could_not_resume_are_refused(call, tools, given, message):
    call(*CREATE, "--yes")
    code, printed = call("start", "head-1", "--", *given)
    assert code == 2 and message in printed.err
    assert len(tools.calls) == 1


def test_a_new_kind_of_tpu_needs_its_software_named(call, tools):
    create = (*CREATE[:-1], "v9x-8", "--yes")
    code, printed = call(*create)
    assert code == 2 and "--runtime-version" in printed.err
    assert call(*create, "--runtime-version", "v2-alpha-tpuv9")[0] == 0
    assert "--runtime-version=v2-alpha-tpuv9" in tools.calls[0]


# --------------------------------------------------------------------------------------------------
# Failures


def test_a_missing_or_failing_tool_gives_its_code_and_leaves_no_note(call, tools, notes):
    tools.reply((["create"], [{"err": "ERROR: quota\n", "code": 3}]))
    code, printed = call(*CREATE, "--yes")
    assert code == 3 and "ERROR: quota" in printed.err and not (notes / "head-1.json").exists()
    (tools.folder / "bin" / "gcloud").unlink()
    code, printed = call(*CREATE, "--yes")
    assert code == 127 and "Google Cloud CLI" in printed.err


def test_commands_are_ended_after_their_time():
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(CommandError, match="timed out") as caught:
        Commands(False).run(argv, timeout=0.3, quiet=True)
    assert caught.value.code == 124


@pytest.mark.parametrize("change", [{"spot": "yes"}, {"name": "other"}, {"colour": 1}, None])
def test_damaged_notes_are_named(call, tools, notes, change):
    call(*CREATE, "--yes")
    file = notes / "head-1.json"
    values = json.loads(file.read_text())
    file.write_text("{" if change is None else json.dumps({**values, **change}))
    code, printed = call("watch", "head-1")
    assert code == 2 and f"{file}: damaged" in printed.err
    assert len(tools.calls) == 1


def test_deleting_asks_first(call, tools, notes, monkeypatch):
    call(*CREATE, "--yes")
    assert call("delete", "head-1")[0] == 2 and len(tools.calls) == 1
    answer(monkeypatch, "n")
    assert call("delete", "head-1")[0] == 1 and len(tools.calls) == 1
    answer(monkeypatch, "y")
    assert call("delete", "head-1")[0] == 0
    assert "delete" in tools.calls[-1] and not (notes / "head-1.json").exists()

    code, printed = call("delete", "head-1", "--yes")
    assert code == 2 and "no such note" in printed.err and "--zone" in printed.err
    assert call("delete", "head-1", "--yes", "--zone", "us-central2-b")[0] == 0
    assert len(called(tools, "delete")) == 2


# --------------------------------------------------------------------------------------------------
# Watching


def states(*names):
    return (["describe"], [{"out": f"{name}\n"} for name in names])


def looks(*seen):
    return (["ssh", "wc -c"], [{"out": f"{one}"} for one in seen])


@pytest.fixture
def pod(call, tools, notes):
    """A spot pod with a training; the calls that made it are forgotten."""
    call(*CREATE, "--spot", "--yes")
    call("start", "head-1", "--", *TRAINING)
    tools.folder.joinpath("calls.jsonl").unlink()
    return notes / "head-1.json"


def test_watch_shows_states_and_the_log_to_the_end(call, tools, pod):
    tools.reply(
        states("WAITING_FOR_RESOURCES", "ACTIVE"),
        looks("running no 6\nstep 1", "running no 6\n", "0 no 13\n\nstep 2", "0 no 13\n"),
    )
    code, printed = call("watch", "head-1")
    assert code == 0 and not called(tools, "delete")
    order = [printed.out.index(x) for x in ("WAITING", "ACTIVE", "step 1", "step 2")]
    assert order == sorted(order)
    assert printed.out.count("step 1") == printed.out.count("ACTIVE") == 1
    assert "launch.tpu delete head-1" in printed.out


def test_a_preempted_spot_pod_comes_back_with_the_same_training(call, tools, pod):
    tools.reply(
        states("ACTIVE", "SUSPENDING", "WAITING_FOR_RESOURCES", "ACTIVE"),
        looks("running no 6\nstep 1", "absent no 0\n", "0 no 6\nstep 2", "0 no 6\n"),
    )
    code, printed = call("watch", "head-1", "--delete-when-done")
    assert code == 0 and "step 2" in printed.out
    verbs = [c[4] for c in tools.calls if c[0] == "gcloud" and "queued-resources" in c]
    assert [v for v in verbs if v != "describe"] == ["delete", "create", "delete"]
    assert "--spot" in called(tools, "create")[0]
    (begin,) = called(tools, "ssh", "nohup")
    assert all(shlex.quote(word) in begin[-1] for word in TRAINING)
    assert not pod.exists()


@pytest.mark.parametrize("spot, state", [(False, "SUSPENDED"), (True, "FAILED")])
def test_a_pod_is_not_created_again_without_need(call, tools, spot, state):
    call(*CREATE, "--yes", *(["--spot"] if spot else []))
    tools.reply(states(state))
    code, printed = call("watch", "head-1")
    assert code == 1 and f"head-1 is {state}" in printed.err
    assert len(called(tools, "create")) == 1 and not called(tools, "delete")


def test_maintenance_restarts_the_training_a_person_does_not(call, tools, pod):
    tools.reply(
        states("ACTIVE"),
        looks(*["42 no 0\n"] * (tpu.SETTLING + 1), "running no 0\n", "0 no 0\n"),
    )
    assert call("watch", "head-1")[0] == 0
    assert len(called(tools, "ssh", "nohup")) == 1

    tools.reply(states("ACTIVE"), looks("42 yes 0\n"))
    assert call("watch", "head-1", "--delete-when-done")[0] == training.STOPPED
    assert len(called(tools, "ssh", "nohup")) == 1 and not called(tools, "delete")


def test_a_training_that_fails_ends_the_watch_with_its_code(call, tools, pod):
    tools.reply(states("ACTIVE"), looks("1 no 5\nerror", "1 no 5\n"))
    code, printed = call("watch", "head-1")
    assert code == 1 and "error" in printed.out and not called(tools, "nohup")


def test_lost_contact_ends_the_watch_only_if_it_lasts(call, tools, pod):
    failure = {"err": "ssh: broken", "code": 255}
    tools.reply(
        states("ACTIVE"),
        (["wc -c"], [failure] * 3 + [{"out": "what?\n"}, {"out": "0 no 0\n"}]),
    )
    assert call("watch", "head-1")[0] == 0
    tools.reply(states("ACTIVE"), (["wc -c"], [failure]))
    code, printed = call("watch", "head-1")
    assert code == 255 and "ssh: broken" in printed.err


def test_ctrl_c_leaves_the_pod_and_says_how_to_delete_it(call, tools, pod, monkeypatch):
    tools.reply(states("ACTIVE"), looks("running no 0\n"))

    def interrupt(seconds):
        if seconds == 30.0:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    code, printed = call("watch", "head-1")
    assert code == 130 and not called(tools, "delete")
    assert "python -m launch.tpu delete head-1" in printed.out


def test_the_log_is_read_on_from_where_it_ended():
    assert pod_hosts.parse("running no 100000\nabc", 10).offset == 10 + 65536
    assert pod_hosts.parse("running no 100\nabc", 10).offset == 100
    assert pod_hosts.parse("running no 5\n", 10).offset == 0  # another log
