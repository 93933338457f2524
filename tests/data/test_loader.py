import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.config import StageConfig
from spinmeround_jax.data import shards
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.data.manifest import read_manifest, write_manifest
from spinmeround_jax.files import InputError
from tests.support.loaders import loader
from tests.support.paths import ROOT
from tests.support.synthetic_shards import SIZE, angles, pixels, unit_normals, write_dataset

SUBJECTS, VIEWS = 6, 8  # stored; with 8 views around, views 3, 4 and 5 are within 50 degrees
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name != "moments"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, SUBJECTS, VIEWS)
    return folder


def assert_same(got: Batch, want: Batch) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


def who(batch: Batch) -> np.ndarray:
    """Subject number of each example, from the identity embedding."""
    known = [np.random.default_rng(i).standard_normal(512) for i in range(SUBJECTS)]
    cosines = batch.id_embedding @ np.array([k / np.linalg.norm(k) for k in known]).T
    assert (cosines.max(1) > 0.999).all()
    return cosines.argmax(1)


def which(batch: Batch) -> np.ndarray:
    """View number of each view, from its (head-frame) camera."""
    yaw, pitch = angles(VIEWS)
    poses = cameras.orbit(yaw, pitch)
    distance = abs(batch.world_to_camera[:, :, None] - poses).max((-1, -2))
    assert distance.min(-1).max() < 1e-6
    return distance.argmin(-1)


# --------------------------------------------------------------------------------------------------
# What a batch holds


def test_batches_hold_what_is_stored(directory):
    batches = list(loader(directory, random_background=0.0))
    assert len(batches) == 7
    assert jax.tree.structure(batches[0]).num_leaves == len(FIELDS)
    for batch in batches:
        assert batch.images.shape == batch.normals.shape == (4, 3, SIZE, SIZE, 3)
        assert batch.images.dtype == batch.normals.dtype == np.float32
        assert batch.observed.shape == (4, 3) and batch.observed.dtype == bool
        assert batch.dropped.shape == (4,) and batch.dropped.dtype == bool
        assert batch.id_embedding.shape == (4, 512) and batch.id_embedding.dtype == np.float32
        assert batch.world_to_camera.shape == (4, 3, 4, 4)
        assert batch.world_to_camera.dtype == np.float32
        for example, subject in enumerate(who(batch)):
            for slot, view in enumerate(which(batch)[example]):
                rgba = pixels(subject, view) / 255.0
                white = rgba[..., :3] * rgba[..., 3:] + (1.0 - rgba[..., 3:])
                np.testing.assert_allclose(
                    batch.images[example, slot], white * 2 - 1, atol=2e-6, rtol=0
                )
                normals = batch.normals[example, slot]
                assert (normals[:, 0] == 0.0).all()  # background
                assert np.linalg.norm(normals, axis=-1).max() <= 1 + 1e-6
                np.testing.assert_allclose(normals, unit_normals(view), atol=0.012, rtol=0)


def test_views_are_distinct_observed_come_first_and_a_frontal_one_leads(directory):
    yaw, pitch = angles(VIEWS)
    frontal = np.flatnonzero((abs(yaw) <= 50) & (abs(pitch) <= 20))
    firsts, counts, targets = [], [], []
    for batch in loader(directory, steps=60, views=5, observed=(0, 1, 3)):
        count = batch.observed.sum(1)
        np.testing.assert_array_equal(batch.observed, np.arange(5) < count[:, None])
        views = which(batch)
        assert all(len(set(row)) == 5 for row in views.tolist())
        firsts.append(views[count > 0, 0])
        counts.append(count)
        targets.append(views[:, 3:])
    assert set(np.concatenate(firsts)) == set(frontal) == {3, 4, 5}
    assert set(np.concatenate(targets).flat) == set(range(VIEWS))
    # 240 draws of each third: 80 +- 4 standard deviations.
    assert all(51 < n < 109 for n in np.bincount(np.concatenate(counts), minlength=4)[[0, 1, 3]])
    assert set(np.concatenate(counts)) == {0, 1, 3}


def test_unconditional_examples_may_start_anywhere(directory):
    views = np.concatenate([which(b)[:, 0] for b in loader(directory, steps=25, observed=(0,))])
    assert set(views) == set(range(VIEWS))


def test_pitch_counts_for_frontal_views(directory):
    batches = loader(directory, observed=(1,), max_frontal_pitch=12.0)
    assert {view for batch in batches for view in which(batch)[:, 0]} == {4}


