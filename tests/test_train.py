"""Training as a whole, on a micro model: resuming, losses, ablations, broken runs, configs."""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spinmeround_jax import checkpoints, convert, files, models, sharding, train
from spinmeround_jax.config import Config, OptimizerConfig, from_mapping
from spinmeround_jax.data import loader as data_loader
from spinmeround_jax.models import parameters
from spinmeround_jax.training import loop, optim
from spinmeround_jax.training import step as diffusion_step
from spinmeround_jax.training.run_checkpoints import Checkpoints
from tests.support.configs import full_config, micro_config
from tests.support.paths import ROOT
from tests.support.synthetic_shards import write_dataset

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, subjects=4)
    return folder


# --------------------------------------------------------------------------------------------------
# Whole runs


def final_state(workdir, config):
    """Arrays and loader state of the newest checkpoint of the diffusion model."""
    transform = optim.optimizer(config.optimizer, 6)
    abstract = jax.eval_shape(
        lambda: optim.init(train.trained_part(config, train.new_model(config)), transform)
    )
    placement = sharding.replicated(sharding.make_mesh())
    model = checkpoints.load_model(workdir / "model").config  # with the latents' statistics
    config = dataclasses.replace(config, model=model)
    saved = Checkpoints(workdir / "checkpoints", keep=2, config=config)
    recorder = Recorder()
    state = saved.restore(sharding.abstract(abstract, placement), recorder)
    saved.close()
    return state, recorder.state


class Recorder:
    def set_state(self, state):
        self.state = state


def test_interrupted_run_ends_as_the_uninterrupted_one_bit_for_bit(
    directory, tmp_path, monkeypatch, capsys
):
    config = micro_config(directory)
    place, batches = sharding.global_batch, []

    def global_batch(mesh, batch):
        batches.append(batch)
        if len(batches) in interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(mesh, batch)

    monkeypatch.setattr(sharding, "global_batch", global_batch)

    interrupt_at = ()
    model = train.train(config, tmp_path / "whole")
    whole, batches = batches, []

    interrupt_at = (2, 8)  # in the autoencoder's training, and at step 4 of 6 of the other
    for message in ("autoencoder: stopped at step 2 of 4", "diffusion: stopped at step 4 of 6"):
        with pytest.raises(loop.Preempted, match=message):
            train.train(config, tmp_path / "parts")
    train.train(config, tmp_path / "parts")

    assert len(batches) == len(whole) == 10
    jax.tree.map(np.testing.assert_array_equal, whole, batches)
    expected, found = (final_state(tmp_path / name, config) for name in ("whole", "parts"))
    assert int(found[0].step) == 6
    jax.tree.map(np.testing.assert_array_equal, expected, found)

    # What a run leaves behind.
    loaded = checkpoints.load_model(model)
    ema = expected[0].ema["unet"]
    for name, value in parameters.split(loaded.unet)[1].items():
        np.testing.assert_array_equal(value, np.asarray(ema[name], np.float16))
    assert checkpoints.read_provenance(model)["data"]["license"] == "CC0-1.0"
    samples = sorted(path.name for path in (tmp_path / "parts" / "samples").iterdir())
    assert samples == ["anchors_0000006.png", "autoencoder_0000004.png"]
    assert list((tmp_path / "whole" / "tensorboard").glob("events*"))
    assert "diffusion 6/6" in capsys.readouterr().out

    # Its log has every step once, wherever it was interrupted.
    for name, at in (("autoencoder", [2, 4]), ("diffusion", [2, 4, 6])):
        whole, parts = (logged(tmp_path / run, name) for run in ("whole", "parts"))
        assert sorted(parts) == sorted(whole) == at
        for step, metrics in parts.items():
            assert metrics["loss"] == whole[step]["loss"] and metrics["learning_rate"] >= 0.0
            assert 0.0 < metrics["goodput"] < 1.0 and "mfu" not in metrics  # of a CPU
    assert {"tflops_per_device", "train_1"} <= whole[6].keys()
    page = (tmp_path / "parts" / "report.html").read_text()
    assert "data:image/webp" in page and page.count("<article>") == 4


