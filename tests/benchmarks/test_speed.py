"""The benchmarks of speed run on a small model, and what they say follows from what they measured."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import forward, measuring, sampler, train_step
from launch import chips, programs
from launch.compile import load_config
from spinmeround_jax import sharding, train
from spinmeround_jax.models import parameters
from tests.support.synthetic_shards import SIZE, write_dataset

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = [
    "--config=configs/quickstart.py",
    f"--config.model.image_size={SIZE}",
    "--config.model.unet.model_channels=8",
    "--config.model.unet.channel_mult=(1,)",
    "--config.model.unet.attention_levels=(0,)",
    "--config.model.unet.joint_levels=(0,)",
    "--config.model.unet.heads=2",
    "--config.model.unet.norm_groups=4",
    "--config.model.autoencoder.channels=8",
    "--config.train_identity_encoder=True",
    "--config.sampling.steps=2",
    "--config.sampling.guidance_scale=1.0",
    "--config.sampling.normals_steps=2",
]
needs_torch = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "diffusers")),
    reason="needs torch and diffusers, of the extra [parity]",
)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    monkeypatch.setattr(measuring, "_MATRIX", 64)


def report(command, tmp_path, capsys, *arguments):
    path = tmp_path / "report.json"
    assert command.main([*SMALL, *arguments, "--repeats", "2", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(line.startswith("|") for line in printed.splitlines())
    return json.loads(path.read_text())


def test_forward(tmp_path, capsys):
    told = report(forward, tmp_path, capsys, "--examples", "2")
    flops = 2 * programs.forward_flops(load_config(SMALL[0].partition("=")[2], SMALL[1:]))
    assert told["flops"] == flops
    assert len(told["measured"]["jax"]) == 2
    wall = np.median([round_["wall"] for round_ in told["measured"]["jax"]])
    assert told["jax_flops_per_second"] == pytest.approx(flops / wall)
    assert told["memory"]["program"] > 4 * 2 * 8 * 2 * 2 * 153  # the input at least
    assert told["machine"]["jax"] == jax.__version__


def test_train_step(tmp_path, capsys):
    told = report(train_step, tmp_path, capsys, "--examples", "2")
    assert told["batch"] == {"examples": 2, "views": 8, "pictures": False}
    seconds = told["seconds_per_step"]
    assert seconds["step"]["median"] > seconds["loader"]["median"]  # it is handed the same batch
    assert told["examples_per_second"] == pytest.approx(2 / seconds["as trained"])
    assert told["mfu"] == pytest.approx(told["flops_per_second"] / told["peak_flops"])


def test_train_step_with_the_real_loader(tmp_path, capsys):
    write_dataset(tmp_path / "data", subjects=2, views=16, shards=1)
    here = ["--data", str(tmp_path / "data"), "--config.data.max_frontal_yaw=180"]
    told = report(train_step, tmp_path, capsys, *here)
    assert told["batch"]["pictures"]
    assert told["seconds_per_step"]["loader"]["least"] > 0
    config = load_config("configs/quickstart.py", SMALL[1:])
    forward_flops = 3 * programs.forward_flops(config)
    assert told["flops_per_step"] == forward_flops + programs.encoder_flops(config)
    assert train_step.main([*SMALL, *here, "--config.model.image_size=32"]) == 1
    assert f"pictures of {SIZE} pixels, the config says 32" in capsys.readouterr().err


def test_what_the_network_sees_is_what_the_step_computes():
    """With F = 0 the mean square of the target is the loss, which only the right draws give."""
    config = load_config(
        "configs/quickstart.py", [*SMALL[1:], "--config.train_identity_encoder=False"]
    )
    training = train_step.prepare(programs.with_batch(config, 1, 2), pictures=False)
    values = training.state.params["unet"]
    for name in ("conv_out/kernel", "conv_out/bias"):
        values[name] = jnp.zeros_like(values[name])
    problem = train_step.what_the_network_sees(training)
    training.run_to_end(sharding.global_batch(training.mesh, training.batch))
    unseen = problem["target"][~problem["observed"]]
    assert float(training.metrics["loss"]) == pytest.approx(np.mean(unseen**2), rel=1e-4)


def test_sampler(tmp_path, capsys):
    told = report(sampler, tmp_path, capsys, "--views", "8")
    assert told["compilations"][0] > 0
    assert told["compilations"][1:] == [0, 0]
    assert told["evaluations"]["anchors"] == 8 * 2  # views, steps; quickstart has no guidance
    assert told["seconds_per_head"] == told["later_call_seconds"]["median"]
    assert set(told["step_seconds"]) == {"normals", "anchors", "decoding"} | set(
        told["evaluations"]
    )


@needs_torch
@pytest.mark.parametrize("command", [forward, train_step, sampler])
def test_against_torch(command, tmp_path, capsys):
    views = ["--views", "4", "--groups", "2", "--config.sampling.guidance_scale=2.0"]
    more = views if command is sampler else []
    told = report(command, tmp_path, capsys, "--against", "torch", *more)
    told = told.get("against", told)
    pairs = zip(told["measured"]["jax"], told["measured"]["torch"], strict=True)
    expected = np.median([theirs["wall"] / ours["wall"] for ours, theirs in pairs])
    assert told["torch_over_jax"]["wall"]["median"] == pytest.approx(expected)


@needs_torch
def test_other_weights_are_not_timed(tmp_path, capsys, monkeypatch):
    from benchmarks import torch_unet

    plain = torch_unet.tensors

    def spoilt(network, values):
        return {name: 1.1 * value for name, value in plain(network, values).items()}

    monkeypatch.setattr(torch_unet, "tensors", spoilt)
    for command in (forward, train_step, sampler):
        assert command.main([*SMALL, "--against", "torch", "--repeats", "1"]) == 1
        assert "they are not the same" in " ".join(capsys.readouterr().err.split())


def test_without_torch_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: None)
    assert forward.main([*SMALL, "--against", "torch"]) == 1
    assert "pip install '.[parity]'" in capsys.readouterr().err


def test_bad_arguments_are_one_error(capsys, tmp_path):
    assert forward.main(["--config=nowhere.py"]) == 1
    assert "nowhere.py" in capsys.readouterr().err
    assert train_step.main([*SMALL, "--config.mesh.fsdp=3"]) == 1
    assert "does not divide" in capsys.readouterr().err
    assert sampler.main([*SMALL, "--checkpoint", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    for wrong in (["--repeats", "0"], ["--nonsense"]):
        with pytest.raises(SystemExit):
            forward.main([*SMALL, *wrong])


def test_turns_and_ratios():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    measured = measuring.in_turns(cases, 3, "test")
    assert "".join(calls) == "ababab"
    assert [len(rounds) for rounds in measured.values()] == [3, 3]
    ours = [{"wall": 1.0, "processor": 2.0}, {"wall": 2.0, "processor": 2.0}]
    theirs = [{"wall": 3.0, "processor": 1.0}, {"wall": 2.0, "processor": 1.0}]
    found = measuring.ratios(ours, theirs)
    assert found["wall"] == {"median": 2.0, "least": 1.0, "largest": 3.0}
    assert found["processor"]["median"] == 0.5


def test_random_parameters_keep_the_signal_alive():
    network = nnx.eval_shape(
        lambda: train.new_model(load_config("configs/quickstart.py", SMALL[1:])).unet
    )
    graphdef, shapes = parameters.split(network)
    values = measuring.random_parameters(shapes)
    assert not parameters.mismatches(shapes, values)
    config = load_config("configs/quickstart.py", SMALL[1:])
    x, c_noise, context = forward.draw_inputs(config, 1)
    out = jax.jit(lambda v: parameters.merge(graphdef, v)(x, c_noise, context))(values)
    assert 0.1 < float(out.std()) < 10


def test_known_devices_have_peaks():
    assert chips.of_device("TPU v5 lite") == chips.CHIPS["v5e"]
    assert chips.of_device("cpu") is None
    flops, of_what = measuring.peak_flops("float32")
    assert flops > 0 and "64 x 64" in of_what and not math.isnan(flops)
