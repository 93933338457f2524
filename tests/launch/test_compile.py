"""The ahead-of-time report: what is read from HLO, what is counted, and a small model compiled."""

import dataclasses
import importlib.util
import json
import re
import subprocess

import jax
import pytest

from launch import chips, costs, hlo, plots, programs, scaling
from launch import compile as command
from tests.support.configs import full_config
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


PROGRAM = """
%fused_computation.1 (param: bf16[8,128]) -> f32[8,128] {
  %param = bf16[8,128]{1,0} parameter(0)
  %other = bf16[128,128]{1,0} parameter(1)
  ROOT %product = f32[8,128]{1,0} convolution(%param, %other), dim_labels=bf_io->bf
}

%fused_computation.2 (param: f32[8,128]) -> f32[8] {
  %param.1 = f32[8,128]{1,0} parameter(0)
  ROOT %sum = f32[8]{0} reduce(%param.1, %zero), dimensions={1}, to_apply=%add
}

%body (state: f32[8]) -> f32[8] {
  %state = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%state, %state), backend_config={"estimated_cycles":"5"}
}

ENTRY %main.1 (p: bf16[8,128], q: bf16[128,128]) -> f32[8] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %fusion.1 = f32[8,128]{1,0} fusion(%p, %q), kind=kOutput, calls=%fused_computation.1, \
backend_config={"estimated_cycles":"1000"}
  %copy.1 = f32[8,128]{0,1} copy(%fusion.1), backend_config={"estimated_cycles":"9223372036854775807"}
  %fusion.2 = f32[8]{0} fusion(%copy.1), kind=kLoop, calls=%fused_computation.2, \
backend_config={"estimated_cycles":"50"}
  %jvp_flash_forward_.3 = (bf16[2,40,250]{2,1,0:T(8,128)(2,1)}, f32[2,1,256]{2,1,0:T(1,128)}) \
custom-call(%p, %p, %p), custom_call_target="tpu_custom_call", \
operand_layout_constraints={bf16[2,40,256]{2,1,0}, bf16[2,40,512]{2,1,0}, bf16[2,40,512]{2,1,0}}
  %copy-start.2 = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%fusion.2)
  %copy-done.2 = f32[8]{0:S(1)} copy-done(%copy-start.2)
  %all = f32[8]{0} all-reduce(%fusion.2), replica_groups={{0,1}}, to_apply=%add
  ROOT %while.1 = f32[8]{0} while(%all), condition=%cond, body=%body
}
"""


def test_costs_are_read_from_the_text():
    found = costs.costs(PROGRAM)
    assert found == {
        "products": costs.Cost(1, 8 * 128 * (2 + 4), 1000),  # one operand lies in the core
        "copies": costs.Cost(1, 2 * 8 * 128 * 4, 0),  # the compiler does not say
        "reductions": costs.Cost(1, 8 * 128 * 4 + 32, 50),
        "kernels": costs.Cost(
            1, 2 * 40 * 256 * 2 + 2 * 256 * 4 + 3 * 2048, 0, 2 * 2 * 2 * 256 * 512 * 128
        ),
        "collectives": costs.Cost(1, 64),
        "prefetches": costs.Cost(1, 32),  # into the core's memory
        "elementwise": costs.Cost(1, 96, 5),
    }
    v4 = chips.CHIPS["v4"]
    assert found["products"].seconds(v4) == 1000 / 1.05e9
    assert found["copies"].seconds(v4) == 8192 / 1228e9
    assert found["kernels"].seconds(v4) == 8 * 256 * 512 * 128 / 275e12


def test_kernels_are_known_by_their_names():
    def flops(name, operands):
        text = PROGRAM.replace("jvp_flash_forward_", name)
        return costs.costs(re.sub("constraints=.*", operands, text))["kernels"].flops

    channels_last = "constraints={s8[1,8]{1,0}, bf16[2,256,40]{2,1,0}, bf16[2,512,40]{2,1,0}}"
    channels_first = "constraints={bf16[2,40,256]{2,1,0}, bf16[2,40,512]{2,1,0}}"
    forward = flops("flash_forward", channels_first)
    assert forward == flops("splash_mha_fwd_residuals", channels_last)
    assert flops("transpose_jvp_flash_backward", channels_first) == 5 / 2 * forward
    assert flops("splash_mha_dkv_no_residuals", channels_last) == 5 / 2 * forward


