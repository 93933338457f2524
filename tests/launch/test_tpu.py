"""Cloud TPU pods: the exact commands, and a watch over their lives, with a gcloud that notes its arguments."""

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
QUEUED = "gcloud compute tpus queued-resources {} head-1 --zone=us-central2-b --quiet"


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


# --------------------------------------------------------------------------------------------------
# Commands


def test_dry_runs_print_exactly_what_would_be_run(call, tools, notes):
    options = (
        "--spot", "--project", "my-project", "--valid-until", "6h", "--network", "net",
        "--service-account", "train@my-project.iam.gserviceaccount.com",
    )  # fmt: skip
    code, told = call(*CREATE, *options, "--dry-run")
    assert code == 0 and tools.calls == [] and not notes.exists()
    (line,) = commands_of(told.out)
    assert line == (
        "gcloud compute tpus queued-resources create head-1 --zone=us-central2-b --project=my-project "
        "--quiet --node-id=head-1 --accelerator-type=v4-64 --runtime-version=tpu-ubuntu2204-base "
        "--spot --valid-until-duration=6h --network=net "
        "--service-account=train@my-project.iam.gserviceaccount.com"
    )
    assert "python -m launch.tpu delete head-1" in told.out

    assert call(*CREATE, *options)[0] == 0
    assert tools.calls == [shlex.split(line)]
    written = json.loads((notes / "head-1.json").read_text())
    assert written["accelerator_type"] == "v4-64" and written["spot"] is True

    tools.folder.joinpath("calls.jsonl").unlink()
    for verb, flags in (
        ("start", ("--", *TRAINING)),
        ("watch", ()),
        ("stop", ()),
        ("delete", ("--yes",)),
    ):
        code, told = call(verb, "head-1", "--dry-run", *flags)
        assert code == 0 and commands_of(told.out)
        for line in commands_of(told.out):
            assert shlex.split(line)[0] in ("gcloud", "git")
    assert tools.calls == [] and (notes / "head-1.json").exists()


def test_start_copies_installs_and_starts_everywhere(call, tools, notes):
    call(*CREATE)
    start = ("start", "head-1", "--setup", "sudo mount /mnt", "--", *TRAINING)
    tools.reply(states("WAITING_FOR_RESOURCES", "ACTIVE"))
    code, told = call(*start)
    assert code == 0 and "starts it when it is ACTIVE" in told.out and not called(tools, "scp")
    assert json.loads((notes / "head-1.json").read_text())["training"] == list(TRAINING)
    tools.folder.joinpath("calls.jsonl").unlink()

    code, told = call(*start)
    assert code == 0 and "python -m launch.tpu watch head-1" in told.out
    status, describe, archive, copy, install, begin = tools.calls
    assert describe == [*QUEUED.format("describe").split(), "--format=value(state.state)"]
    assert status[:2] == ["git", "-C"] and status[3] == "status"
    assert archive[3:5] == ["archive", "--format=tar.gz"] and archive[-1] == "HEAD"
    where = ["--zone=us-central2-b", "--quiet"]
    tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert copy == [
        *tpu_vm, "scp", archive[5].removeprefix("--output="), "head-1:spinmeround.tar.gz", *where,
        "--worker=all",
    ]  # fmt: skip
    assert install[:-1] == begin[:-1] == [*tpu_vm, "ssh", "head-1", *where, "--worker=all"]
    assert install[-1].endswith("; sudo mount /mnt")
    script = begin[-1].removeprefix("--command=")
    subprocess.run(["/bin/bash", "-n", "-c", script], check=True)
    for word in TRAINING:
        assert shlex.quote(word) in script


def test_code_that_the_pod_would_not_get_is_refused(call, tools):
    call(*CREATE)
    tools.reply((["git", "status"], [{"out": " M spinmeround_jax/train.py\n"}]))
    code, told = call("start", "head-1", "--", *TRAINING)
    assert code == 2 and "not committed" in told.err and "train.py" in told.err
    assert not called(tools, "scp")


