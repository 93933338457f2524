"""The writing loop of the data factory: shares, kills, full disks, subjects that cannot be made."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

pytest.importorskip("google_crc32c", reason="writing shards needs '.[train]'")

from data_prep import factory
from spinmeround_jax.data import shards
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.files import InputError, as_path
from tests.support.factory_source import Synthetic
from tests.support.full_disk import full_disk
from tests.support.paths import ROOT


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder):
    """Subjects of all shards that the manifest tells of, in order."""
    found = []
    for entries in read_manifest(folder)["splits"].values():
        for entry in entries:
            index = shards.read_index(folder / entry["file"])
            assert len(index.subjects) == entry["subjects"]
            found += index.subjects.tolist()
    return found


def everyone(count, without=()):
    return [f"person-{number}" for number in range(count + 1) if number not in without]


def command(folder, *more):
    script = ROOT / "tests" / "support" / "factory_source.py"
    return [sys.executable, str(script), "--out", str(folder), "--shard-subjects", "2", *more]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def children(pid):
    """Process ids of the (spawned) children of a process."""
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()]


def runs(pid):
    """Whether there is such a process that is not only waiting to be collected."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_killed_and_resumed_is_the_same_as_never_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert factory.write_dataset(Synthetic(9, bad=(4,)), whole, 2)
    assert names_in(whole) == everyone(9, {4})

    process = subprocess.Popen(
        command(killed, "--workers", "2", "--seconds", "0.15"),
        env=environment(), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        # Two shards there and the third begun, which is the one with the rejected subject.
        wait_until(lambda: len(list(killed.glob("*.tfrecord"))) == 2)
        wait_until(lambda: list(killed.glob(".*.unfinished")))
        workers = children(process.pid)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "manifest.json").exists() and list(killed.glob(".*.unfinished"))
    assert len(workers) >= 2
    wait_until(lambda: not any(map(runs, workers)), 20)
    kept = {p.name: p.stat().st_mtime_ns for p in killed.glob("*.tfrecord")}

    done = subprocess.run(
        command(killed, "--workers", "1"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 10 were rejected" in done.stdout
    assert contents(killed) == contents(whole)
    assert all((killed / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())


def test_a_second_process_on_the_same_folder_is_told_of_the_first(tmp_path):
    source, both = Synthetic(9, bad=(4,)), tmp_path / "both"
    assert factory.write_dataset(source, tmp_path / "alone", 2)
    first = subprocess.Popen(
        command(both, "--workers", "1", "--seconds", "0.3"),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_until(lambda: list(both.glob(".train-*.lock")))
        with pytest.raises(BlockingIOError, match=rf"process {first.pid} on .* is writing here"):
            factory.write_dataset(source, both, 2)
        assert first.wait(120) == 0, first.stderr.read()
    finally:
        first.kill()
        first.communicate()
    assert contents(both) == contents(tmp_path / "alone")


def test_machines_share_the_work(tmp_path, capsys):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    source = Synthetic(9, bad=(4,))
    factory.write_dataset(source, alone, 2)
    finished = [factory.write_dataset(source, shared, 2, share=(i, 3)) for i in (2, 0, 1)]
    assert finished == [False, False, True]
    assert "1 of 6 shards are there" not in capsys.readouterr().out.splitlines()[-1]
    assert contents(shared) == contents(alone)


def test_shares_written_apart_can_be_collected(tmp_path):
    source = Synthetic(5)
    collected = tmp_path / "collected"
    for i in range(2):
        part = tmp_path / str(i)
        assert not factory.write_dataset(source, part, 2, share=(i, 2))
        assert not (part / "manifest.json").exists()
        collected.mkdir(exist_ok=True)
        for path in part.iterdir():
            (collected / path.name).write_bytes(path.read_bytes())
    assert factory.write_dataset(source, collected, 2)
    assert names_in(collected) == everyone(5)


def test_rejected_subjects_are_listed_and_counted(tmp_path, capsys):
    factory.write_dataset(Synthetic(6, bad=(1, 4, 5)), tmp_path, 2)
    manifest = read_manifest(tmp_path)
    assert manifest["rejected"] == 3 and names_in(tmp_path) == everyone(6, {1, 4, 5})
    # All of the third shard was rejected: there is no such file.
    assert [entry["subjects"] for entry in manifest["splits"]["train"]] == [1, 2]
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["subject"] for line in lines] == ["person-1", "person-4", "person-5"]
    assert lines[0] == {
        "subject": "person-1",
        "split": "train",
        "reason": "number 1 is no good",
    }
    assert "3 of 7 were rejected" in capsys.readouterr().out

    # They are not tried again, unless it is asked for; then the files are as if all had been good.
    factory.write_dataset(Synthetic(6), tmp_path, 2)
    assert names_in(tmp_path) == everyone(6, {1, 4, 5})
    factory.write_dataset(Synthetic(6), tmp_path, 2, retry_rejected=True)
    factory.write_dataset(Synthetic(6), tmp_path / "clean", 2)
    found = contents(tmp_path / "clean")
    (tmp_path / "clean").rename(tmp_path.parent / "clean")
    assert contents(tmp_path) == found


def test_a_shard_whose_subjects_are_rejected_later_disappears(tmp_path):
    factory.write_dataset(Synthetic(4, bad=(2,)), tmp_path, 2)
    factory.write_dataset(Synthetic(4, bad=(2, 3)), tmp_path, 2, retry_rejected=True)
    assert names_in(tmp_path) == everyone(4, {2, 3})
    assert not list(tmp_path.glob("train-00001*.tfrecord*npz"))


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(InputError, match="every subject was rejected"):
        factory.write_dataset(Synthetic(1, bad=(0, 1)), tmp_path, 2)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path):
    whole, new = tmp_path / "whole", tmp_path / "new"
    source = Synthetic(6, bad=(1, 2))
    factory.write_dataset(source, whole, 3)
    # The first shard, with one subject, still fits; the next, with three, does not.
    limit = (whole / "train-00000-of-00002.tfrecord").stat().st_size + 64
    with pytest.raises(OSError, match=r"No space|File too large"):
        with full_disk(limit):
            factory.write_dataset(source, new, 3)
    left = {path.name for path in new.iterdir()} - {factory.SETTINGS}
    assert len(left) == 3 and all(name.startswith("train-00000-of") for name in left)
    factory.write_dataset(source, new, 3)
    assert contents(new) == contents(whole)


@dataclasses.dataclass(frozen=True)
class Broken(Synthetic):
    """Its fourth subject ends in another way than by being rejected."""

    how: str = "error"

    def records(self, subject):
        if subject == "person-3" and self.how == "error":
            raise ZeroDivisionError("a fault in the source")
        if subject == "person-3" and self.how == "unreadable":
            raise PermissionError(13, "Permission denied", "scans/person-3.obj")
        if subject == "person-3":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().records(subject)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_in_the_source_names_the_subject(tmp_path, workers):
    with pytest.raises(ZeroDivisionError) as caught:
        factory.write_dataset(Broken(), tmp_path, 2, workers)
    assert caught.value.__notes__ == ["while making subject 'person-3'"]
    left = {path.name for path in tmp_path.iterdir()} - {factory.SETTINGS}
    assert len(left) == 2 and all(name.startswith("train-00000-of") for name in left)


def test_unreadable_input_names_the_file(tmp_path):
    with pytest.raises(PermissionError, match=r"Permission denied.*person-3\.obj"):
        factory.write_dataset(Broken(how="unreadable"), tmp_path, 2)


@pytest.mark.parametrize("processes", [1, 2, 3])  # the resource tracker, then the workers
def test_sigterm_does_not_wait_for_subjects_that_are_being_made(tmp_path, processes):
    process = subprocess.Popen(
        command(tmp_path, "--workers", "2", "--seconds", "3600"),
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(children(process.pid)) >= processes)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped; the same command resumes" in told
    assert "Traceback" not in told


def test_a_killed_worker_ends_the_run(tmp_path):
    with pytest.raises(BrokenProcessPool):
        factory.write_dataset(Broken(how="kill"), tmp_path, 2, workers=2)
    assert not (tmp_path / "manifest.json").exists()
    factory.write_dataset(Synthetic(), tmp_path, 2)
    assert names_in(tmp_path) == everyone(9)


def test_settings_that_differ_are_refused(tmp_path):
    factory.write_dataset(Synthetic(3), tmp_path, 2)
    with pytest.raises(InputError, match=r"other settings.*count: 3 -> 4"):
        factory.write_dataset(Synthetic(4), tmp_path, 2)
    with pytest.raises(InputError, match="shard_subjects"):
        factory.write_dataset(Synthetic(3), tmp_path, 3)
    (tmp_path / factory.SETTINGS).write_text('{"of": "another source"}')
    with pytest.raises(InputError, match="of: 'another source' -> None"):
        factory.write_dataset(Synthetic(3), tmp_path, 2)


@pytest.mark.parametrize("content", [b"", b"\xff", b"3", b'{"subject": 1}\n'])
def test_a_damaged_list_of_rejects_is_named(tmp_path, content):
    factory.write_dataset(Synthetic(3, bad=(2,)), tmp_path, 2)
    (path,) = tmp_path.glob("train*.rejected.jsonl")
    path.write_bytes(content)
    if not content:  # nobody was rejected, so the shard lacks one: it is made again
        factory.write_dataset(Synthetic(3), tmp_path, 2)
        assert names_in(tmp_path) == everyone(3)
        return
    with pytest.raises(InputError, match=r"rejected\.jsonl: damaged.*delete it"):
        factory.write_dataset(Synthetic(3), tmp_path, 2)


def test_one_name_twice_is_refused():
    source = dataclasses.replace(Synthetic(2))
    object.__setattr__(source, "subjects", lambda: {"train": ["a", "b"], "held_out": ["b"]})
    with pytest.raises(InputError, match="two subjects are named 'b'"):
        factory.plan(source, pathlib.Path("x"), 2)


def test_a_bucket_is_written_and_resumed(tmp_path):
    pytest.importorskip("upath", reason="buckets need '.[gcs]'")
    bucket = as_path("memory://factory/heads")
    with pytest.raises(ZeroDivisionError):
        factory.write_dataset(Broken(9, bad=(1,)), bucket, 2)
    first = bucket / "train-00000-of-00005.tfrecord"
    before = first.read_bytes()
    assert not (bucket / "manifest.json").exists()
    factory.write_dataset(Synthetic(9, bad=(1,)), bucket, 2)
    assert first.read_bytes() == before and names_in(bucket) == everyone(9, {1})
    factory.write_dataset(Synthetic(9, bad=(1,)), tmp_path, 2)
    assert {path.name: path.read_bytes() for path in bucket.iterdir()} == contents(tmp_path)


def test_an_interrupted_shard_is_written_from_its_beginning(tmp_path):
    factory.write_dataset(Synthetic(3), tmp_path, 2)
    before = contents(tmp_path)
    first = tmp_path / "train-00000-of-00002.tfrecord"
    shards.index_path(first).unlink()  # as if killed before it was written
    factory.write_dataset(Synthetic(3), tmp_path, 2)
    second = tmp_path / "train-00001-of-00002.tfrecord"
    # As if from a run with other people: complete, but not what belongs there.
    other = tmp_path / "held_out-00000-of-00001.tfrecord"
    second.write_bytes(other.read_bytes())
    shards.index_path(second).write_bytes(shards.index_path(other).read_bytes())
    factory.write_dataset(Synthetic(3), tmp_path, 2)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    for name in before:
        if name.endswith(".npz"):
            with np.load(tmp_path / name) as arrays:
                assert arrays["subjects"].dtype.kind == "U"
        else:
            assert after[name] == before[name], name
