"""Finished models: round trips and refusals."""

import dataclasses
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import checkpoints
from spinmeround_jax.files import InputError
from spinmeround_jax.models import parameters
from tests.support.paths import ROOT
from tests.support.tiny_model import CONFIG, NETWORKS, random_model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def folder(model, tmp_path):
    checkpoints.save_model(tmp_path / "model", model, {"command": "train", "seed": 1})
    return tmp_path / "model"


def named(model):
    return {name: parameters.split(getattr(model, name))[1] for name in NETWORKS}


def test_model_round_trip(model, folder):
    loaded = checkpoints.load_model(folder, jnp.bfloat16)
    assert loaded.config == CONFIG
    assert checkpoints.read_provenance(folder) == {"command": "train", "seed": 1}
    jax.tree.map(
        lambda found, original: np.testing.assert_array_equal(
            found, np.asarray(original).astype(np.float16).astype(np.float32)
        ),
        named(loaded),
        named(model),
    )
    assert {x.dtype for x in jax.tree.leaves(named(loaded))} == {np.dtype(np.float32)}
    assert loaded.autoencoder.encoder.conv_in.dtype == jnp.bfloat16
    pixels = jnp.ones((1, 16, 16, 3))
    whole = checkpoints.load_model(folder)
    np.testing.assert_allclose(
        whole.autoencoder.encode(pixels), model.autoencoder.encode(pixels), atol=2e-2
    )


def test_weights_are_replaced_on_demand_only(model, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = folder.parent / "other"
    (other / "weights").mkdir(parents=True)  # somebody's, such as that of this repository
    (other / "weights" / "mine").write_text("mine")
    for there in (folder, other):
        with pytest.raises(InputError, match="overwrite=True"):
            checkpoints.save_model(there, model, {"seed": 2})
        with pytest.raises(InputError, match="overwrite=True"):
            checkpoints.save_autoencoder(there, model.autoencoder, {})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in other.rglob("*")] == ["weights", "mine"]
    checkpoints.save_model(folder, model, {"seed": 2}, overwrite=True)
    assert checkpoints.read_provenance(folder) == {"seed": 2}
    checkpoints.load_model(folder)


def test_a_model_whose_replacement_was_killed_is_put_back(folder):
    folder.rename(folder.with_name(".model.replaced"))
    checkpoints.load_model(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_does_not_tell_where_it_was_written(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not any(str(folder.parent).encode() in path.read_bytes() for path in files)


def test_autoencoder_round_trip_is_exact(model, tmp_path):
    checkpoints.save_autoencoder(tmp_path, model.autoencoder, {})
    loaded = checkpoints.load_autoencoder(tmp_path)
    assert loaded.config == CONFIG.autoencoder
    jax.tree.map(
        np.testing.assert_array_equal,
        parameters.split(loaded)[1],
        parameters.split(model.autoencoder)[1],
    )
    with pytest.raises(InputError, match="holds 'autoencoder', expected 'model'"):
        checkpoints.load_model(tmp_path)


def edited(folder, **changes):
    path = folder / "model.json"
    (folder / checkpoints.SUMS).unlink()  # as somebody does who edits it on purpose
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage_missing(folder):
    shutil.rmtree(folder)


def damage_json(folder):
    (folder / "model.json").write_text("{")


def damage_not_an_object(folder):
    (folder / "model.json").write_text("[1]")


def damage_version(folder):
    edited(folder, schema_version=99)


def damage_config(folder):
    edited(folder, config={"image_size": 16})


def damage_impossible_config(folder):
    config = dataclasses.asdict(dataclasses.replace(CONFIG))
    config["unet"]["norm_groups"] = 7
    edited(folder, config=config)


def damage_shape(folder):
    config = dataclasses.asdict(
        dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, model_channels=32))
    )
    edited(folder, config=config)


def damage_layers(folder):
    config = dataclasses.asdict(
        dataclasses.replace(CONFIG, identity=dataclasses.replace(CONFIG.identity, layers=2))
    )
    edited(folder, config=config)


def damage_no_weights(folder):
    shutil.rmtree(folder / "weights")


def damage_weights(folder):
    for path in (folder / "weights").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])