@pytest.mark.parametrize(
    "name", ["a;reboot", "$(reboot)", "-rf", "two words", "Upper", "a'b", "ä", "", "a\nb", "a" * 64]
)
def test_names_that_a_shell_could_take_for_more_are_refused(call, tools, name):
    arguments = ["--zone", "us-central2-b", "--accelerator-type", "v4-64"]
    code, told = call("create", *arguments, f"--subnetwork={name}", "head-1")
    assert code == 2 and "lower-case letters" in told.err
    if not name.startswith("-"):
        code, told = call("create", name, *arguments)
        assert code == 2 and "lower-case letters" in told.err
    assert tools.calls == []


@pytest.mark.parametrize(
    "given, message",
    [
        ((), "needs --config="),
        (("--config=a.py",), "needs --workdir="),
        (("--config=a.py", "--workdir=/x\nreboot"), "line ends"),
        (("--config=a.py", "--workdir=/x"), "--config=a.py: there is no such file"),
    ],
)
def test_trainings_that_could_not_resume_are_refused(call, tools, given, message):
    call(*CREATE)
    code, told = call("start", "head-1", "--", *given)
    assert code == 2 and message in told.err
    assert len(tools.calls) == 1


def test_a_new_kind_of_tpu_needs_its_software_named(call, tools):
    create = ("create", "head-1", "--zone", "us-central2-b", "--accelerator-type", "v9x-8")
    code, told = call(*create)
    assert code == 2 and "--runtime-version is needed for v9x" in told.err
    assert call(*create, "--runtime-version", "v2-alpha-tpuv9")[0] == 0
    assert "--runtime-version=v2-alpha-tpuv9" in tools.calls[0]


# --------------------------------------------------------------------------------------------------
# What goes wrong


def test_missing_tools_are_named_with_how_to_install_them(notes, tools, capsys):
    assert run(tpu.main, *CREATE, f"--notes={notes}") == 127
    assert "gcloud is not on the PATH: install the Google Cloud CLI" in capsys.readouterr().err
    assert not notes.exists()


def test_a_failing_command_passes_on_its_code_and_leaves_no_note(call, tools, notes):
    tools.reply((["create"], [{"err": "ERROR: quota\n", "code": 3}]))
    code, told = call(*CREATE)
    assert code == 3 and "ERROR: quota" in told.err and "failed with 3" in told.err
    assert not (notes / "head-1.json").exists()


def test_commands_end_in_time():
    with pytest.raises(CommandError, match=r"no end after 0 s") as caught:
        Commands(False).run([sys.executable, "-c", "input()" * 0 + "import time; time.sleep(60)"],
                            timeout=0.3, quiet=True)  # fmt: skip
    assert caught.value.code == 124


@pytest.mark.parametrize(
    "change",
    [
        {"zone": "x; reboot"},
        {"spot": "yes"},
        {"name": "other"},
        {"colour": 1},
        {"training": ["--config=a\n"]},
        None,
    ],
)
def test_damaged_notes_are_named(call, tools, notes, change):
    call(*CREATE)
    file = notes / "head-1.json"
    file.write_text(
        "{" if change is None else json.dumps({**json.loads(file.read_text()), **change})
    )
    code, told = call("watch", "head-1")
    assert code == 2 and f"{file}: damaged" in told.err
    assert len(tools.calls) == 1


def test_deleting_asks_first(call, tools, notes, monkeypatch):
    call(*CREATE)
    code, told = call("delete", "head-1")
    assert code == 2 and "give --yes" in told.err and len(tools.calls) == 1

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert call("delete", "head-1")[0] == 1 and len(tools.calls) == 1
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert call("delete", "head-1")[0] == 0
    assert tools.calls[-1] == [*QUEUED.format("delete").split(), "--force"]
    assert not (notes / "head-1.json").exists()

    code, told = call("delete", "head-1", "--yes")
    assert code == 2 and "no such note" in told.err and "--zone" in told.err
    assert call("delete", "head-1", "--yes", "--zone", "us-central2-b")[0] == 0
    assert tools.calls[-1] == [*QUEUED.format("delete").split(), "--force"]


# --------------------------------------------------------------------------------------------------
# Watching


def states(*names):
    return (["describe"], [{"out": f"{name}\n"} for name in names])


def looks(*seen):
    return (["ssh", "wc -c"], [{"out": f"{one}"} for one in seen])


@pytest.fixture
def pod(call, tools, notes):
    """A spot pod with a training, none of whose calls is remembered."""
    call(*CREATE, "--spot")
    call("start", "head-1", "--", *TRAINING)
    tools.folder.joinpath("calls.jsonl").unlink()
    return notes / "head-1.json"


