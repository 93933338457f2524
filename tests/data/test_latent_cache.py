"""Latents computed ahead: the same as those computed in the step, whole or absent, never mixed up."""

import json
import pickle

import numpy as np
import pytest

from data_prep import cache_latents as command
from spinmeround_jax import checkpoints
from spinmeround_jax.data import latent_cache, latent_files
from spinmeround_jax.data.subjects import SubjectSource, composite
from spinmeround_jax.files import InputError
from spinmeround_jax.models import AutoencoderConfig, parameters
from spinmeround_jax.training import latents
from tests.support.loaders import loader
from tests.support.synthetic_shards import SIZE, pixels, write_dataset, write_two_splits
from tests.support.tiny_model import CONFIG as MODEL
from tests.support.tiny_model import random_autoencoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

SUBJECTS, VIEWS, BACKGROUNDS = 6, 8, 2
CONFIG = AutoencoderConfig(
    channels=8, channel_mult=(1, 2), res_blocks=1, scale_factor=0.5, norm_groups=8
)


@pytest.fixture(scope="module")
def autoencoder():
    return random_autoencoder(CONFIG)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, SUBJECTS, VIEWS)
    return folder


@pytest.fixture(scope="module")
def cached(tmp_path_factory, directory, autoencoder):
    folder = tmp_path_factory.mktemp("latents")
    cache(autoencoder, folder, directory)
    return folder


def cache(autoencoder, folder, directory, **options):
    options = {
        "backgrounds": BACKGROUNDS, "normals_frame": "world", "batch_size": 5, **options
    }  # fmt: skip
    latent_cache.cache_latents(autoencoder, folder, directory, **options)


def copy_of(cached, tmp_path):
    for path in cached.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


# --------------------------------------------------------------------------------------------------
# What they are


def test_batches_on_white_have_the_latents_of_their_pictures(directory, cached, autoencoder):
    network = parameters.split(autoencoder)
    options = {"steps": 3, "random_background": 0.0, "relative_cameras": True}
    for with_pictures, with_moments in zip(
        loader(directory, **options), loader(directory, latents=cached, **options), strict=True
    ):
        assert with_moments.images is None and with_pictures.moments is None
        for name in ("observed", "dropped", "id_embedding", "world_to_camera"):
            np.testing.assert_array_equal(
                getattr(with_moments, name), getattr(with_pictures, name), err_msg=name
            )
        shape = (*with_pictures.observed.shape, *with_moments.moments.shape[-3:])
        for noise in (None, np.random.default_rng(3).standard_normal(shape, np.float32)):
            want = latents.of_batch(with_pictures, MODEL, *network, noise)
            got = latents.of_batch(with_moments, MODEL, *network, noise)
            np.testing.assert_allclose(got, want, atol=2e-3 * abs(want).max())


def test_a_draw_differs_from_the_mean_by_the_posteriors_deviation(directory, cached, autoencoder):
    (batch,) = loader(directory, steps=1, latents=cached)
    network = parameters.split(autoencoder)
    _, std = np.split(batch.moments, 2, axis=-1)
    std = np.concatenate([std[:, :, 0], std[:, :, 1]], axis=-1)
    noise = np.random.default_rng(0).standard_normal(std.shape, np.float32)
    drawn, mean = (latents.of_batch(batch, MODEL, *network, n) for n in (noise, None))
    np.testing.assert_allclose(drawn - mean, noise * std, atol=1e-4 * std.max())


