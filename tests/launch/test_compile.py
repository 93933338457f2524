"""The ahead-of-time report: collectives, FLOPs, the largest batch, and a small model compiled."""

import dataclasses
import importlib.util
import json
import subprocess

import jax
import pytest

from launch import chips, hlo, programs
from launch import compile as command
from spinmeround_jax.config import load_config
from tests.support.tiny_model import CONFIG

HLO = """
  %g = bf16[8,128]{1,0} all-gather(bf16[1,128]{1,0} %p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %s = (f32[16]{0}, f32[64]{0}) all-gather-start(f32[16]{0} %q), replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[64]{0} all-gather-done((f32[16]{0}, f32[64]{0}) %s)
  ROOT %r = (f32[100]{0}, f32[]) all-reduce(f32[100]{0} %x, f32[] %y), replica_groups={{0,1},{2,3}}
  %t = bf16[4]{0} reduce-scatter(bf16[32]{0} %z), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %c = f32[10]{0} collective-permute(f32[10]{0} %w), source_target_pairs={{0,1},{1,0}}
  %f = f32[10]{0} fusion(f32[10]{0} %all-reduce.1), kind=kLoop
"""
REQUEST = ["--config=configs/quickstart.py", "--topology=v5e:2x4"]


def test_collectives_are_read_from_the_text():
    assert hlo.collectives(HLO, 8) == {
        "all-gather": {"count": 2, "bytes": 2048 + 256},
        "all-reduce": {"count": 1, "bytes": 404},
        "reduce-scatter": {"count": 1, "bytes": 64},
        "collective-permute": {"count": 1, "bytes": 40},
    }


def test_topologies_and_batches_that_cannot_be_are_refused():
    assert chips.parse("v4:2x2x2") == ("v4", (2, 2, 2))
    assert chips.parse("h100:2x8") == ("h100", (2, 8))
    for text in ("v4:2x2", "v9:2x2", "v5e:0x4"):
        with pytest.raises(ValueError, match="expected CHIP:SHAPE"):
            chips.parse(text)
    config = load_config("configs/quickstart.py", ["--config.mesh.fsdp=4"])
    assert config.mesh.fsdp == 4
    assert programs.with_batch(config, 8, 0.25).optimizer.batch_size == 2
    with pytest.raises(ValueError, match="whole batch"):
        programs.with_batch(config, 8, 0.3)
    with pytest.raises(ValueError, match=r"configs/none.py"):
        load_config("configs/none.py", [])


@pytest.mark.parametrize("cached", [True, False])
def test_the_training_step_lowers_and_holds_what_its_shardings_say(cached):
    config = dataclasses.replace(load_config("configs/quickstart.py", []), model=CONFIG)
    program = programs.train_step(programs.with_batch(config, 1, 2), jax.devices()[:1], cached)
    assert "func.func" in program.step.lower(program.state, program.frozen, program.batch).as_text()
    held = program.held()
    assert held["parameters"] == held["moving average"]
    assert abs(held["optimizer state"] - 2 * held["parameters"]) < 100
    assert (held["frozen networks"] > 10_000) != cached  # the autoencoder, or one latent


def test_the_sampler_lowers():
    config = dataclasses.replace(load_config("configs/quickstart.py", []), model=CONFIG)
    lowered, held = programs.sampler(config, jax.devices()[:1], 2)
    assert "while" in lowered.as_text() and held["parameters"] > 0


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 8, 11])
def test_the_largest_batch_is_found(limit):
    tried = []

    def fits(examples):
        tried.append(examples)
        return examples <= 0.25 * limit

    assert command.largest(fits, 0.25) == 0.25 * limit
    assert len(tried) == len(set(tried))


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for the child process: `compiler(returncode, stdout, stderr)`."""
    monkeypatch.setattr(command, "check_compiler", lambda chip: None)

    def answer(returncode=0, stdout="", stderr=""):
        done = subprocess.CompletedProcess([], returncode, stdout=stdout, stderr=stderr)
        monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)

    return answer


def test_a_program_that_does_not_fit_is_reported(compiler, capsys):
    words = """I0000 noise
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm. Used 40.00G of 31.75G hbm.
  1. Size: 8.00G
     Operator: op_name="jit(step)/unet/down/0/attention"
"""
    compiler(1, stderr=words)
    assert command.main(REQUEST) == 1
    printed = capsys.readouterr().out
    assert "do not fit" in printed and "Used 40.00G" in printed and "noise" not in printed
    assert "unet/down/0/attention" in printed

    # The compiler for GPUs makes the program all the same.
    compiler(0, stdout=json.dumps({"topology": "h100:1x8", "memory": 90e9}))
    assert command.main(["--config=configs/quickstart.py", "--topology=h100:1x8"]) == 1
    assert "83.8 GiB of 74.5" in capsys.readouterr().out


def test_a_compiler_that_is_missing_or_fails_is_one_error(compiler, capsys, monkeypatch):
    compiler(-11)
    assert command.main(REQUEST) == 1
    assert "--effort=O2" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None)
    for topology, extra in (("v5e:2x4", "tpu"), ("h100:1x8", "cuda")):
        assert command.main([REQUEST[0], f"--topology={topology}"]) == 1
        assert f"pip install '.[{extra}]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs '.[tpu]'")
def test_a_small_model_compiles_for_eight_chips(tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    assert command.main([*REQUEST, "--config.mesh.fsdp=4", f"--out={out}"]) == 0
    (result,) = json.loads(out.read_text())
    gathered, scattered = (result["collectives"][kind] for kind in ("all-gather", "reduce-scatter"))
    # Each split parameter once, in the arithmetic's precision, and nothing else.
    assert gathered == scattered
    assert set(result["collectives"]) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert result["memory"] > sum(result["held"].values()) and result["bytes"] > 0
    assert "v5e:2x4" in capsys.readouterr().out