def test_of_what_a_fusion_slices_only_the_slice_is_read():
    text = """
%fused_computation (param: f32[1000,8]) -> f32[8] {
  %param = f32[1000,8]{1,0} parameter(0)
  %other = f32[8]{0} parameter(1)
  %piece = f32[1,8]{1,0} slice(%param), slice={[3:4], [0:8]}
  ROOT %sum = f32[8]{0} add(%piece, %other)
}
ENTRY %main (p: f32[1000,8], q: f32[8]) -> f32[8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  ROOT %fusion = f32[8]{0} fusion(%p, %q), kind=kLoop, calls=%fused_computation
}
"""
    assert costs.costs(text)["elementwise"].bytes == 3 * 8 * 4


def test_arrays_are_counted_with_the_padding_of_their_layout():
    assert costs._hbm_bytes("bf16[3,40]{1,0:T(8,128)(2,1)}") == 8 * 128 * 2
    assert costs._hbm_bytes("bf16[300,40]{0,1:T(8,128)(2,1)}") == 384 * 40 * 2
    assert (
        costs._hbm_bytes("(f32[2,1,256]{2,1,0:T(1,128)}, f32[]{:T(128)}, pred[5])") == 2048 + 4 + 5
    )
    assert costs._hbm_bytes("bf16[3,40]{1,0:T(8,128)(2,1)S(1)}") == 0


def test_calls_of_a_gpus_libraries_are_known():
    line = '  ROOT %x = (f32[8]{0}, s8[99]{0}) custom-call(%p), custom_call_target="__cu'
    for target, kind in {
        "blas$gemm": "products",
        "dnn$convForward": "products",
        "dnn$fmha": "kernels",
    }.items():
        text = f'ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{line}{target}"\n}}\n'
        assert costs.costs(text) == {kind: costs.Cost(1, 32 + 99 + 32)}


def test_the_largest_arrays_are_named():
    text = PROGRAM.replace("fusion(%p, %q), ", 'fusion(%p, %q), metadata={op_name="unet/down"}, ')
    first, second = hlo.largest(text, 2)
    assert first == "0.00 GiB bf16[128,128]" and second == "0.00 GiB f32[8,128] unet/down"


def test_collectives_are_read_from_the_text():
    found = hlo.collectives(HLO, 8)
    assert found == {
        "all-gather": hlo.Collectives(2, 2048 + 256, 1792 + 192),
        "all-reduce": hlo.Collectives(1, 404, 404),
        "reduce-scatter": hlo.Collectives(1, 64, 56),
        "collective-permute": hlo.Collectives(1, 40, 40),
    }


def test_forward_flops_of_the_papers_model():
    """7.30 TFLOP for 8 views, 1.86 of them attention: an independent count, see docs/scale.md."""
    assert programs.forward_flops(full_config("tpu_v4")) == pytest.approx(7.30e12, rel=0.01)


def test_flops_are_counted_through_loops_and_products():
    def f(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=3)[0] @ x[:, :5]

    jaxpr = jax.make_jaxpr(f)(jax.ShapeDtypeStruct((10, 10), "float32"))
    assert programs._flops(jaxpr.jaxpr) == 3 * 2000 + 1000


def test_topologies_and_batches_that_cannot_be_are_refused():
    assert chips.parse("v4:2x2x2") == ("v4", (2, 2, 2))
    assert chips.parse("h100:2x8") == ("h100", (2, 8))
    for text in ("v4:2x2", "v9:2x2", "v5e", "v5e:2xA", "v5e:0x4", "h100:8"):
        with pytest.raises(ValueError, match=r"expected CHIP:SHAPE|whole numbers"):
            chips.parse(text)
    config = full_config("quickstart")
    assert programs.with_batch(config, 8, 0.25).optimizer.batch_size == 2
    with pytest.raises(ValueError, match="no whole batch"):
        programs.with_batch(config, 8, 0.3)
    with pytest.raises(ValueError, match=r"configs/none.py"):
        command.load_config("configs/none.py", [])
    changed = command.load_config("configs/quickstart.py", ["--config.mesh.fsdp=4"])
    assert changed.mesh.fsdp == 4


