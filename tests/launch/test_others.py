"""GKE through XPK, and SLURM: the exact commands, with tools that note their arguments."""

import os
import shlex
import subprocess

import pytest

from launch import gke, slurm
from tests.support.launch_tools import commands_of, fake_tools, run  # noqa: F401

TRAINING = ("--config=configs/h100.py", "--workdir=/mnt/runs/h100")
WHERE = ("--cluster", "heads", "--zone", "us-central2-b", "--project", "my-project")
PLACE = ["--cluster=heads", "--zone=us-central2-b", "--project=my-project"]
IMAGE = ("--docker-image", "gcr.io/my-project/spinmeround:1")
COMMAND = (
    "exec python -m spinmeround_jax.train --config=configs/h100.py --workdir=/mnt/runs/h100 "
    "--stopped_exit_code=42"
)


# --------------------------------------------------------------------------------------------------
# GKE


def test_gke_starts_tpus_and_gpus_with_what_their_hosts_need(tools, capfd):
    tools.add("xpk")
    tpu = ("start", "head-1", *WHERE, *IMAGE, "--device-type", "v4-64", "--storage", "runs")
    assert run(gke.main, *tpu, "--capacity", "spot", "--dry-run", "--", *TRAINING) == 0
    (line,) = commands_of(capfd.readouterr().out)
    assert tools.calls == []
    assert shlex.split(line) == [
        "xpk", "workload", "create", "--workload=head-1", *PLACE, "--device-type=v4-64",
        "--num-slices=1", "--docker-image=gcr.io/my-project/spinmeround:1", "--storage=runs", "--spot",
        "--priority=medium", "--max-restarts=1000", "--restart-on-exit-codes=42",
        "--termination-grace-period-seconds=300", f"--command={COMMAND}",
    ]  # fmt: skip
    assert run(gke.main, *tpu, "--capacity", "spot", "--", *TRAINING) == 0
    assert tools.calls == [shlex.split(line)]
    assert "python -m launch.gke watch head-1" in capfd.readouterr().out

    gpu = ("start", "head-1", *WHERE, *IMAGE, "--device-type", "h100-mega-80gb-8", "--nodes", "2")
    assert run(gke.main, *gpu, "--", *TRAINING) == 0
    assert "--num-nodes=2" in tools.calls[-1] and "--num-slices=1" not in tools.calls[-1]
    script = tools.calls[-1][-1].removeprefix("--command=")
    assert script.startswith(COMMAND + " --coordinator=$JAX_COORDINATOR_ADDRESS:")
    # As the shell of a container reads it.
    environment = {"JAX_COORDINATOR_ADDRESS": "h-0.h", "JAX_COORDINATOR_PORT": "6002",
                   "NNODES": "2", "NODE_RANK": "1"}  # fmt: skip
    told = subprocess.run(
        ["/bin/bash", "-c", script.replace("exec python", "exec /bin/echo")],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert told.split()[-3:] == ["--coordinator=h-0.h:6002", "--process_count=2", "--process_id=1"]


@pytest.mark.parametrize("launcher", ["gke", "slurm"])
def test_a_config_that_is_not_in_the_checkout_is_refused(tools, capfd, launcher):
    tools.add("xpk", "sbatch")
    start = ("start", "head-1", *WHERE, *IMAGE, "--device-type", "v4-64", "--dry-run")
    main, start = (gke.main, start) if launcher == "gke" else (slurm.main, (*START, "--dry-run"))
    for config in ("nowhere.py", "configs", "nowhere.py:configs/h100.py"):
        assert run(main, *start, "--", f"--config={config}", "--workdir=/mnt/runs/x") == 2
        told = capfd.readouterr()
        assert f"--config={config}: there is no such file in" in told.err and not told.out
    for config in ("configs/h100.py:some", "/mnt/h100.py"):  # the hosts know what is at the latter
        assert run(main, *start, "--", f"--config={config}", "--workdir=/mnt/runs/x") == 0


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a'b", "$(NNODES)", "{x}"])
def test_gke_refuses_what_yaml_would_change(tools, capfd, value):
    tools.add("xpk")
    start = ("start", "head-1", *WHERE, *IMAGE, "--device-type", "v4-64")
    assert run(gke.main, *start, "--", *TRAINING, f"--config.name={value}") == 2
    assert "which XPK cannot carry" in capfd.readouterr().err and tools.calls == []


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--cluster", "a;b"), ("--zone", "$(x)"), ("--docker-image", "-x"), ("--docker-image", "a b"),
        ("--device-type", "v4-64; x"), ("--storage", "../x"), ("--nodes", "0"), ("--project", "A"),
    ],
)  # fmt: skip
def test_gke_refuses_names_that_are_none(tools, capfd, flag, value):
    tools.add("xpk")
    start = ("start", "head-1", *WHERE, *IMAGE, "--device-type", "v4-64", f"{flag}={value}")
    assert run(gke.main, *start, "--", *TRAINING) == 2
    assert f"argument {flag}" in capfd.readouterr().err and tools.calls == []
    assert run(gke.main, "delete", "x" * 40, *WHERE, "--yes") == 2