def test_random_backgrounds_are_the_subjects_colours_the_same_in_all_views(
    directory, cached, autoencoder
):
    seen = set()
    source = SubjectSource(directory, "train")
    colours = {}
    for index in source.indexes:
        with np.load(latent_files.paths(cached, index.path)[1]) as stored:
            colours |= dict(zip(stored["subjects"], stored["colours"], strict=True))
    assert len({tuple(c) for pair in colours.values() for c in pair}) == SUBJECTS * BACKGROUNDS
    for batch in loader(directory, steps=6, latents=cached, random_background=1.0, observed=(0,)):
        for moments, identity, poses in zip(
            batch.moments, batch.id_embedding, batch.world_to_camera, strict=True
        ):
            subject = _subject(identity)
            views = [_view(source, pose) for pose in poses]
            on_colour = [
                np.stack([composite(pixels(subject, v), c)[0] for v in views])
                for c in colours[f"person-{subject}"]
            ]
            distance = [
                abs(np.asarray(autoencoder.encode(images)) - moments[:, 0, ..., :4]).max()
                for images in on_colour
            ]
            assert min(distance) < 2e-3 < max(distance)
            seen.add(int(np.argmin(distance)))
    assert seen == set(range(BACKGROUNDS))


def _subject(id_embedding):
    known = [np.random.default_rng(i).standard_normal(512) for i in range(SUBJECTS)]
    return int(np.argmax([id_embedding @ vector for vector in known]))


def _view(source, pose):
    return int(np.argmin(abs(source.indexes[0].world_to_camera[0] - pose).max((-1, -2))))


def test_a_worker_process_maps_the_files_itself(directory, cached):
    indexes = SubjectSource(directory, "train").indexes
    source = latent_files.LatentSource(cached, indexes)
    sent = pickle.dumps(source)
    assert len(sent) < 20_000  # not the latents
    shape = (2, 2, *source.description.moments_shape[2:])
    before, after = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    identities = [
        reader.read(indexes[1], 2, [5, 0], 1, into)
        for reader, into in ((source, before), (pickle.loads(sent), after))
    ]
    np.testing.assert_array_equal(*identities)
    np.testing.assert_array_equal(before, after)


# --------------------------------------------------------------------------------------------------
# How they are written


def test_a_killed_writer_leaves_whole_shards_only_and_the_next_call_goes_on(
    directory, cached, autoencoder, tmp_path, monkeypatch
):
    encoder, calls = latent_cache._encoder, []

    def dies_in_the_second_shard(*args):
        encode = encoder(*args)

        def counted(images):
            calls.append(len(images))
            if len(calls) == 5:
                raise KeyboardInterrupt
            return encode(images)

        return counted

    monkeypatch.setattr(latent_cache, "_encoder", dies_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        cache(autoencoder, tmp_path, directory)
    first, second = SubjectSource(directory, "train").indexes
    assert latent_files.is_complete(tmp_path, first.path)
    assert not latent_files.is_complete(tmp_path, second.path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(InputError, match="unusable latents"):
        loader(directory, latents=tmp_path)

    cache(autoencoder, tmp_path, directory)
    assert len(calls) == 5 + 3  # the first shard's three subjects were not encoded again
    assert everything(tmp_path) == everything(cached)


def test_machines_that_share_the_work_write_what_one_does(directory, cached, autoencoder, tmp_path):
    for part in range(2):
        cache(autoencoder, tmp_path, directory, part=(part, 2))
    assert everything(tmp_path) == everything(cached)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing(directory, cached, autoencoder, tmp_path, batch_size):
    cache(autoencoder, tmp_path, directory, batch_size=batch_size, part=(1, 2))
    (path,) = tmp_path.glob("*.npy")
    np.testing.assert_allclose(np.load(path), np.load(cached / path.name), atol=2e-3)


def test_latents_of_another_autoencoder_or_other_colours_are_refused(
    directory, cached, autoencoder, tmp_path
):
    copy = copy_of(cached, tmp_path)
    other = random_autoencoder(CONFIG, seed=1)
    options = {"backgrounds": BACKGROUNDS, "normals_frame": "world"}
    for check in (cache, lambda *args: latent_cache.check_cache(*args, **options)):
        with pytest.raises(InputError, match=r"latents.json|autoencoder was .*, is .*delete"):
            check(other, copy, directory)
    with pytest.raises(InputError, match="backgrounds was 2, is 3"):
        cache(autoencoder, copy, directory, backgrounds=3)
    with pytest.raises(InputError, match="normals_frame was world, is camera"):
        cache(autoencoder, copy, directory, normals_frame="camera")
    with pytest.raises(ValueError, match="world frame, the model uses the camera frame"):
        loader(directory, latents=copy, normals_frame="camera")
    assert everything(copy) == everything(cached)


# --------------------------------------------------------------------------------------------------
# What is damaged


def truncate(folder, indexes):
    path = latent_files.paths(folder, indexes[0].path)[0]
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder, indexes):
    latent_files.paths(folder, indexes[0].path)[0].write_bytes(b"")


def no_subjects(folder, indexes):
    latent_files.paths(folder, indexes[1].path)[1].unlink()


def other_subjects(folder, indexes):
    path = latent_files.paths(folder, indexes[0].path)[1]
    path.write_bytes(latent_files.paths(folder, indexes[1].path)[1].read_bytes())


def pickled(folder, indexes):
    path = latent_files.paths(folder, indexes[0].path)[0]
    np.save(path, np.array([{}], object), allow_pickle=True)


def other_type(folder, indexes):
    path = latent_files.paths(folder, indexes[0].path)[0]
    np.save(path, np.load(path).astype(np.float32))


def not_json(folder, indexes):
    (folder / "latents.json").write_text("{")


def another_version(folder, indexes):
    path = folder / "latents.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))


def no_description(folder, indexes):
    (folder / "latents.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, no_subjects, other_subjects, pickled, other_type, not_json,
     another_version, no_description],
)  # fmt: skip
def test_damage_is_one_error_that_names_the_folder(directory, cached, tmp_path, damage):
    copy = copy_of(cached, tmp_path)
    damage(copy, SubjectSource(directory, "train").indexes)
    with pytest.raises(InputError, match=str(copy)):
        loader(directory, latents=copy)


