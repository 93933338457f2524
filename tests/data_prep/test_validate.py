"""`python -m data_prep.validate` finds every kind of fault, names it, and shows sound data as sound."""

import dataclasses
import json

import numpy as np
import pytest

from data_prep import validate
from data_prep.validation import checks
from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest, shard_name, write_manifest
from tests.support.synthetic_shards import ball, make_records

SIZE, VIEWS = 32, 4


def head(subject: int) -> list[records.ViewRecord]:
    """A ball seen from all around, with its true normals."""
    views = []
    for record in make_records(subject, VIEWS, SIZE):
        rgba, normals = ball(SIZE, record.world_to_camera)
        pictures = records.encode_view(rgba, normals, record.world_to_camera)
        views.append(dataclasses.replace(record, **pictures))
    return views


def write(folder, splits: dict[str, list[list[records.ViewRecord]]]):
    """One shard for each split."""
    folder.mkdir(exist_ok=True)
    entries = {}
    for split, subjects in splits.items():
        name = shard_name(split, 0, 1)
        with shards.ShardWriter(folder / name) as writer:
            for views in subjects:
                writer.write_subject(views)
        entries[split] = [{"file": name, "subjects": len(subjects)}]
    facts = {"image_size": SIZE, "views": VIEWS, "seed": 0, "source": "balls", "license": "CC0-1.0"}
    write_manifest(folder, {**facts, "splits": entries})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data", {"train": [head(0), head(1)], "held_out": [head(2)]})
    return tmp_path / "data"


def report_of(folder, code: int) -> dict:
    assert validate.main([str(folder), "--workers", "1"]) == code
    return json.loads((folder / "validation" / "validation.json").read_text())


def test_sound_data_has_no_faults_and_a_page_with_pictures(folder, capsys):
    report = report_of(folder, 0)
    assert report["faults"] == [] and report["shards_without_hash"] == []
    train = report["statistics"]["train"]
    assert (train["subjects"], train["records"]) == (2, 2 * VIEWS)
    assert train["formats"] == {"image: PNG": 8, "normals: PNG": 8}
    assert 0.4 < train["coverage"]["mean"] < 0.7
    page = (folder / "validation" / "validation.html").read_text()
    assert "No faults" in page and page.count("data:image/webp;base64,") == 3
    assert "person-2" in page and "http" not in page
    assert "0 faults" in capsys.readouterr().out


def test_several_processes_find_what_one_does(folder, tmp_path):
    path = folder / shard_name("train", 0, 1)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    one = report_of(folder, 1)
    out = tmp_path / "out"
    assert validate.main([str(folder), "--workers", "2", "--out", str(out)]) == 1
    two = json.loads((out / "validation.json").read_text())
    assert two["faults"] == one["faults"] and len(one["faults"]) == 2
    assert "sha256" in one["faults"][0]
    assert f"record {2 * VIEWS - 1} at byte" in one["faults"][1]


def with_first(views, **changes):
    return [dataclasses.replace(views[0], **changes), *views[1:]]


def pictures(change):
    """A head whose first picture or normals are changed before they are stored."""
    views = head(0)
    rgba, normals = change(*ball(SIZE, views[0].world_to_camera))
    return with_first(
        views, image=records.encode_image(rgba), normals=records.encode_normals(normals)
    )


def rolled(views):
    turn = np.eye(4, dtype=np.float32)
    turn[:2, :2] = [[0, -1], [1, 0]]
    return with_first(views, world_to_camera=turn @ views[0].world_to_camera)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (lambda: pictures(lambda rgba, normals: (rgba * 0, normals * 0)), "image is empty"),
        (lambda: pictures(lambda rgba, normals: (rgba, normals * 0.8)), "not of unit length"),
        (lambda: pictures(lambda rgba, normals: (rgba, -normals)), "do not face the camera"),
        (
            lambda: pictures(lambda rgba, normals: (rgba, np.where(normals == 0, 0.3, normals))),
            "outside the mask are not grey",
        ),
        (lambda: rolled(head(0)), "is rolled or displaced"),
    ],
)
def test_faults_that_the_writer_cannot_see_are_named(folder, views, message):
    write(folder, {"train": [views(), head(1)]})
    (fault,) = report_of(folder, 1)["faults"]
    assert message in fault
    assert (
        "train-00000-of-00001.tfrecord: record 0 at byte 0" in fault and "person-0 view 0" in fault
    )


def test_nobody_is_in_two_splits(folder):
    renamed = [dataclasses.replace(view, subject="somebody") for view in head(1)]
    write(folder, {"train": [head(0), head(1)], "held_out": [head(0), renamed]})
    faults = report_of(folder, 1)["faults"]
    assert sum("'person-0' of split held_out is also in" in fault for fault in faults) == 1
    assert sum("'person-1' of split train has the identity of 'somebody'" in f for f in faults) == 1
    assert len(faults) == 3  # person-0 has his own identity in both, too


def test_missing_shards_and_wrong_counts(folder):
    (folder / shard_name("held_out", 0, 1)).unlink()
    manifest = read_manifest(folder)
    manifest["splits"]["train"][0]["subjects"] = 5
    write_manifest(folder, manifest)
    faults = report_of(folder, 1)["faults"]
    assert any("cannot be opened" in fault for fault in faults)
    assert any("(2, 4), manifest.json says (5, 4)" in fault for fault in faults)


def test_what_is_no_data_set_is_one_error(tmp_path, capsys):
    assert validate.main([str(tmp_path)]) == 2
    assert "manifest.json: no such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_camera_that_is_no_rotation():
    record = make_records(0, 1)[0]
    bad = dataclasses.replace(record, world_to_camera=record.world_to_camera * 1.01)
    assert "no rigid pose" in next(checks.camera_faults(bad))
    assert list(checks.camera_faults(record)) == []
    assert list(checks.identity_faults(np.full(512, 0.1), record.id_embedding)) != []
    assert cameras.orbit(record.yaw, record.pitch).shape == (4, 4)
