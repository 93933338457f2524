"""Checkpoints to resume from: round trips and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import sharding
from spinmeround_jax.config import added
from spinmeround_jax.files import InputError
from spinmeround_jax.models import ModelConfig
from spinmeround_jax.training.run_checkpoints import Checkpoints, config_changes
from tests.support.tiny_model import CONFIG


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
    saved = Checkpoints(tmp_path, keep=2, config=RUN)
    state = state_at(0)
    for step in range(1, 7):
        state = advance(state)
        if step % 2 == 0:
            saved.save(step, state, Position({"step": step}))
    saved.wait()
    saved.close()

    saved = Checkpoints(tmp_path, keep=2, config=dataclasses.replace(RUN, log_every=1))
    assert saved.latest() == 6
    loader = Position(None)
    restored = saved.restore(abstract_state(), loader)
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(6))
    assert loader.state == {"step": 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]


def test_loader_states_come_back(tmp_path):
    saved = Checkpoints(tmp_path, keep=1, config=RUN)
    saved.save(1, state_at(1), Position({"step": 1, "of": [1, 2]}))
    saved.wait()
    loader = Position(None)
    saved.restore(abstract_state(), loader)
    assert loader.state == {"step": 1, "of": [1, 2]}


def test_loader_of_another_step_is_refused(tmp_path):
    saved = Checkpoints(tmp_path, keep=1, config=RUN)
    saved.save(2, state_at(2), Position({"step": 5}))
    saved.wait()
    with pytest.raises(InputError, match=r"2: its data loader stood at step 5"):
        saved.restore(abstract_state(), Position({}))


def test_stages_to_come_may_change_and_those_before_may_not():
    def config(*stages):
        return {"stages": [{"steps": steps, "observed": [n]} for steps, n in stages]}

    saved = config((10, 1), (20, 3))
    for other in (config((10, 1), (15, 3)), config((10, 1), (5, 3), (40, 3), (9, 2))):
        assert not config_changes(saved, other, step=15)
        assert config_changes(saved, other, step=60)
    assert not config_changes(saved, config((10, 1)), step=10)
    for other in (config((10, 1)), config((11, 1), (19, 3)), config((10, 2), (20, 3))):
        assert config_changes(saved, other, step=15)


def test_a_config_older_than_a_field_is_resumed_with_its_default(tmp_path):
    saved = Checkpoints(tmp_path, keep=1, config=RUN)
    saved.save(1, state_at(1), Position({}))
    saved.wait()

    @dataclasses.dataclass(frozen=True)
    class Younger(Run):
        method: str = added("as before")

    same = {field.name: getattr(RUN, field.name) for field in dataclasses.fields(RUN)}
    Checkpoints(tmp_path, keep=1, config=Younger(**same)).restore(abstract_state(), Position({}))
    with pytest.raises(InputError, match="method: 'as before' -> 'new'"):
        other = Checkpoints(tmp_path, keep=1, config=Younger(**same, method="new"))
        other.restore(abstract_state(), Position({}))


def test_another_config_or_damage_is_refused(tmp_path):
    saved = Checkpoints(tmp_path, keep=1, config=RUN)
    saved.save(1, state_at(1), Position({}))
    saved.wait()
    wider = dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, model_channels=32))
    other = Checkpoints(
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