def test_dropout_and_background_frequencies(directory):
    dropped, nameless, backgrounds = [], [], []
    for batch in loader(directory, steps=30, batch_size=20, views=2, observed=(1,)):
        dropped.append(batch.dropped)
        nameless.append(batch.identity_dropped)
        corner = batch.images[:, :, 0, 0]  # alpha is 0 in the first column
        np.testing.assert_array_equal(batch.images[:, :, :, 0], np.broadcast_to(
            corner[:, :1, None], (20, 2, SIZE, 3)))  # the same colour in all views  # fmt: skip
        backgrounds.append(corner[:, 0])
    backgrounds = np.concatenate(backgrounds)
    white = (backgrounds == 1.0).all(1)
    # 600 draws, four standard deviations: 300 +- 49, 90 +- 35.
    assert 251 < white.sum() < 349
    assert 55 < np.concatenate(dropped).sum() < 125
    nameless, dropped = np.concatenate(nameless), np.concatenate(dropped)
    assert 192 < nameless.sum() < 288  # 240 +- 48
    assert abs(np.corrcoef(nameless, dropped)[0, 1]) < 0.16  # each on its own
    colours = backgrounds[~white]
    assert abs(colours.mean(0)).max() < 0.15 and abs(colours.std(0) - 3**-0.5).max() < 0.1
    assert abs(np.corrcoef(colours.T)[np.triu_indices(3, 1)]).max() < 0.25  # channels independent


def test_certain_probabilities(directory):
    batch = next(loader(directory, random_background=1.0, guidance_dropout=1.0))
    assert batch.dropped.all() and not (batch.images[:, 0, 0, 0] == 1.0).all(-1).any()
    batch = next(loader(directory, random_background=0.0, guidance_dropout=0.0))
    assert not batch.dropped.any() and (batch.images[:, 0, 0, 0] == 1.0).all()


def test_relative_cameras(directory):
    absolute = list(loader(directory, observed=(0, 2)))
    relative = list(loader(directory, observed=(0, 2), relative_cameras=True))
    seen = set()
    for head, own in zip(absolute, relative, strict=True):
        np.testing.assert_array_equal(head.images, own.images)
        for example in range(4):
            observed = bool(head.observed[example, 0])
            seen.add(observed)
            if not observed:  # nothing to be relative to
                want = head.world_to_camera[example]
            else:
                np.testing.assert_allclose(
                    own.world_to_camera[example, 0], cameras.orbit(0.0), atol=1e-6
                )
                want = cameras.relative_to(
                    head.world_to_camera[example, 0], head.world_to_camera[example]
                )
            np.testing.assert_allclose(own.world_to_camera[example], want, atol=1e-6)
    assert seen == {True, False}


# --------------------------------------------------------------------------------------------------
# Order, stages, resuming