def test_the_programs_lower_for_devices_of_here():
    """Shapes and placements fit together; what they hold is counted from the shardings."""
    config = dataclasses.replace(full_config("quickstart"), model=CONFIG)
    config = programs.with_batch(config, 1, 2)
    for cached in (True, False):
        lowered, held = programs.train_step(config, jax.devices()[:1], cached)
        assert "func.func" in lowered.as_text()
        assert held["parameters"] == held["moving average"]
        assert abs(held["optimizer state"] - 2 * held["parameters"]) < 100
        assert (held["frozen networks"] > 10_000) != cached  # the autoencoder, or one latent
    with pytest.raises(ValueError, match=r"--config.accumulation=1"):
        programs.train_step(dataclasses.replace(config, accumulation=2), jax.devices()[:1], True)
    lowered, held = programs.sampler(config, jax.devices()[:1], 2)
    assert "while" in lowered.as_text() and held["parameters"] > 0


RESULT = {
    "chip": "v4", "devices": 8, "batch_size": 8, "forward_flops": 7.3e12, "flops": 2e13, "bytes": 5e10,
    "peak": 2**34, "temporary": 2**33, "held": {"parameters": 2**30}, "steps": 50, "paper_steps": 1000,
    "encoder_flops": 0.0, "sampler": "euler", "own_batch_size": 32,
    "collectives": {"all-gather": {"count": 3, "bytes": 8 * 10**9, "sent": 7 * 10**9}},
    "costs": {
        "products": {"count": 9, "bytes": 10**10, "cycles": 105 * 10**6, "flops": 0.0},
        "kernels": {"count": 2, "bytes": 10**9, "cycles": 0, "flops": 1.65e13},
        "collectives": {"count": 3, "bytes": 10**12, "cycles": 0, "flops": 0.0},
    },
}  # fmt: skip


def test_the_report_names_what_bounds_the_step(tmp_path):
    request = {
        "config": "c.py", "topology": "v4:2x2x2", "slices": 1, "program": "train", "effort": "O0",
    }  # fmt: skip
    bound = command.times(RESULT, "train")
    assert bound["arithmetic"] == pytest.approx(3 * 7.3e12 / 275e12)
    assert bound["memory"] == pytest.approx(5e10 / 1228e9)
    assert bound["interconnect"] == pytest.approx(7e9 / 300e9)
    text = command.report(RESULT, request)
    assert "so the arithmetic bounds it: at best 100% of peak" in text
    assert "16.00 GiB of 32 at once" in text and "all-gather" in text
    hours = 4 * 1000 * bound["arithmetic"] * 8 / 3600  # four steps of 8 make the config's batch
    assert f"1,000 steps with a batch of 32 would take {hours:,.0f} chip-hours" in text
    assert "cycles" not in text  # which mean nothing at the lowest effort
    text = command.report(RESULT, {**request, "effort": "O2"})
    assert "products          100.0 ms,   10.0 GB (8.1 ms at full bandwidth)" in text
    assert (
        "kernels            60.0 ms" in text and "together          160.0 ms: 50% of peak" in text
    )
    heun = command.useful_flops({**RESULT, "sampler": "heun"}, "sample")
    assert heun == pytest.approx(2 * 99 * 7.3e12)
    slow = {**RESULT, "bytes": 5e11}
    assert "so the memory bounds it: at best 20% of peak" in command.report(slow, request)
    plots.roofline(command.points([("here", RESULT, "train")]), tmp_path / "roofline.svg")
    assert "here" in (tmp_path / "roofline.svg").read_text()