def logged(workdir, name):
    """{step: metrics} of a training; fails if a metric of a step was logged twice."""
    steps = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["name"] == name:
            metrics = steps.setdefault(entry["step"], {})
            assert not metrics.keys() & entry["metrics"].keys()
            metrics |= entry["metrics"]
    return steps


@pytest.mark.slow
def test_sigterm_exits_cleanly_and_the_same_command_resumes(directory, tmp_path):
    command = [
        sys.executable, "-m", "spinmeround_jax.train", "--config=configs/quickstart.py",
        f"--workdir={tmp_path}", f"--config.data.directory={directory}",
        f"--config.latents.directory={tmp_path / 'latents'}",
        "--config.autoencoder_training.steps=2", "--config.autoencoder_training.lpips_weight=0.0",
        "--config.autoencoder_training.crop=8", "--config.autoencoder_training.directory=",
        "--config.held_out.heads=2", "--config.model.image_size=16", "--config.model.views=4",
        "--config.model.unet.model_channels=16", "--config.model.unet.channel_mult=(1,)",
        "--config.model.unet.attention_levels=()", "--config.model.unet.joint_levels=()",
        "--config.optimizer.batch_size=2", "--config.stages[0].steps=40",
        "--config.stages[1].steps=40", "--config.log_every=5",
        "--config.autoencoder_training.crop=16",
    ]  # fmt: skip
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("diffusion 5/80"):
            break
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=900)[0]
    assert run.returncode == 0 and "The same command resumes" in out
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert "from step 0" not in again.stdout and "diffusion 80/80" in again.stdout
    assert checkpoints.load_model(tmp_path / "model").config.image_size == 16

    broken = [*command, "--config.optimizer.learning_rate=1.0"]
    refused = subprocess.run(broken, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert refused.returncode == 1
    assert "optimizer.learning_rate: 0.001 -> 1.0" in refused.stderr


@pytest.mark.slow
def test_a_pretrained_model_starts_on_several_devices(directory, tmp_path):
    changes = {
        "init_from": str(tmp_path / "init"), "autoencoder_training.steps": 0,
        "optimizer.batch_size": 4, "stages": ({"steps": 2, "observed": (1,)},),
    }  # fmt: skip
    checkpoints.save_model(
        tmp_path / "init", train.new_model(micro_config(directory, **changes)), {}
    )
    script = (
        "import pathlib, jax; from spinmeround_jax import train; "
        "from tests.support.configs import micro_config; assert jax.device_count() == 4; "
        f"config = micro_config({str(directory)!r}, **{changes!r}); "
        f"train.train(config, pathlib.Path({str(tmp_path / 'run')!r}))"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    assert "over 4 device(s)" in run.stdout


def test_runs_with_the_same_autoencoder_encode_the_data_once(directory, tmp_path):
    stored = tmp_path / "latents"
    config = micro_config(
        directory,
        **{"latents.directory": str(stored), "autoencoder_training.steps": 1},
        stages=({"steps": 2, "observed": (1,)},),
    )
    train.train(config, tmp_path / "run")
    (moments,) = stored.glob("*/*00000*.npy")
    written = moments.stat().st_mtime_ns
    made = checkpoints.load_model(tmp_path / "run" / "model").config
    assert dataclasses.replace(made, latent_mean=(), latent_std=()) == config.model
    assert len(made.latent_mean) == len(made.latent_std) == 8 and min(made.latent_std) > 0

    train.train(config, tmp_path / "again")  # the same seed, so the same autoencoder
    assert moments.stat().st_mtime_ns == written  # used, not written again
    assert list(stored.glob("*/*00000*.npy")) == [moments]


# --------------------------------------------------------------------------------------------------
# Step


@pytest.fixture(scope="module")
def setting(directory):
    """Everything a step needs, with networks moved away from their zero-initialised outputs."""
    config = micro_config(directory)

    def networks():
        model = train.new_model(config)
        return {name: getattr(model, name) for name in ("unet", "autoencoder", "identity")}

    graphdefs, params = {}, {}
    rng = np.random.default_rng(0)
    for name, module in nnx.eval_shape(networks).items():
        graphdefs[name], shapes = parameters.split(module)
        params[name] = {
            tensor: jnp.asarray(rng.normal(tensor.endswith("scale"), 0.1, like.shape), jnp.float32)
            for tensor, like in shapes.items()
        }
    empty_latent = jnp.full((8, 8, 8), 0.3)
    with contextlib.closing(
        data_loader.make_loader(config.data, config.stages, 4, 4, 0, "camera")
    ) as loader:
        batch = next(loader)
    return config, graphdefs, params, empty_latent, batch


@pytest.mark.parametrize("halvings", [0, 4])
def test_loss_falls_on_a_repeated_batch(setting, halvings):
    config, graphdefs, params, empty_latent, batch = setting
    optimizer = dataclasses.replace(config.optimizer, schedule="constant", learning_rate=3e-3)
    config = dataclasses.replace(config, optimizer=optimizer, consistency_halvings=halvings)
    transform = optim.optimizer(optimizer, 100)
    state = optim.init({name: params[name] for name in ("unet", "identity")}, transform)
    frozen = {"networks": {"autoencoder": params["autoencoder"]}, "empty_latent": empty_latent}
    step = jax.jit(diffusion_step.make_step(config, graphdefs, transform, sharding.make_mesh()))
    losses = []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert int(state.step) == 60 and int(state.bad_step) == -1


@pytest.fixture(scope="module")
def loss_of(setting):
    """batch_loss for an ablation and changes to latents and batch."""
    config, graphdefs, params, empty_latent, batch = setting
    random, noise = np.random.default_rng(0).standard_normal((2, 4, 4, 8, 8, 8), np.float32)
    sigma = np.array([0.3, 1.0, 3.0, 10.0], np.float32)
    compiled = {}

    def loss(ablation="", latents=lambda x: x, **changes):
        if ablation not in compiled:
            denied = {f"no_{part}": part == ablation for part in ("identity", "normals", "image")}
            changed = dataclasses.replace(
                config, ablation=dataclasses.replace(config.ablation, **denied)
            )
            compiled[ablation] = jax.jit(
                lambda latents, batch: diffusion_step.batch_loss(
                    changed.model,
                    changed.ablation,
                    graphdefs,
                    params,
                    empty_latent,
                    latents,
                    batch,
                    sigma,
                    noise,
                )[0]
            )
        return float(compiled[ablation](latents(random), dataclasses.replace(batch, **changes)))

    return loss


def in_observed_view(latents):
    return np.where(np.arange(4)[:, None, None, None] == 0, latents + 1.0, latents)


def in_normals(latents):
    return np.where(np.arange(8) < 4, latents, latents + 1.0)


NOBODY = np.eye(512, dtype=np.float32)[:4]
NONE, ALL = np.zeros(4, bool), np.ones(4, bool)


def test_everything_given_matters_unless_denied_or_dropped(loss_of):
    base = loss_of(dropped=NONE, identity_dropped=NONE)
    assert loss_of(dropped=NONE, latents=in_observed_view) != base
    assert loss_of(dropped=NONE, latents=in_normals) != base
    assert loss_of(dropped=NONE, id_embedding=NOBODY) != base

    nameless = loss_of(dropped=NONE, identity_dropped=ALL)
    assert nameless != base
    assert loss_of(dropped=NONE, identity_dropped=ALL, id_embedding=NOBODY) == nameless
    assert loss_of(dropped=NONE, identity_dropped=ALL, latents=in_observed_view) != nameless

    dropped = loss_of(dropped=ALL)
    assert dropped not in (base, nameless)
    assert loss_of(dropped=ALL, latents=in_observed_view, id_embedding=NOBODY) == dropped

    assert loss_of("image", dropped=NONE, latents=in_observed_view) == loss_of(
        "image", dropped=NONE
    )
    assert loss_of("identity", dropped=NONE, id_embedding=NOBODY) == loss_of(
        "identity", dropped=NONE
    )
    assert loss_of("normals", dropped=NONE, latents=in_normals) == loss_of("normals", dropped=NONE)
    for ablation in ("image", "identity", "normals"):
        assert loss_of(ablation, dropped=NONE) != base


def test_contradictory_configs_are_refused(directory):
    mesh = sharding.make_mesh()
    train.check(micro_config(directory), mesh)
    for changes, message in (
        ({"init_from": "weights/init"}, "either config.init_from"),
        ({"autoencoder_training.steps": 0}, "either config.init_from"),
        ({"train_identity_encoder": False}, "needs pretrained weights"),
        ({"ablation.no_image": True, "ablation.no_identity": True}, "leave nothing"),
        ({"remat": "all"}, "config.remat must be one of nothing"),
        ({"accumulation": 3}, "batch_size 2 does not divide over 1 devices in 3 parts"),
    ):
        with pytest.raises(ValueError, match=message):
            train.check(micro_config(directory, **changes), mesh)


def test_a_config_that_cannot_be_read_is_told_in_one_line(tmp_path):
    command = [sys.executable, "-m", "spinmeround_jax.train"]
    quickstart = "--config=configs/quickstart.py"
    runs = {
        reason: subprocess.Popen([*command, *given], stderr=subprocess.PIPE, text=True)
        for reason, given in {
            "No such file": ("--config=nowhere.py", f"--workdir={tmp_path / 'run'}"),
            "Is a directory": (f"--config={tmp_path}", "--config.seed=1"),
            "no such value: 'sede'. Did you mean \"seed\"": (quickstart, "--config.sede=1"),
            "no such value: nope": (quickstart, "--config.nope=1"),
        }.items()
    }
    for reason, run in runs.items():
        told = run.communicate(timeout=300)[1]
        assert run.returncode == 1
        assert told.startswith("error: ") and reason in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_one_process_trains_in_a_folder(directory, tmp_path, capsys):
    command = ["--config=configs/quickstart.py", f"--config.data.directory={directory}"]
    command += ["--process_count=1"]
    with files.lock(tmp_path / "checkpoints"):
        assert train.main([*command, f"--workdir={tmp_path}"]) == 1
    told = capsys.readouterr().err
    assert f"{tmp_path / 'checkpoints'}: process {os.getpid()} on" in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    command = ["--config=configs/quickstart.py", f"--config.data.directory={nowhere}"]
    command += ["--process_count=1"]
    assert train.main([*command, f"--workdir={tmp_path / 'run'}"]) == 1
    assert "nowhere/manifest.json: no such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pretrained_weights_start_a_run(directory, tmp_path, setting):
    config, graphdefs, params, _, _ = setting
    networks = {name: parameters.merge(graphdefs[name], params[name]) for name in graphdefs}
    checkpoints.save_model(
        tmp_path / "init", models.Model(config.model, **networks), {}, np.float32
    )
    changes = {"init_from": str(tmp_path / "init"), "autoencoder_training.steps": 0}
    config = micro_config(directory, **changes, **{"train_identity_encoder": False})
    loaded = train.load_pretrained(config)
    assert set(train.trained_part(config, loaded)) == {"unet"}
    _, frozen = train.freeze(config, loaded.autoencoder, loaded, sharding.make_mesh())
    jax.tree.map(
        np.testing.assert_array_equal,
        frozen["networks"],
        {name: params[name] for name in ("autoencoder", "identity")},
    )
    other = micro_config(directory, **changes, **{"model.unet.heads": 4})
    with pytest.raises(ValueError, match=r"unet is .*heads=2.*the config says .*heads=4"):
        train.load_pretrained(other)


def test_a_run_goes_on_after_its_end_and_from_an_earlier_step(directory, tmp_path, capsys):
    """With other settings of the optimizer, all of which its model tells."""
    config = micro_config(directory)
    train.train(config, tmp_path)
    out = tmp_path / "converted"
    assert convert.main(["--run", str(tmp_path), "--out", str(out)]) == 0
    for network in ("unet", "identity", "autoencoder"):
        ended, converted = (
            parameters.split(getattr(checkpoints.load_model(folder), network))[1]
            for folder in (tmp_path / "model", out)
        )
        jax.tree.map(np.testing.assert_array_equal, ended, converted)
    arguments = [
        "--run",
        str(tmp_path),
        "--step",
        "3",
        "--no-ema",
        "--out",
        str(tmp_path / "early"),
    ]
    assert convert.main(arguments) == 0
    assert checkpoints.read_provenance(tmp_path / "early")["steps"] == 3
    assert convert.main(["--run", str(tmp_path), "--step", "4", "--out", str(tmp_path / "x")]) == 1
    assert "no checkpoint of step 4; there are: 3, 6" in capsys.readouterr().err

    # Two steps more than it had, from the one before the last; given again, it does not go back again.
    more = micro_config(
        directory,
        stages=({"steps": 3, "observed": (1,)}, {"steps": 5, "observed": (0, 1, 3)}),
        **{"optimizer.learning_rate": 1e-4},
    )
    for _ in range(2):
        train.train(more, tmp_path, from_step=3, skip_steps=(6,))
    assert (
        sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal())[-1]
        == "8"
    )
    told = checkpoints.read_provenance(tmp_path / "model")
    assert told["steps"] == 8
    changes = [(entry["step"], entry["change"].split(":")[0]) for entry in told["history"]]
    assert sorted(changes) == [
        (3, "optimizer.learning_rate"), (3, "stages"), (3, "went back to this step"),
        (6, "its batch is passed over"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"is at step 8, and config\.stages end at 6"):
        train.train(config, tmp_path)
    past = micro_config(directory, stages=({"steps": 8, "observed": (1,)},))
    with pytest.raises(ValueError, match="stages"):
        train.train(past, tmp_path)


# --------------------------------------------------------------------------------------------------
# Loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Number:
    id_embedding: np.ndarray


class Counting:
    """A loader whose batches are their numbers."""

    step = 0

    def __next__(self):
        self.step += 1
        return Number(np.full((1,), self.step - 1, np.float32))

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def run_counting(tmp_path, step_fn, steps=12, **options):
    transform = optim.optimizer(PLAIN, steps)
    saved = Checkpoints(tmp_path, keep=2, config=PLAIN)
    state = loop.run(
        "counting", lambda state, batch: step_fn(state, batch, transform),
        optim.init({"w": jnp.ones(3)}, transform), Counting(), saved,
        mesh=sharding.make_mesh(), steps=steps, batch_size=16,
        cadence=loop.Cadence(log=4, evaluate=100, sample=100, checkpoint=4), log=None,
        on_evaluate=lambda state: {}, on_sample=lambda state, step: None, **options,
    )  # fmt: skip
    saved.close()
    return state


PLAIN = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0, beta1=0.9,
    beta2=0.99, max_gradient_norm=1.0, ema_decay=0.9, batch_size=16,
)  # fmt: skip


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, fault):
    def step_fn(state, batch, transform):
        loss = jnp.where(batch.id_embedding[0] == 5, fault, 1.0)
        state, _ = optim.update(state, loss, {"w": loss * state.params["w"]}, transform, 0.9)
        return state, {"loss": loss}

    with pytest.raises(
        loop.NotFiniteError, match=r"at step 5, .* examples 80 to 95 .* are kept of 4, "
    ):
        run_counting(tmp_path, step_fn)
    saved = Checkpoints(tmp_path, keep=2, config=PLAIN)
    assert saved.latest() == 4
    transform = optim.optimizer(PLAIN, 12)
    abstract = jax.eval_shape(lambda: optim.init({"w": jnp.ones(3)}, transform))
    loader = Counting()
    state = saved.restore(
        sharding.abstract(abstract, sharding.replicated(sharding.make_mesh())), loader
    )
    assert loader.step == 4 and np.isfinite(state.params["w"]).all()