def damage_half_the_files(folder):
    (folder / "weights" / "manifest.ocdbt").unlink()


def damage_sums(folder):
    (folder / checkpoints.SUMS).write_text("0" * 64 + "  ../../etc/passwd\n")


def damage_deep_json(folder):
    (folder / "model.json").write_text('{"kind":' * 100_000 + "}" * 100_000)


def damage_of(part, **changes):
    def damage(folder):
        config = dataclasses.asdict(CONFIG)
        (config if part is None else config[part]).update(changes)
        edited(folder, config=config)

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_missing, "model.json: no such file; give a folder written by training"),
        (damage_json, "model.json: not usable JSON .*; damaged"),
        (damage_not_an_object, "model.json: expected an object.*; damaged"),
        (damage_version, "schema version 99, this code reads 1"),
        (damage_config, "config: missing views"),
        (damage_impossible_config, "norm_groups 7 does not divide"),
        (
            damage_shape,
            r"does not fit the config in model.json: unet: .*conv_in/bias is \(16,\), exp",
        ),
        (damage_layers, "identity: missing layers/1/"),
        (damage_no_weights, "weights: no such folder"),
        (damage_weights, "weights/.*: damaged or edited"),
        (damage_half_the_files, "missing; copy the whole folder"),
        (damage_sums, "SHA256SUMS: damaged"),
        (damage_deep_json, "model.json: .*deep"),
        (damage_of("unet", heads=0), "config.unet.heads: expected an integer from 1"),
        (damage_of("unet", model_channels=-32), "config.unet.model_channels"),
        (damage_of("unet", res_blocks=10_000_000), "config.unet.res_blocks"),
        (damage_of("unet", norm_groups=0), "config.unet.norm_groups"),
        (damage_of("unet", channel_mult=[]), "config.unet.channel_mult"),
        (damage_of("autoencoder", scale_factor="NaN"), "config.autoencoder.scale_factor"),
        (damage_of("identity", layers=True), "config.identity.layers"),
        (damage_of(None, latent_std=[0.0]), r"config.latent_std\[0\]"),
        (damage_of(None, latent_mean=[float("nan")]), "NaN is not a finite number"),
    ],
)
def test_damaged_models_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        checkpoints.load_model(folder)
    assert str(folder) in str(caught.value)


def test_no_flipped_bit_of_a_model_loads(folder):
    """One bit of every file but the card, and eight more of the largest."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    paths = sorted(path for path in paths if path.name != checkpoints.CARD)
    largest = max(paths, key=lambda path: path.stat().st_size)
    rng = np.random.default_rng(0)
    for path in [*paths, *[largest] * 8]:
        before = path.read_bytes()
        damaged = bytearray(before)
        damaged[rng.integers(len(before))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            checkpoints.load_model(folder)
        assert str(folder) in str(caught.value)
        path.write_bytes(before)
    checkpoints.load_model(folder)


def test_sums_that_are_cut_short_are_refused(folder):
    path = folder / checkpoints.SUMS
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in (lines[:-1], lines[:1], []):
        path.write_bytes(b"".join(kept))
        with pytest.raises(InputError, match="SHA256SUMS: cut short"):
            checkpoints.load_model(folder)


def test_models_of_before_there_were_sums_still_open(folder):
    (folder / checkpoints.SUMS).unlink()
    checkpoints.load_model(folder)


def test_sums_are_those_of_sha256sum(folder):
    subprocess.run(["sha256sum", "--check", "--quiet", checkpoints.SUMS], cwd=folder, check=True)


def test_the_shipped_weights_are_whole():
    checkpoints.load_model(ROOT / "weights" / "quickstart")
    assert (ROOT / "weights" / "quickstart" / checkpoints.SUMS).is_file()


def test_weights_beyond_float16_are_refused(model, tmp_path):
    graphdef, values = parameters.split(model.unet)
    values = {**values, "conv_in/bias": values["conv_in/bias"] + 1e6}
    large = dataclasses.replace(model, unet=parameters.merge(graphdef, values))
    with pytest.raises(ValueError, match="unet/conv_in/bias: not finite as float16"):
        checkpoints.save_model(tmp_path, large, {})