def test_random_backgrounds_need_some_in_the_cache(directory, autoencoder, tmp_path):
    cache(autoencoder, tmp_path, directory, backgrounds=0)
    with pytest.raises(ValueError, match="on white only"):
        loader(directory, latents=tmp_path, random_background=0.5)
    assert len(list(loader(directory, latents=tmp_path, random_background=0.0, steps=1))) == 1


# --------------------------------------------------------------------------------------------------
# The command


def test_command_writes_them_with_the_autoencoder_of_a_run(
    directory, cached, autoencoder, tmp_path, capsys
):
    checkpoints.save_autoencoder(tmp_path / "autoencoder", autoencoder, {})
    arguments = ["--data", str(directory), "--backgrounds", str(BACKGROUNDS), "--batch-size", "5"]
    arguments += ["--normals-frame", "world"]
    arguments += ["--checkpoint", str(tmp_path / "autoencoder"), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    (out,) = (tmp_path / "out").iterdir()  # named by the autoencoder
    assert everything(out) == everything(cached)
    assert command.main([*arguments, "--split", "nobody"]) == 1
    assert "no shards in split 'nobody'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*arguments, "--shard", "2/2"])
    assert (
        SIZE // CONFIG.downsampling
        == json.loads((out / "latents.json").read_text())["latent_shape"][0]
    )


def test_splits_with_different_numbers_of_views_are_cached_whole(tmp_path, autoencoder):
    data = write_two_splits(tmp_path / "data", 4, 8)
    for split, views in (("train", 4), ("held_out", 8)):
        cache(autoencoder, tmp_path / "latents", data, split=split)
        source = SubjectSource(data, split)
        cached = latent_files.LatentSource(tmp_path / "latents", source.indexes)
        moments = np.empty((1, 2, *cached.description.moments_shape[2:]), np.float32)
        cached.read(source.indexes[0], 2, [views - 1], 0, moments)
        assert np.isfinite(moments).all()