def test_epochs_are_complete_and_shuffled_anew(directory):
    order = np.concatenate([who(batch) for batch in loader(directory, steps=9, batch_size=4)])
    epochs = order.reshape(6, SUBJECTS)
    assert all(sorted(epoch) == list(range(SUBJECTS)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_a_seed_fixes_the_run(directory):
    first, again, other = (list(loader(directory, seed=seed)) for seed in (5, 5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        assert_same(a, b)
        assert not np.array_equal(a.images, c.images)
    coloured = list(loader(directory, random_background=1.0))
    corners = np.concatenate([batch.images[:, 0, 0, 0] for batch in coloured])
    assert len(np.unique(corners, axis=0)) == 28  # no draw is used twice, in any epoch


def test_stages_switch_at_their_step(directory):
    stages = (StageConfig(3, (1,)), StageConfig(0, (0,)), StageConfig(4, (2,)))
    counts = [batch.observed.sum(1).tolist() for batch in loader(directory, stages=stages)]
    assert counts == [[1] * 4] * 3 + [[2] * 4] * 4


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_gives_the_batches_of_an_uninterrupted_run(directory, prefetch):
    stages = (StageConfig(3, (1,)), StageConfig(4, (0, 1, 2)))
    whole = list(loader(directory, stages=stages))
    for stop in (0, 2, 3, 6, 7):  # batch 1 crosses an epoch, batch 3 a stage
        first = loader(directory, stages=stages, prefetch=prefetch)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        first.close()
        second = loader(directory, stages=stages, prefetch=prefetch)
        second.set_state(state)
        rest = list(second)
        assert len(rest) == 7 - stop
        for got, want in zip(rest, whole[stop:], strict=True):
            assert_same(got, want)
        second.set_state(state)  # also back in time, on a loader that has ended
        if stop < 7:
            assert_same(next(second), whole[stop])


def test_worker_processes_change_nothing(directory, tmp_path):
    """Spawned workers: the same batches, resumed with another number of them, and their errors.

    Signals, which a scheduler or a terminal sends to all of a group, do not end them.
    """
    whole = list(loader(directory))
    first = loader(directory, workers=2, prefetch=2)

    def disturb(seconds=0.0):
        """From the first moment of the workers, and for `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until or not multiprocessing.active_children():
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGTERM)
                os.kill(worker.pid, signal.SIGINT)
            time.sleep(0.01)

    disturbing = threading.Thread(target=disturb, args=(2.0,))
    disturbing.start()
    assert_same(next(first), whole[0])
    assert_same(next(first), whole[1])  # both work
    disturbing.join()
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for want in whole[2:6]:  # more than were made ahead
        assert_same(next(first), want)
    state = first.get_state()
    first.close()
    assert not any(worker.is_alive() for worker in workers)
    second = loader(directory, workers=1, prefetch=1)
    second.set_state(state)
    second.start_prefetch()
    rest = list(second)
    assert len(rest) == 1
    for got, want in zip(rest, whole[6:], strict=True):
        assert_same(got, want)
    second.close()

    bad = write_dataset(tmp_path, subjects=1, shards=1)[0]
    damage(bad, 0)
    third = loader(tmp_path, workers=1, prefetch=1)
    with pytest.raises(InputError, match=rf"{bad.name}: record \d at byte \d+: .*checksum"):
        next(third)
    third.close()


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGBUS, "--shm-size"), (signal.SIGKILL, "memory; try fewer config.data.workers")],
)
def test_a_worker_that_was_killed_is_told(directory, number, told):
    batches = loader(directory, workers=1, prefetch=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, number)
    with pytest.raises(InputError, match=told):
        list(batches)
    batches.close()


ABANDONED = """
import sys, time
from tests.support.loaders import loader

if __name__ == "__main__":
    batches = loader(sys.argv[1], workers=1, prefetch=4)
    next(batches)
    time.sleep(1)
    {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["batches.close()", "import os; os.kill(os.getpid(), 9)"])
def test_batches_nobody_fetched_leave_neither_memory_nor_warnings(directory, tmp_path, end):
    (tmp_path / "abandoned.py").write_text(ABANDONED.format(end=end))
    before = set(os.listdir("/dev/shm"))
    run = subprocess.run(
        [sys.executable, str(tmp_path / "abandoned.py"), str(directory)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stderr == ""
    assert not set(os.listdir("/dev/shm")) - before


def test_processes_share_each_batch(directory):
    whole = list(loader(directory, batch_size=6))
    shares = [
        list(loader(directory, batch_size=6, process_index=i, process_count=3)) for i in range(3)
    ]
    for step, want in enumerate(whole):
        parts = [share[step] for share in shares]
        assert all(part.images.shape[0] == 2 for part in parts)
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        assert_same(joined, want)


def test_a_state_may_move_to_other_processes_and_longer_runs(directory):
    longer = list(loader(directory, steps=9, batch_size=6))
    one = loader(directory, steps=5, batch_size=6)
    next(one)
    two = loader(directory, steps=9, batch_size=6, process_index=1, process_count=2)
    two.set_state(one.get_state())
    np.testing.assert_array_equal(next(two).images, longer[1].images[3:])


def test_a_state_of_other_batches_is_refused(directory):
    state = loader(directory, seed=1).get_state()
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        loader(directory, seed=2).set_state(state)
    with pytest.raises(ValueError, match="batch_size was 4, is 2"):
        loader(directory, seed=1, batch_size=2).set_state(state)


def test_orbax_saves_and_restores_the_loader(directory, tmp_path):
    grain = pytest.importorskip("grain")
    ocp = pytest.importorskip("orbax.checkpoint")
    whole = list(loader(directory))
    first = loader(directory)
    for _ in range(4):
        next(first)
    with ocp.CheckpointManager(tmp_path / "run", item_names=("data",)) as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        manager.wait_until_finished()
        second = loader(directory)
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
    assert_same(next(second), whole[4])


def test_a_closed_loader_says_so(directory):
    closed = loader(directory, prefetch=2)
    next(closed)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        next(closed)


# --------------------------------------------------------------------------------------------------
# Damage


def damage(shard, row: int) -> None:
    """Flip a byte in every view of the subject in `row`."""
    index = shards.read_index(shard)
    content = bytearray(shard.read_bytes())
    for offset, length in zip(index.offsets[row], index.lengths[row], strict=True):
        content[offset + 12 + length // 2] ^= 0xFF
    shard.write_bytes(content)


@pytest.fixture
def damaged(tmp_path):
    """Six subjects; subject 4 (second shard, row 1) is unreadable."""
    paths = write_dataset(tmp_path, SUBJECTS, VIEWS)
    damage(paths[1], 1)
    return tmp_path


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_damaged_record_stops_the_run_and_is_named(damaged, prefetch):
    run = loader(damaged, prefetch=prefetch)
    message = r"train-00001-of-00002.tfrecord: record (8|9|1\d) at byte \d+: .*checksum.*restore"
    with pytest.raises(InputError, match=message):
        for _ in range(3):
            next(run)
    step = run.step
    with pytest.raises(InputError, match=message):  # not an early, silent end
        next(run)
    assert run.step == step < 2


def test_skipping_is_counted_logged_once_and_repeatable(damaged, directory, caplog):
    sound = list(loader(directory))
    with caplog.at_level(logging.WARNING):
        run = loader(damaged, skip_corrupt=True)
        batches = [next(run) for _ in range(3)]
        state = json.loads(json.dumps(run.get_state()))
        batches += list(run)
    hits = 0
    for got, want in zip(batches, sound, strict=True):
        hit = who(want) == 4
        hits += hit.sum()
        assert not (who(got) == 4).any()
        for name in FIELDS:  # the others are the examples they would have been
            np.testing.assert_array_equal(getattr(got, name)[~hit], getattr(want, name)[~hit])
    assert hits >= 4  # once an epoch
    assert run.skipped >= hits  # a substitute can be subject 4 again
    messages = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert messages and len(messages) == len(set(messages))
    assert all("train-00001-of-00002.tfrecord: record" in message for message in messages)

    resumed = loader(damaged, skip_corrupt=True)
    resumed.set_state(state)
    for got, want in zip(resumed, batches[3:], strict=True):
        assert_same(got, want)
    assert resumed.skipped == run.skipped


def test_a_wholly_damaged_set_is_not_skipped_for_ever(tmp_path):
    damage(write_dataset(tmp_path, subjects=1, shards=1)[0], 0)
    with pytest.raises(InputError, match="20 unreadable subjects in a row"):
        next(loader(tmp_path, skip_corrupt=True))


def test_images_of_another_size_than_promised(tmp_path):
    write_dataset(tmp_path, subjects=1, shards=1)
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, {**manifest, "image_size": 32})
    with pytest.raises(InputError, match=r"record \d at .*16x16, expected RGBA 32x32"):
        next(loader(tmp_path))


def test_unusable_folders(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        loader(tmp_path)
    shard = write_dataset(tmp_path, subjects=1, shards=1)[0]
    with pytest.raises(InputError, match="no shards in split 'test'; it has train"):
        loader(tmp_path, split="test")
    manifest = read_manifest(tmp_path)
    entry = {"file": shard.name, "subjects": 2}
    write_manifest(tmp_path, {**manifest, "splits": {"train": [entry]}})
    with pytest.raises(InputError, match=r"\(1, 8\), manifest.json says \(2, 8\)"):
        loader(tmp_path)
    shard.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        loader(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match="cannot be opened"):
        loader(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "batch_size 5 must divide"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"views": 9, "observed": (1,)}, r"views must be in 1\.\.8"),
        ({"observed": (1, 3)}, "of 3 views, 0 to 2"),
        ({"observed": ()}, "at least one number"),
        ({"steps": 0}, "no steps"),
        ({"stages": ()}, "no steps"),
        ({"random_background": 1.5}, "random_background must be a probability"),
        ({"workers": -1}, "workers -1"),
        ({"max_frontal_yaw": -1.0}, "no view within .* for person-0, person-1"),
    ],
)
def test_contradictions_are_refused(directory, changes, message):
    with pytest.raises(ValueError, match=message):
        loader(directory, **changes)
