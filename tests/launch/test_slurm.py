"""SLURM: the job that is submitted, and its script as a compute node runs it, with stand-in tools."""

import os
import shlex
import subprocess

import pytest

from launch import slurm
from tests.support.launch_tools import fake_tools, run  # noqa: F401

JOB = ("head-1", "--nodes", "4", "--gpus-per-node", "2", "--time", "24:00:00")
TRAINING = (
    "--config=configs/h100.py", "--workdir=/mnt/runs/h100", "--config.name=a b; $(touch x) 'q'"
)  # fmt: skip


def test_a_job_is_submitted_and_its_dry_run_shows_the_same(tools, capfd, tmp_path):
    tools.add("sbatch")
    tools.reply((["sbatch"], [{"out": "123;cluster\n"}]))
    options = ("--partition", "gpu", f"--log-dir={tmp_path / 'logs'}")
    assert run(slurm.main, *JOB, *options, "--dry-run", "--", *TRAINING) == 0
    dry = capfd.readouterr().out
    assert tools.calls == [] and not (tmp_path / "logs").exists()

    assert run(slurm.main, *JOB, *options, "--", *TRAINING) == 0
    (call,) = tools.calls
    assert dry.startswith(f"{shlex.join(call)} <<'END'\n{tools.stdin}END\n")
    wanted = {"--nodes=4", "--gpus-per-node=2", "--time=24:00:00", "--requeue", "--partition=gpu"}
    assert wanted <= set(call)
    assert "scancel 123" in capfd.readouterr().out


@pytest.mark.parametrize("code, requeued", [(42, True), (0, False), (1, False)])
def test_a_stopped_training_is_queued_again(tools, tmp_path, code, requeued):
    tools.add("srun", "scontrol", "sleep")
    tools.reply((["srun"], [{"code": code}]))
    done = subprocess.run(
        ["/bin/bash", "-c", slurm.script(TRAINING, "python", 2)],
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "123"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code
    assert set(TRAINING) <= set(tools.calls[0]) and not (tmp_path / "x").exists()
    assert (["scontrol", "requeue", "123"] in tools.calls) == requeued


def test_bad_input_is_one_error(tools, capfd):
    assert run(slurm.main, *JOB, "--", *TRAINING) == 127
    assert "sbatch is not on the PATH" in capfd.readouterr().err
    tools.add("sbatch")
    assert run(slurm.main, *JOB, "--nodes=0", "--", *TRAINING) == 2
    assert "--nodes" in capfd.readouterr().err
    assert run(slurm.main, *JOB, "--", "--config=nowhere.py", "--workdir=/mnt/x") == 2
    assert "nowhere.py" in capfd.readouterr().err and tools.calls == []
