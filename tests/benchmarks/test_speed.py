"""The benchmarks of speed on a small model: their figures are consistent, and PyTorch computes the same."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import measuring, sampler, train_step
from launch import programs
from spinmeround_jax.config import load_config
from spinmeround_jax.models import parameters
from spinmeround_jax.training import flops
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
    "--config.train_identity_encoder=False",
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


def small_config():
    return load_config(SMALL[0].partition("=")[2], SMALL[1:])


def report(command, tmp_path, *arguments):
    path = tmp_path / "report.json"
    assert command.main([*SMALL, *arguments, "--repeats", "2", "--out", str(path)]) == 0
    return json.loads(path.read_text())


def test_train_step_from_images_and_its_largest_operations(tmp_path, capsys):
    write_dataset(tmp_path / "data", subjects=2, views=16, shards=1)
    here = ["--data", str(tmp_path / "data"), "--config.data.max_frontal_yaw=180"]
    found = report(train_step, tmp_path, *here, "--profile")
    assert found["batch"] == {"examples": 1, "views": 8, "images": True}
    speed = found["speed"]
    assert speed["flops"] == 3 * flops.of_unet(small_config()) + flops.of_encoder(small_config())
    seconds = found["seconds_per_step"]["as trained"]
    assert speed["flops_per_second"] == pytest.approx(speed["flops"] / seconds)
    shares = [operation["share"] for operation in found["operations"]]
    assert 0 < len(shares) <= 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 1.001

    assert "speed, mfu" in capsys.readouterr().out
    assert train_step.main([*SMALL, *here, "--config.model.image_size=32"]) == 1
    assert f"images of {SIZE} pixels" in capsys.readouterr().err


def test_what_the_network_sees_is_what_the_step_computes():
    """With F = 0 the mean square of the target is the loss, which only the right draws give."""
    training = train_step.prepare(programs.with_batch(small_config(), 1, 2), images=False)
    values = training.state.params["unet"]
    for name in ("conv_out/kernel", "conv_out/bias"):
        values[name] = jnp.zeros_like(values[name])
    problem = train_step.what_the_network_sees(training)
    training.run_to_end(training.place(training.batch))
    targets = problem["target"][~problem["observed"]]
    assert float(training.metrics["loss"]) == pytest.approx(np.mean(targets**2), rel=1e-4)


def test_sampler_compiles_in_the_first_call_only(tmp_path):
    found = report(sampler, tmp_path, "--views", "8")
    first, *later = found["compilations"]
    assert first > 0 and later == [0, 0]
    assert found["view_evaluations"]["anchors"] == 8 * 2  # views, steps


@needs_torch
@pytest.mark.parametrize("command", [train_step, sampler])
def test_pytorch_computes_the_same_or_nothing_is_timed(command, tmp_path, capsys, monkeypatch):
    from benchmarks import torch_unet

    views = ["--views", "4", "--groups", "2", "--config.sampling.guidance_scale=2.0"]
    more = views if command is sampler else []
    found = report(command, tmp_path, "--against", "torch", *more)
    found = found.get("against", found)
    ours, torch = (found["rounds"][name]["wall"] for name in ("jax", "torch"))
    expected = np.median(np.divide(torch, ours))
    assert found["torch_over_jax"]["wall"]["median"] == pytest.approx(expected)

    plain = torch_unet.tensors
    monkeypatch.setattr(
        torch_unet,
        "tensors",
        lambda network, values: {n: 1.1 * x for n, x in plain(network, values).items()},
    )
    assert command.main([*SMALL, *more, "--against", "torch", "--repeats", "1"]) == 1
    assert "they are not the same" in capsys.readouterr().err


def test_bad_input_is_one_error(capsys, tmp_path, monkeypatch):
    assert train_step.main(["--config=nowhere.py"]) == 1
    assert "nowhere.py" in capsys.readouterr().err
    assert sampler.main([*SMALL, "--checkpoint", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: None)
    assert train_step.main([*SMALL, "--against", "torch"]) == 1
    assert "pip install '.[parity]'" in capsys.readouterr().err
    for wrong in (["--repeats", "0"], ["--nonsense"]):
        with pytest.raises(SystemExit):
            train_step.main([*SMALL, *wrong])


def test_cases_take_turns():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in ("jax", "torch")}
    found = measuring.compare(cases, 3, "test")
    assert calls == ["jax", "torch"] * 3
    assert [len(rounds["wall"]) for rounds in found["rounds"].values()] == [3, 3]


def test_random_parameters_keep_the_scale_of_activations():
    graphdef, shapes = parameters.split(programs.networks(small_config())["unet"])
    values = measuring.random_parameters(shapes)
    assert not parameters.mismatches(shapes, values)
    model, rng = small_config().model, np.random.default_rng(1)
    size, tokens = model.latent_size, model.identity.context_length
    shapes = ((1, 8, size, size, model.unet.in_channels), (1,), (1, tokens, model.unet.context_dim))
    x, c_noise, context = (rng.standard_normal(shape, np.float32) for shape in shapes)
    out = jax.jit(lambda v: parameters.merge(graphdef, v)(x, c_noise, context))(values)
    assert 0.1 < float(out.std()) < 10