def test_scaling_puts_reports_side_by_side(tmp_path, capsys):
    paths = []
    for devices, batch, sent in ((8, 8, 7e9), (64, 16, 7e9), (64, 8, 7e9)):
        collectives = {"all-gather": {"count": 3, "bytes": 8e9, "sent": sent}}
        report = {
            **RESULT, "program": "train", "slices": 1, "mesh": {"fsdp": 8, "views": devices // batch},
            "remat": "nothing", "devices": devices, "batch_size": batch, "collectives": collectives,
            "bytes": 5e10 * batch / devices,
        }  # fmt: skip
        paths.append(tmp_path / f"{devices}-{batch}.json")
        paths[-1].write_text(json.dumps([report]))
    plot = tmp_path / "new" / "scaling.svg"
    words = [*map(str, paths), "--over=chips-per-example", f"--out={plot}"]
    assert scaling.main(words) == 0
    told = capsys.readouterr().out
    # 3 x 7.3 TFLOP at 275 TFLOP/s against 7 GB at 300 GB/s: equal at 79.6 / 23.3 chips per example.
    assert "The interconnect binds from 3.41 chips per example" in told
    assert "| 64 | v4 | 1 | 8 x 4 | nothing | 0.25 | 16.0, 8.0 | 50.0 | 3, 8.000 |" in told
    assert plot.read_text().count("<polyline") == 3
    assert scaling.main([str(paths[0])]) == 0
    assert "binds nowhere" in capsys.readouterr().out
    paths[0].write_text('[{"program": "sample"}]')
    assert scaling.main([str(paths[0])]) == 1
    assert f"{paths[0]}: no report to compare" in capsys.readouterr().err


def test_what_does_not_fit_is_named():
    words = """I0000 noise
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm. Used 40.00G of 31.75G hbm.
  1. Size: 8.00G
     Operator: op_name="jit(step)/unet/down/0/attention"
"""
    told = command.largest_arrays(words)
    assert "Used 40.00G" in told and "unet/down/0/attention" in told and "noise" not in told


def test_command_without_the_compiler_says_so(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    assert command.main(["--config=configs/quickstart.py", "--topology=v5e:2x4"]) == 1
    assert "pip install '.[tpu]'" in capsys.readouterr().err
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "cuda" in name else find(name, *a)
    )
    assert command.main(["--config=configs/quickstart.py", "--topology=h100:1x8"]) == 1
    assert "pip install '.[cuda]'" in capsys.readouterr().err


def test_what_a_gpu_cannot_hold_is_refused(monkeypatch, capsys):
    """Its compiler would make the program all the same."""
    report = {"chip": "h100", "peak": 90e9, "largest": ["44.00 GiB f32[1] unet/up"]}
    done = subprocess.CompletedProcess([], 0, stdout=f"noise\n{json.dumps(report)}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *a, **options: done)
    monkeypatch.setattr(command, "missing_compiler", lambda chip: "")
    assert command.main(["--config=configs/quickstart.py", "--topology=h100:1x8"]) == 1
    told = capsys.readouterr().out
    assert "1 example(s) per device do not fit:\n83.8 GiB at once, of 74.5" in told
    assert "44.00 GiB f32[1] unet/up" in told


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs '.[tpu]'")
def test_a_small_model_compiles_for_eight_chips(tmp_path, capsys):
    arguments = ["--config=configs/quickstart.py", "--topology=v5e:2x4", f"--out={tmp_path}"]
    assert command.main([*arguments, "--config.mesh.fsdp=4"]) == 0
    (result,) = json.loads((tmp_path / "report.json").read_text())
    gathered, scattered = (result["collectives"][kind] for kind in ("all-gather", "reduce-scatter"))
    # Each split parameter once, in the arithmetic's precision, and nothing else.
    assert gathered["count"] == scattered["count"] and gathered["bytes"] == scattered["bytes"]
    assert set(result["collectives"]) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert (tmp_path / "roofline.svg").stat().st_size > 500
    assert "v5e:2x4" in capsys.readouterr().out