def test_gke_watches_over_restarts_until_the_end(tools, capfd):
    tools.add("xpk", "kubectl")
    tools.reply(
        (["logs"], [{"err": "waiting to start\n", "code": 1}, {"out": "step 1\n"}, {"out": "step 2\n"}]),
        (["get", "jobset"], [{"out": ""}, {"out": ""}, {"out": "Completed"}]),
    )  # fmt: skip
    assert run(gke.main, "watch", "head-1", *WHERE) == 0
    told = capfd.readouterr().out
    assert "no log yet" in told and told.index("step 1") < told.index("step 2")
    assert tools.calls[0] == ["xpk", "workload", "list", *PLACE, "--filter-by-job=^head-1$"]
    assert any("jobset-name=head-1" in word for word in tools.calls[1])

    tools.reply((["get", "jobset"], [{"out": "Failed"}]))
    assert run(gke.main, "watch", "head-1", *WHERE) == 1
    assert "head-1 has failed" in capfd.readouterr().err


def test_gke_deletes_after_asking(tools, capfd):
    tools.add("xpk")
    assert run(gke.main, "delete", "head-1", *WHERE) == 2 and tools.calls == []
    assert run(gke.main, "delete", "head-1", *WHERE, "--yes") == 0
    assert tools.calls == [["xpk", "workload", "delete", "--workload=head-1", *PLACE, "--force"]]
    assert "still there, and costs" in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------
# SLURM

START = ("start", "head-1", "--nodes", "4", "--gpus-per-node", "8", "--time", "24:00:00")