def test_watch_shows_states_and_the_log_to_the_end(call, tools, pod):
    tools.reply(
        states("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"),
        looks("running no 6\nstep 1", "running no 6\n", "0 no 13\n\nstep 2", "0 no 13\n"),
    )
    code, told = call("watch", "head-1")
    assert code == 0
    assert [
        told.out.index(x) for x in ("WAITING", "PROVIS", "ACTIVE", "step 1", "step 2")
    ] == sorted(told.out.index(x) for x in ("WAITING", "PROVIS", "ACTIVE", "step 1", "step 2"))
    assert told.out.count("step 1") == told.out.count("ACTIVE") == 1
    offsets = [c[-1].split("tail -c +")[1].split()[0] for c in called(tools, "wc -c")]
    assert offsets == ["1", "7", "7", "14"]
    assert "the training ended with 0" in told.out and "launch.tpu delete head-1" in told.out
    assert not called(tools, "delete")


def test_a_preempted_spot_pod_comes_back_with_the_same_training(call, tools, pod):
    tools.reply(
        states("ACTIVE", "SUSPENDING", "WAITING_FOR_RESOURCES", "ACTIVE"),
        looks("running no 6\nstep 1", "absent no 0\n", "0 no 6\nstep 2", "0 no 6\n"),
    )
    code, told = call("watch", "head-1", "--delete-when-done")
    assert code == 0 and "was preempted" in told.out and "step 2" in told.out
    verbs = [c[4] for c in tools.calls if c[0] == "gcloud" and "queued-resources" in c]
    assert [v for v in verbs if v != "describe"] == ["delete", "create", "delete"]
    assert "--spot" in called(tools, "create")[0]
    (begin,) = called(tools, "ssh", "nohup")
    assert all(shlex.quote(word) in begin[-1] for word in TRAINING)
    assert len(called(tools, "scp")) == 1 and not pod.exists()


def test_a_pod_that_is_not_spot_is_not_asked_for_again(call, tools, notes):
    call(*CREATE)
    tools.reply(states("SUSPENDED"))
    code, told = call("watch", "head-1")
    assert code == 1 and "head-1 is SUSPENDED" in told.err and "describe head-1" in told.err
    assert not called(tools, "delete")


def test_a_request_that_fails_is_not_repeated(call, tools, pod):
    tools.reply(states("WAITING_FOR_RESOURCES", "FAILED"))
    code, told = call("watch", "head-1")
    assert code == 1 and "head-1 is FAILED" in told.err and not called(tools, "create")


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
    code, told = call("watch", "head-1")
    assert code == 1 and "error" in told.out and not called(tools, "nohup")


def test_lost_contact_is_borne_for_a_while(call, tools, pod):
    tools.reply(
        states("ACTIVE"),
        (["wc -c"], [{"err": "ssh: broken", "code": 255}] * 3 + [{"out": "what?\n"}, {"out": "0 no 0\n"}]),
    )  # fmt: skip
    code, told = call("watch", "head-1")
    assert code == 0 and told.out.count("no answer") == 4 and "ssh: broken" in told.out

    tools.reply(states("ACTIVE"), (["wc -c"], [{"err": "ssh: broken", "code": 255}]))
    code, told = call("watch", "head-1")
    assert code == 255 and "ssh: broken" in told.err


def test_ctrl_c_leaves_the_pod_and_says_how_to_end_it(call, tools, pod, monkeypatch):
    tools.reply(states("ACTIVE"), looks("running no 0\n"))

    def interrupt(seconds):
        if seconds == 30.0:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    code, told = call("watch", "head-1")
    assert code == 130 and not called(tools, "delete")
    assert "goes on, and costs" in told.out and "python -m launch.tpu delete head-1" in told.out


def test_reports_continue_where_the_log_was_read_to():
    assert pod_hosts.parse("running no 100000\nabc", 10).offset == 10 + 65536
    assert pod_hosts.parse("running no 100\nabc", 10).offset == 100
    assert pod_hosts.parse("running no 5\n", 10).offset == 0  # another log
    with pytest.raises(ValueError, match="answered 'bash: not found'"):
        pod_hosts.parse("bash: not found\n", 0)