def test_a_batch_is_passed_over_on_request(tmp_path):
    seen = []

    def step_fn(state, batch, transform):
        seen.append(int(batch.id_embedding[0]))
        loss = jnp.where(batch.id_embedding[0] == 5, np.nan, 1.0)
        state, _ = optim.update(state, loss, {"w": loss * state.params["w"]}, transform, 0.9)
        return state, {"loss": loss}

    state = run_counting(tmp_path, step_fn, skip=(5, 8, 9, 10, 11))
    assert seen == [0, 1, 2, 3, 4, 6, 7] and int(state.step) == 12
    assert np.isfinite(state.params["w"]).all()


def test_steps_are_queued_without_waiting(tmp_path, monkeypatch):
    fetched = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or fetch(x))

    def step_fn(state, batch, transform):
        state, norm = optim.update(
            state, jnp.ones(()), {"w": batch.id_embedding + state.params["w"]}, transform, 0.9
        )
        return state, {"loss": norm}

    run_counting(tmp_path, step_fn)
    assert len(fetched) == 3  # steps 4, 8 and 12


def test_the_asked_steps_are_traced_wherever_the_run_starts(tmp_path, capsys):
    @jax.jit
    def halve(state, batch):
        state, _ = optim.update(
            state, jnp.ones(()), state.params, optim.optimizer(PLAIN, 12), PLAIN.ema_decay
        )
        return state, {"loss": jnp.ones(())}

    def step_fn(state, batch, transform):
        return halve(state, jnp.asarray(batch.id_embedding))

    (tmp_path / "run").mkdir()
    run_counting(tmp_path / "run", step_fn, profile=loop.Profile(2, 4, tmp_path))
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert str(trace.parent) in capsys.readouterr().out
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "counting"
    ]
    assert steps == [2, 3]
    # Steps that are not reached are no fault.
    run_counting(tmp_path / "other", step_fn, profile=loop.Profile(11, 20, tmp_path / "other"))
    assert len(list(tmp_path.glob("other/plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("text", ["10", "5:5", "7:3", "-1:3", "a:b", "1:2:3", "", ":"])
def test_steps_to_profile_that_are_none(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config=configs/quickstart.py", f"--profile={text}"])
    assert stopped.value.code == 2 and "FIRST:STOP" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Configs


def test_configs_have_the_same_fields():
    def keys(values):
        if isinstance(values, dict):
            return {name: keys(value) for name, value in values.items()}
        if isinstance(values, tuple) and values and isinstance(values[0], dict):
            return [keys(value) for value in values]
        return None

    files = [
        importlib.import_module(f"configs.{name}") for name in ("quickstart", "tpu_v4", "h100")
    ]
    trees = [keys(file.get_config().to_dict()) for file in files]  # as written, before any check
    assert trees[0] == trees[1] == trees[2]
    assert json.dumps(trees[0]).count("null") > 80


@pytest.mark.parametrize("name", ["tpu_v4", "h100"])
def test_full_size_configs_are_the_papers_model(name):
    config = full_config(name)
    model = nnx.eval_shape(lambda: train.new_model(config).unet)
    assert parameters.count(parameters.split(model)[1]) == 859_961_608
    assert config.model.latent_size == 64
    assert [(s.steps, s.observed) for s in config.stages] == [
        (600_000, (1,)),
        (1_000_000, (0, 1, 3)),
    ]


def test_quickstart_fits_together():
    config = full_config("quickstart")
    nnx.eval_shape(lambda: train.new_model(config).unet)
    train.check(config, sharding.make_mesh())
    assert config.model.latent_size == 16


def test_few_steps_tune_the_quickstart():
    config = full_config("few_steps")
    train.check(config, sharding.make_mesh())
    assert config.model == full_config("quickstart").model
    with pytest.raises(ValueError, match="consistency_halvings"):
        train.check(dataclasses.replace(config, init_from=""), sharding.make_mesh())


def test_ablation_configs_train_on_without_one_input():
    file = importlib.import_module("configs.ablation")
    for which in ("full", *file.WITHOUT):
        config = from_mapping(Config, file.get_config(which))
        train.check(config, sharding.make_mesh())
        denied = [name for name, value in dataclasses.asdict(config.ablation).items() if value]
        assert denied == ([] if which == "full" else [which])
        assert config.model == full_config("quickstart").model
    with pytest.raises(ValueError, match="give full, no_identity"):
        file.get_config("no_hair")
