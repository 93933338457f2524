"""Checkpoints to resume from, and finished models: round trips and refusals."""

import dataclasses
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import checkpoints, sharding
from spinmeround_jax.files import InputError
from spinmeround_jax.models import ModelConfig, parameters
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
    """One bit of every file, and eight more of the largest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
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


# --------------------------------------------------------------------------------------------------
# Training checkpoints


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    log_every: int
    rate: float
    model: ModelConfig


RUN = Run("first", 10, 0.1, CONFIG)


class Position:
    def __init__(self, state):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def state_at(step):
    return {"w": jnp.full((1000, 1000), float(step)), "step": jnp.int32(step)}


def abstract_state():
    tree = jax.eval_shape(lambda: state_at(0))
    return sharding.abstract(tree, sharding.replicated(sharding.make_mesh()))


def test_newest_checkpoint_survives_buffers_given_away(tmp_path):
    """Saving goes on in the background while the next step reuses (donates) the saved buffers."""
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    saved = checkpoints.Checkpoints(tmp_path, keep=2, config=RUN)
    state = state_at(0)
    for step in range(1, 7):
        state = advance(state)
        if step % 2 == 0:
            saved.save(step, state, Position({"step": step}))
    saved.wait()
    saved.close()

    saved = checkpoints.Checkpoints(tmp_path, keep=2, config=dataclasses.replace(RUN, log_every=1))
    assert saved.latest() == 6
    loader = Position(None)
    restored = saved.restore(abstract_state(), loader)
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(6))
    assert loader.state == {"step": 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]


def test_loader_states_come_back(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, keep=1, config=RUN)
    saved.save(1, state_at(1), Position({"step": 1, "of": [1, 2]}))
    saved.wait()
    loader = Position(None)
    saved.restore(abstract_state(), loader)
    assert loader.state == {"step": 1, "of": [1, 2]}


def test_loader_of_another_step_is_refused(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, keep=1, config=RUN)
    saved.save(2, state_at(2), Position({"step": 5}))
    saved.wait()
    with pytest.raises(InputError, match=r"2: its data loader stood at step 5"):
        saved.restore(abstract_state(), Position({}))


def test_stages_to_come_may_change_and_those_before_may_not():
    def config(*stages):
        return {"stages": [{"steps": steps, "observed": [n]} for steps, n in stages]}

    saved = config((10, 1), (20, 3))
    for other in (config((10, 1), (15, 3)), config((10, 1), (5, 3), (40, 3), (9, 2))):
        assert not checkpoints.config_changes(saved, other, step=15)
        assert checkpoints.config_changes(saved, other, step=60)
    assert not checkpoints.config_changes(saved, config((10, 1)), step=10)
    for other in (config((10, 1)), config((11, 1), (19, 3)), config((10, 2), (20, 3))):
        assert checkpoints.config_changes(saved, other, step=15)


def test_another_config_or_damage_is_refused(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, keep=1, config=RUN)
    saved.save(1, state_at(1), Position({}))
    saved.wait()
    wider = dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, model_channels=32))
    other = checkpoints.Checkpoints(
        tmp_path, keep=1, config=dataclasses.replace(RUN, name="second", rate=0.2, model=wider)
    )
    with pytest.raises(
        InputError,
        match=r"model\.unet\.model_channels: 16 -> 32; rate: 0\.1 -> 0\.2\. Set these back",
    ):
        other.restore(abstract_state(), Position({}))
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(InputError, match="could not be read and was left as it is"):
        saved.restore(abstract_state(), Position({}))