def test_slurm_submits_a_script_that_resumes(tools, capfd, tmp_path):
    tools.add("sbatch")
    tools.reply((["sbatch"], [{"out": "123;cluster\n"}]))
    odd = "--config.name=a b; $(touch x) 'q'"
    options = ("--partition", "gpu", "--account", "me", f"--log-dir={tmp_path / 'logs'}")
    assert run(slurm.main, *START, *options, "--dry-run", "--", *TRAINING, odd) == 0
    dry = capfd.readouterr().out
    assert tools.calls == [] and not (tmp_path / "logs").exists()

    assert run(slurm.main, *START, *options, "--", *TRAINING, odd) == 0
    (call,) = tools.calls
    assert call == [
        "sbatch", "--parsable", "--job-name=head-1", "--nodes=4", "--ntasks-per-node=1",
        "--gpus-per-node=8", "--exclusive", "--time=24:00:00", "--signal=TERM@300", "--requeue",
        "--open-mode=append", f"--output={tmp_path / 'logs'}/head-1-%j.log", "--partition=gpu",
        "--account=me",
    ]  # fmt: skip
    assert "python -m launch.slurm watch 123\n" in capfd.readouterr().out
    assert dry == f"{shlex.join(call)} <<'END'\n{tools.stdin}END\n"

    # The script as a compute node runs it.
    tools.add("srun", "scontrol", "sleep")
    for code, requeued in ((42, True), (0, False), (1, False)):
        (tools.folder / "calls.jsonl").unlink()
        tools.reply((["srun"], [{"code": code}]))
        environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "123"}
        done = subprocess.run(["/bin/bash", "-c", slurm.script((*TRAINING, odd), "python", 2)],
                              env=environment, cwd=tmp_path)  # fmt: skip
        assert done.returncode == code
        assert tools.calls[0] == [
            "srun", "--cpu-bind=none", "--kill-on-bad-exit=1", "python", "-m",
            "spinmeround_jax.train", *TRAINING, odd, "--stopped_exit_code=42",
        ]  # fmt: skip
        assert (["scontrol", "requeue", "123"] in tools.calls) == requeued
    assert not (tmp_path / "x").exists()
    assert "JAX_LOCAL_DEVICE_IDS=0,1\n" in slurm.script(TRAINING, "python", 2)


@pytest.mark.parametrize(
    "flag, value",
    [("--time", "1 day"), ("--partition", "-x"), ("--partition", "a;b"), ("--account", "$(x)"),
     ("--nodes", "-1"), ("--gpus-per-node", "two")],
)  # fmt: skip
def test_slurm_refuses_names_that_are_none(tools, capfd, flag, value):
    tools.add("sbatch")
    assert run(slurm.main, *START, f"{flag}={value}", "--", *TRAINING) == 2
    assert f"argument {flag}" in capfd.readouterr().err and tools.calls == []


def test_slurm_follows_the_log_over_requeues(tools, capfd, tmp_path, monkeypatch):
    log = tmp_path / "job.log"
    lines = iter(["step 1\n", "", "step 2\n", "", ""])

    def work(seconds):
        if seconds < 1:  # subprocess waits with it too
            return
        with log.open("a") as file:
            file.write(next(lines))

    monkeypatch.setattr("time.sleep", work)
    tools.add("squeue")
    states = ("PENDING", "RUNNING", "REQUEUED", "RUNNING", "COMPLETED")
    tools.reply((["squeue"], [{"out": f"{state:<30}{log}\n"} for state in states]))
    assert run(slurm.main, "watch", "123") == 0
    told = capfd.readouterr().out
    order = [told.index(x) for x in ("PENDING", "step 1", "REQUEUED", "step 2", "COMPLETED")]
    assert order == sorted(order) and told.count("step 1") == 1

    tools.reply((["squeue"], [{"out": f"{'FAILED':<30}{log}\n"}]))
    assert run(slurm.main, "watch", "123") == 1 and "ended as FAILED" in capfd.readouterr().err
    tools.reply(
        (["squeue"], [{"err": "slurm_load_jobs error: Invalid job id specified\n", "code": 1}])
    )
    assert run(slurm.main, "watch", "123") == 1 and "sacct --jobs=123" in capfd.readouterr().err


def test_slurm_ends_jobs_after_asking(tools, capfd):
    tools.add("scancel")
    assert run(slurm.main, "delete", "12; reboot", "--yes") == 2
    assert run(slurm.main, "delete", "123") == 2 and tools.calls == []
    assert run(slurm.main, "delete", "123", "--yes") == 0
    assert tools.calls == [["scancel", "123"]]


@pytest.mark.parametrize("main, words", [(gke.main, ("xpk",)), (slurm.main, ("login node",))])
def test_missing_tools_are_named(tools, capfd, main, words):
    call = ("delete", "head-1", *WHERE) if main is gke.main else ("delete", "123")
    assert run(main, *call, "--yes") == 127
    error = capfd.readouterr().err
    assert "is not on the PATH" in error and all(word in error for word in words)
