"""The conversion command on small networks: what it writes, and what it refuses."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import re
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from spinmeround_jax import checkpoints, convert, sample, train
from spinmeround_jax.files import InputError
from spinmeround_jax.models import (
    AutoencoderConfig,
    ModelConfig,
    MultiViewUNet,
    UNetConfig,
    parameters,
)
from spinmeround_jax.weights import diffusers, mapping, released, sources
from tests.support import reference_weights, tiny_model
from tests.support.loading import load

CONFIG = ModelConfig(
    image_size=16,
    views=4,
    latent_mean=(),
    latent_std=(),
    rays="released",
    normals_frame="world",
    unet=UNetConfig(
        model_channels=8, channel_mult=(1, 2), res_blocks=1, attention_levels=(0, 1),
        joint_levels=(1,), heads=2, context_dim=512, norm_groups=4,
    ),
    autoencoder=AutoencoderConfig(channels=8, channel_mult=(1, 2), res_blocks=1, norm_groups=4),
    identity=tiny_model.CONFIG.identity,
)  # fmt: skip
NETWORKS = convert.networks_of(CONFIG)

# Compiling takes most of the time here: LLVM's optimizations would double it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def run(*arguments):
    return convert.main([str(argument) for argument in arguments], CONFIG)


def named(folder):
    """Parameters of the model in `folder`, "unet/conv_in/kernel"."""
    model = checkpoints.load_model(folder)
    return {
        f"{network}/{name}": np.asarray(value)
        for network in NETWORKS
        for name, value in parameters.split(getattr(model, network))[1].items()
    }


def is_untouched(folder):
    """Whether a failed conversion to folder/model or to folder/new/model left no trace."""
    return not any(path.is_dir() for path in folder.iterdir())


@pytest.fixture(scope="module")
def weights():
    """Complete set of tensors in the names of the release."""
    shapes = {}
    for module in NETWORKS.values():
        shapes |= mapping.source_shapes(released.targets(module))
    return reference_weights.state_dict(shapes)


@pytest.fixture(scope="module")
def expected(weights):
    """Our parameters for `weights`, without the command."""
    found = {}
    for network, module in convert.networks_of(CONFIG).items():
        targets = released.targets(module)
        load(module, targets, {name: weights[name] for name in targets})
        for name, value in parameters.split(module)[1].items():
            found[f"{network}/{name}"] = np.asarray(value)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# --------------------------------------------------------------------------------------------------
# The release


def test_a_released_file_becomes_a_model(tmp_path, weights, expected, capsys):
    path = tmp_path / "spmr.safetensors"
    unused = {
        "model_ema.diffusion_modelconv": np.zeros(3, np.float32),
        f"{released.IDENTITY_PREFIX}text_model.embeddings.position_ids": np.arange(7)[None],
    }
    save_file({**weights, **unused}, path)
    assert run("--released", path, "--out", tmp_path / "deep" / "model") == 0
    folder = tmp_path / "deep" / "model"
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert checkpoints.load_model(folder).config == CONFIG
    assert_same(named(folder), expected)

    provenance = checkpoints.read_provenance(folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    [source] = provenance["sources"]
    assert (source["file"], source["sha256"]) == ("spmr.safetensors", digest)
    assert source["unused"] == {"model_ema.*": 1, "*.embeddings.position_ids": 1}
    assert (provenance["dtype"], provenance["kind"]) == ("float32", "released weights")
    assert str(tmp_path) not in (folder / "model.json").read_text()
    told = capsys.readouterr().out
    assert f"SHA-256 {digest}" in told and "left out: 1 x model_ema.* (moving average" in told

    # `sample` says so before it reads its inputs.
    (tmp_path / "broken.png").write_bytes(b"no image")
    options = (
        "--checkpoint",
        folder,
        "--input",
        tmp_path / "broken.png",
        "--out",
        tmp_path / "out",
    )
    assert sample.main([str(option) for option in options]) != 0
    assert f"from spmr.safetensors, SHA-256 {digest}\n" in capsys.readouterr().out


def write_shards(path, weights):
    """The index `path` and its two files of weights."""
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({n: weights[n] for n in weights if where[n] == file}, path.with_name(file))
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return where


def test_weights_in_several_files(tmp_path, weights, expected):
    path = tmp_path / "model.safetensors.index.json"
    where = write_shards(path, weights)
    assert run("--released", path, "--out", tmp_path / "model") == 0
    assert_same(named(tmp_path / "model"), expected)
    [source] = checkpoints.read_provenance(tmp_path / "model")["sources"]
    assert source["file"] == path.name
    assert [part["file"] for part in source["shards"]] == sorted(set(where.values()))
    parts = [
        hashlib.sha256((tmp_path / p["file"]).read_bytes()).hexdigest() for p in source["shards"]
    ]
    assert [part["sha256"] for part in source["shards"]] == parts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, where: (path.parent / "part-1.safetensors").unlink(), "part-1.safetensors: no such"),
        (lambda path, where: path.write_text("{}"), "'weight_map' missing"),
        (lambda path, where: path.write_text('{"weight_map": {"a": "../b.ckpt"}}'), "expected a string"),
        (
            lambda path, where: path.write_text(
                json.dumps({"weight_map": {**where, "more": "part-0.safetensors"}})
            ),
            "part-0.safetensors: more is not in it",
        ),
        (lambda path, where: (path.parent / "part-0.safetensors").write_bytes(LFS), "a Git LFS pointer"),
    ],
)  # fmt: skip
def test_weights_in_several_files_that_do_not_fit(tmp_path, weights, capsys, damage, message):
    path = tmp_path / "model.safetensors.index.json"
    damage(path, write_shards(path, weights))
    assert run("--released", path, "--out", tmp_path / "model") == 1
    assert message in capsys.readouterr().err and is_untouched(tmp_path)


def test_damaged_provenance_is_named(tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    folder = tmp_path / "model"
    assert run("--released", tmp_path / "a.safetensors", "--out", folder) == 0
    description = json.loads((folder / "model.json").read_text())
    description["provenance"]["sources"] = ["a"]
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="damaged, provenance"):
        checkpoints.origins(folder)


def rounded(weights, dtype):
    return {name: tensor.astype(dtype) for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("given", "options", "stored"),
    [
        (np.float16, (), "float16"),
        (np.float32, ("--dtype", "float16"), "float16"),
        (ml_dtypes.bfloat16, (), "float32"),
    ],
)
def test_precision_is_kept_unless_asked(tmp_path, weights, expected, given, options, stored):
    path = tmp_path / "a.safetensors"
    save_file(rounded(weights, given), path)
    assert run("--released", path, "--out", tmp_path / "model", *options) == 0
    assert checkpoints.read_provenance(tmp_path / "model")["dtype"] == stored
    narrow = given if given is not np.float32 else np.float16
    assert_same(
        named(tmp_path / "model"),
        {k: v.astype(narrow).astype(np.float32) for k, v in expected.items()},
    )


def integers(tensors):
    tensors[CONV_IN] = tensors[CONV_IN].astype(np.int8)


def not_finite(tensors):
    tensors[CONV_IN] = np.full_like(tensors[CONV_IN], np.nan)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda t: t.pop(CONV_IN), (), rf"1 missing: {CONV_IN}"),
        (lambda t: t.update({"lora.x": np.zeros(1)}), (), "1 unknown: lora.x"),
        (lambda t: t.update({CONV_IN: t[CONV_IN][:, :4].copy()}), (), r"is \(8, 4, 3, 3\), expected"),
        (integers, (), f"{CONV_IN} is I8"),
        (not_finite, (), f"{CONV_IN} is not finite as float32"),
        (lambda t: t.update({CONV_IN: t[CONV_IN] * 1e6}), ("--dtype", "float16"), "as float16"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tmp_path, weights, capsys, damage, options, message):
    tensors = dict(weights)
    damage(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    assert run("--released", tmp_path / "a.safetensors", "--out", tmp_path / "model", *options) == 1
    error = capsys.readouterr().err
    assert message.replace("\\", "") in error and "a.safetensors" in error
    assert is_untouched(tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5136\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", None, "no such file"),
        ("a.safetensors", b"", "empty, get the file again"),
        ("a.ckpt", b"", "empty, get the file again"),
        ("a.safetensors", b"\x10" * 200, "not safetensors, or damaged at its beginning"),
        ("a.ckpt", b"\x10" * 200, "not a PyTorch file, or damaged at its beginning"),
        ("a.ckpt", LFS, "a Git LFS pointer"),
        ("a.safetensors", LFS, "a Git LFS pointer"),
        ("a.pt", b"\xef\xbb\xbf\n<!DOCTYPE html><p>log in", "a web page"),
        ("a.safetensors", b'<?xml version="1.0"?><Error>AccessDenied', "a web page"),
        ("a.bin", b'{"error": "gated"}', "JSON text"),
        ("a.ckpt", b"\x1f\x8b\x08" + bytes(40), "compressed"),
        ("a.pth", b"\x89HDF\r\n", "an HDF5 file"),
        ("a.safetensors", bytes(600), "begins with nothing but zeros"),
        ("a.safetensors", "half", "damaged or not safetensors"),
        ("a.onnx", b"1234", "expected a file ending in .ckpt, .safetensors"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, weights, capsys, name, content, message):
    path = tmp_path / name
    if content == "half":
        save_file(weights, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content is not None:
        path.write_bytes(content)
    assert run("--released", path, "--out", tmp_path / "model") == 1
    assert f"{path}: {message}" in capsys.readouterr().err
    assert is_untouched(tmp_path)


@pytest.mark.parametrize(
    ("package", "name", "content"),
    [("torch", "a.ckpt", b"PK\x03\x04"), ("safetensors", "a.ckpt", b"\2" + bytes(7) + b"{}")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, package, name, content):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(content)
    assert run("--released", tmp_path / name, "--out", tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert f"needs {package}" in error and "pip install 'spinmeround_jax[convert]'" in error


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--sd15", "a"),
        ("--arc2face", "a"),
        ("--released", "a", "--sd15", "b", "--arc2face", "c"),
        ("--released", "a", "--arc2face", "c"),
        ("--released", "a", "--run", "b"),
        ("--released", "a", "--step", "3"),
    ],
)
def test_what_to_convert_is_said_once(tmp_path, capsys, arguments):
    assert run(*arguments, "--out", tmp_path / "model") == 2
    assert re.search(r"(give --released FILE,|need) (--run DIR)", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------
# The folder written


@pytest.fixture
def source(tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_model_is_replaced_only_on_demand(tmp_path, source, capsys):
    out = tmp_path / "model"
    out.mkdir()  # an empty folder is in nobody's way
    assert run("--released", source, "--out", out) == 0
    before = (out / "model.json").stat().st_mtime_ns
    assert run("--released", source, "--out", out) == 2
    assert "there is a model; --overwrite replaces it" in capsys.readouterr().err
    assert (out / "model.json").stat().st_mtime_ns == before
    assert run("--released", source, "--out", out, "--overwrite") == 0
    assert (out / "model.json").stat().st_mtime_ns > before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "model"]


def test_other_things_are_never_replaced(tmp_path, source, capsys):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert run("--released", source, "--out", out, "--overwrite") == 2
    assert run("--released", source, "--out", out / "thesis.tex", "--overwrite") == 2
    assert run("--released", source, "--out", out / "thesis.tex" / "deeper") == 2
    assert (out / "thesis.tex").read_text() == "years of work"
    assert run("--released", source, "--out", "/", "--overwrite") == 2
    assert capsys.readouterr().err.count("error: --out") == 4


def test_an_interrupted_conversion_leaves_the_old_model(tmp_path, source, monkeypatch, capsys):
    out = tmp_path / "model"
    assert run("--released", source, "--out", out) == 0
    before = named(out)
    write = checkpoints.save_weights

    def interrupted(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_weights", interrupted)
    assert run("--released", source, "--out", out, "--overwrite") == 130
    assert run("--released", source, "--out", tmp_path / "new") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "model"]
    assert_same(named(out), before)


def test_what_a_killed_conversion_left_is_cleared(tmp_path, source):
    out = tmp_path / "model"
    assert run("--released", source, "--out", out) == 0
    partial, old = tmp_path / ".model.1.unfinished", tmp_path / ".model.replaced"
    partial.mkdir()
    (partial / "weights").write_text("half")
    out.rename(old)  # killed between the two renames
    assert run("--released", source, "--out", out) == 2  # the old model is back, and is there
    assert (out / "model.json").is_file() and not old.exists()
    old.mkdir()  # killed after both renames
    (old / "model.json").write_text("older")
    assert run("--released", source, "--out", out, "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "model"]


def test_a_full_disk_is_told_beforehand(tmp_path, source, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda folder: usage)
    assert run("--released", source, "--out", tmp_path / "model") == 2
    assert "GiB are needed and 0.0 GiB are free" in capsys.readouterr().err
    assert is_untouched(tmp_path)


# --------------------------------------------------------------------------------------------------
# Stable Diffusion and Arc2Face


def renamed(network, old=False, prefix=""):
    """Random tensors in the names and shapes of diffusers and transformers."""
    table = diffusers.targets(NETWORKS[network], [".proj_attn."] if old else [])
    shapes = {prefix + name: shape for name, shape in mapping.source_shapes(table).items()}
    return reference_weights.state_dict(shapes)


@pytest.fixture
def folders(tmp_path):
    """Both downloads, as they are published: half precision UNet, transformers 4 names."""
    sd15, arc2face = tmp_path / "sd15", tmp_path / "arc2face"
    for folder in (sd15 / "vae", arc2face / "arc2face", arc2face / "encoder"):
        folder.mkdir(parents=True)
    save_file(renamed("autoencoder", old=True), sd15 / "vae/diffusion_pytorch_model.safetensors")
    unet = rounded(renamed("unet"), np.float16)
    save_file(unet, arc2face / "arc2face/diffusion_pytorch_model.safetensors")
    text = renamed("identity", prefix="text_model.")
    text["text_model.embeddings.position_ids"] = np.arange(7)[None]
    save_file(text, arc2face / "encoder/model.safetensors")
    return sd15, arc2face


@pytest.fixture
def initial(tmp_path, folders):
    sd15, arc2face = folders
    out = tmp_path / "init"
    assert run("--sd15", sd15, "--arc2face", arc2face, "--out", out) == 0
    return out


def test_training_starts_from_an_initialisation(initial):
    run = types.SimpleNamespace(init_from=str(initial), compute_dtype="bfloat16", model=CONFIG)
    kernel = train.load_pretrained(run).identity.layers[0].mlp_1.kernel[...]
    given = renamed("identity", prefix="text_model.")["text_model.encoder.layers.0.mlp.fc1.weight"]
    np.testing.assert_array_equal(kernel, given.T)


def test_an_initialisation_names_its_three_files(initial):
    provenance = checkpoints.read_provenance(initial)
    assert provenance["kind"] == "initialisation for training"
    assert {tuple(source["networks"]) for source in provenance["sources"]} == {
        ("autoencoder",), ("unet",), ("identity",)
    }  # fmt: skip
    assert len(checkpoints.origins(initial)) == 3
    assert provenance["dtype"] == "float32"


def test_new_channels_start_at_zero_and_the_others_as_they_were(initial):
    found, given = named(initial), renamed("unet")
    kernel = given["conv_in.weight"].astype(np.float16).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found["unet/conv_in/kernel"][:, :, :4], kernel)
    kernel = given["conv_out.weight"].astype(np.float16).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found["unet/conv_out/kernel"][..., :4], kernel)
    for name, channels in (("conv_in/kernel", (2, 149)), ("conv_out/kernel", (3, 4))):
        axis, count = channels
        added = np.moveaxis(found[f"unet/{name}"], axis, 0)[4:]
        assert len(added) == count and not added.any()
    assert not found["unet/conv_out/bias"][4:].any()


def test_the_grown_network_begins_as_the_given_one(initial):
    """One view: four channels in and out of the given UNet; ours sees any rays, mask and normals."""
    small = dataclasses.replace(CONFIG.unet, in_channels=4, out_channels=4)
    given = nnx.eval_shape(lambda: MultiViewUNet(small, rngs=nnx.Rngs(0)))
    load(given, diffusers.targets(given, ()), rounded(renamed("unet"), np.float16))
    grown = checkpoints.load_model(initial).unet

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1, 4, 4, 153), dtype=np.float32)
    c_noise = rng.standard_normal(2, dtype=np.float32)
    context = rng.standard_normal((2, 7, 512), dtype=np.float32)
    apply = quick_jit(lambda unet, *inputs: unet(*inputs))
    before, after = apply(given, x[..., :4], c_noise, context), apply(grown, x, c_noise, context)
    assert np.std(before) > 0.1
    np.testing.assert_allclose(after[..., :4], before, atol=1e-5)
    assert not np.asarray(after[..., 4:]).any()

    # And they are seen as soon as training moves them.
    grown.conv_in.kernel[...] = jnp.maximum(grown.conv_in.kernel[...], 1e-3)
    moved = apply(grown, x, c_noise, context)
    assert np.abs(moved - after)[..., :4].max() > 1e-3


def test_published_variants_of_the_files_give_the_same_model(tmp_path, folders, initial):
    """All of Stable Diffusion in one file, newer attention names; transformers 5 names."""
    _, arc2face = folders
    expected = named(initial)
    ours = {name: target for name, target in released.targets(NETWORKS["autoencoder"]).items()}
    by_name = {
        target.name: renamed("autoencoder", old=True)[name]
        for name, target in diffusers.targets(NETWORKS["autoencoder"], [".proj_attn."]).items()
    }
    one = {name: by_name[target.name].reshape(target.source_shape) for name, target in ours.items()}
    one |= {
        "model.diffusion_model.time_embed.0.bias": np.zeros(2, np.float32),
        "cond_stage_model.transformer.x": np.zeros(2, np.float32),
        "sqrt_one_minus_alphas_cumprod": np.zeros(1000, np.float32),
        "betas": np.zeros(1000, np.float32),
    }
    save_file(one, tmp_path / "v1-5-pruned.safetensors")
    text = arc2face / "encoder/model.safetensors"
    tensors = renamed("identity", prefix="text_model.")
    save_file({name.removeprefix("text_model."): t for name, t in tensors.items()}, text)
    out = tmp_path / "other"
    sd15 = tmp_path / "v1-5-pruned.safetensors"
    assert run("--sd15", sd15, "--arc2face", arc2face, "--out", out) == 0
    assert_same(named(out), expected)
    assert checkpoints.read_provenance(out)["sources"][0]["unused"] == {
        "model.diffusion_model.*": 1, "cond_stage_model.*": 1, "*alphas_cumprod*": 1, "betas": 1,
    }  # fmt: skip


def test_a_folder_without_the_file_is_named(tmp_path, folders, capsys):
    sd15, arc2face = folders
    (arc2face / "encoder/model.safetensors").unlink()
    out = tmp_path / "model"
    assert run("--sd15", sd15, "--arc2face", arc2face, "--out", out) == 1
    assert "found none of encoder/model.safetensors or text_encoder/" in capsys.readouterr().err
    assert run("--sd15", tmp_path / "nowhere", "--arc2face", arc2face, "--out", out) == 1
    assert "nowhere: no such file" in capsys.readouterr().err
    # A UNet of the release is not one to start from.
    unet = reference_weights.state_dict({"conv_in.weight": (8, 153, 3, 3)})
    path = arc2face / "arc2face/diffusion_pytorch_model.safetensors"
    save_file(renamed("unet") | unet, path)
    save_file(renamed("identity"), arc2face / "encoder/model.safetensors")
    assert run("--sd15", sd15, "--arc2face", arc2face, "--out", out) == 1
    error = capsys.readouterr().err
    assert f"{path}: not the weights of unet" in error
    assert "conv_in.weight is (8, 153, 3, 3), expected (8, 4, 3, 3)" in error


# --------------------------------------------------------------------------------------------------
# PyTorch files


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed (the extra [convert])")


class Callback:
    """Something a training framework leaves in a checkpoint."""

    def __init__(self):
        self.best = {"score": 1}


class Settings(dict):
    """A mapping with a class of its own."""


def lightning(torch, weights):
    """Everything that such a checkpoint can hold beside the weights."""
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights.items()}
    ema = {
        "model_ema." + name.replace(".", ""): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    ema |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    moments = {"exp_avg": torch.zeros(9), "exp_avg_sq": torch.zeros(9), "step": 3}
    return {
        "epoch": 3,
        "global_step": 1_600_000,
        "pytorch-lightning_version": "2.0.1",
        "state_dict": {**tensors, **ema},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {Callback: Callback(), "Checkpoint": {"best_model_score": np.float64(0.5)}},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": Settings(lr=Settings(start=np.float32(1e-4)), run=Callback()),
    }


def test_a_lightning_checkpoint_gives_up_its_weights(tmp_path, torch, weights, expected, capsys):
    path = tmp_path / "spmr.ckpt"
    torch.save(lightning(torch, weights), path)
    with pytest.raises(pickle.UnpicklingError):  # the objects in it are what weights_only refuses
        torch.load(path, weights_only=True)
    assert run("--released", path, "--out", tmp_path / "model") == 0
    assert_same(named(tmp_path / "model"), expected)
    [source] = checkpoints.read_provenance(tmp_path / "model")["sources"]
    unet = sum(name.startswith(released.UNET_PREFIX) for name in weights)
    assert source["unused"] == {"model_ema.*": unet + 2}
    assert {"optimizer_states", "callbacks", "hyper_parameters"} < set(source["bookkeeping"])
    assert "(of training)" in capsys.readouterr().out


def test_a_plain_state_dict_of_an_old_pytorch(tmp_path, torch, weights, expected):
    path = tmp_path / "pytorch_model.bin"
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert run("--released", path, "--out", tmp_path / "model") == 0
    assert_same(named(tmp_path / "model"), expected)


class Attack:
    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


@pytest.mark.parametrize("function", [os.system, eval], ids=lambda f: f.__name__)
def test_nothing_in_a_file_is_run(tmp_path, torch, weights, expected, capsys, function):
    victim = tmp_path / "victim"
    argument = {
        os.system: f"touch {victim}",
        eval: f"__import__('os').mkdir({str(victim)!r})",
    }[function]
    path = tmp_path / "a.ckpt"
    content = lightning(torch, weights) | {"extra": Attack(function, argument)}
    torch.save(content, path)
    code = run("--released", path, "--out", tmp_path / "model")
    assert not victim.exists()
    if code == 0:  # an inert stand-in took the call
        assert_same(named(tmp_path / "model"), expected)
    else:
        assert "only be read by running code" in capsys.readouterr().err
        assert is_untouched(tmp_path)


def damaged(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged, "damaged"),
        (lambda content: b"PK\x03\x04" + b"\0" * 500, "damaged"),
        (lambda content: b"<html>not found</html>", "a web page"),
        (lambda content: pickle.dumps({"a": 1}), "damaged"),
        (lambda content: pickle.dumps({"a": np.zeros(3)}, protocol=5), "damaged"),
    ],
)
def test_a_damaged_pytorch_file_is_named(tmp_path, torch, weights, capsys, content, message):
    path = tmp_path / "a.ckpt"
    torch.save({name: torch.from_numpy(tensor) for name, tensor in weights.items()}, path)
    path.write_bytes(content(path.read_bytes()))
    assert run("--released", path, "--out", tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert f"{path}: {message}" in error and "weights_only" not in error
    assert is_untouched(tmp_path)


def test_the_content_tells_the_format_not_the_suffix(tmp_path, torch, weights):
    save_file(weights, tmp_path / "a.ckpt")
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        assert sources.open_file(tmp_path / name).shapes.keys() == weights.keys()


def test_tensors_outside_the_weights_are_no_secret(tmp_path, torch, weights, capsys):
    content = lightning(torch, weights) | {"control": {"scale": [torch.zeros(2)]}}
    torch.save(content, tmp_path / "a.ckpt")
    assert run("--released", tmp_path / "a.ckpt", "--out", tmp_path / "model") == 1
    assert "1 unknown: control.scale.0" in capsys.readouterr().err
    torch.save([1, 2], tmp_path / "b.ckpt")
    assert run("--released", tmp_path / "b.ckpt", "--out", tmp_path / "model") == 1
    assert "holds a list, expected named tensors" in capsys.readouterr().err
    endless = []
    endless.append(endless)
    torch.save({"state_dict": {}, "extra": endless}, tmp_path / "d.ckpt")
    assert len(sources.open_file(tmp_path / "d.ckpt").objects) == 1
    torch.save({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match=r"a\.b stands there twice"):
        sources.open_file(tmp_path / "c.ckpt")
