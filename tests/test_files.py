"""Files and folders that are whole or not there, whatever kills or races their writers."""

import errno
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from spinmeround_jax import files
from tests.support.full_disk import full_disk

FOLDER = pathlib.Path(files.__file__).parent  # imported from there, the module needs no package
BEGIN = f"import os, pathlib, sys\nsys.path.insert(0, {str(FOLDER)!r})\nimport files\n"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Python in a process of its own."""
    command = [sys.executable, "-c", BEGIN + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


KILL = "os.kill(os.getpid(), 9)"


# --------------------------------------------------------------------------------------------------
# Kills


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("call", range(1, 40, 3))
def test_folder_is_whole_after_a_kill_at_any_call(tmp_path, call, there_before):
    """The process kills itself at its n-th system call of these kinds."""
    folder = tmp_path / "head"
    if there_before:
        with files.new_folder(folder) as partial:
            (partial / "old").write_text("old")
    done = run(
        f"""
left = {call}
def hook(event, arguments):
    global left
    if event in ("os.mkdir", "os.rename", "open", "os.remove", "os.rmdir", "shutil.rmtree"):
        if any(str(tmp) in str(a) for a in arguments):
            left -= 1
            if not left:
                os.kill(os.getpid(), 9)
tmp = sys.argv[2]
sys.addaudithook(hook)
with files.new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
""",
        folder,
        tmp_path,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    files.recover(folder)
    if folder.exists():
        assert names(folder) in ({"old"}, {"a", "b"})
    else:
        assert not there_before
    assert names(tmp_path) <= {"head", ".head.lock"}
    with files.new_folder(folder) as partial:  # and the next writer is not in anybody's way
        (partial / "c").write_text("newer")
    assert names(folder) == {"c"} and names(tmp_path) == {"head"}


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "shard"
    for _ in range(2):
        begin = "with files.begun(pathlib.Path(sys.argv[1])) as p:\n    "
        done = run(f"{begin}p.write_text('half'); {KILL}", path)
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".shard.*.unfinished"))) == 1 and not path.exists()
    files.write_atomically(path, b"whole")
    assert names(tmp_path) == {"shard"} and path.read_bytes() == b"whole"


def test_an_error_leaves_what_was_there(tmp_path):
    folder = tmp_path / "head"
    with files.new_folder(folder) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.new_folder(folder) as partial:
        (partial / "new").write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), files.begun(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == {"head"} and names(folder) == {"old"}


# --------------------------------------------------------------------------------------------------
# Races


def test_second_writer_is_told_who_the_first_is(tmp_path):
    path = tmp_path / "shard"
    with files.lock(path):
        for code in ("files.lock(p)", "files.begun(p)", "files.new_folder(p)"):
            done = run(f"p = pathlib.Path(sys.argv[1])\nwith {code}: pass", path)
            assert "BlockingIOError" in done.stderr and f"process {os.getpid()} on " in done.stderr
        with pytest.raises(BlockingIOError) as caught, files.lock(path):
            pass
        assert "is writing here" in files.explain(caught.value)
        assert str(path) in files.explain(caught.value)
        files.recover(path)  # touches nothing of the living
    with files.lock(path):
        pass
    assert names(tmp_path) == set()


def test_lock_of_a_dead_process_is_free(tmp_path):
    path = tmp_path / "shard"
    code = "with files.lock(pathlib.Path(sys.argv[1])): "
    assert run(code + KILL, path).returncode == -signal.SIGKILL
    assert names(tmp_path) == {".shard.lock"}
    with files.lock(path):
        pass
    assert names(tmp_path) == set()


def test_only_one_holds_the_lock_and_waiting_writers_take_turns(tmp_path):
    path, inside, most = tmp_path / "shard", 0, 0

    def hold():
        nonlocal inside, most
        for _ in range(50):
            with files.lock(path, wait=True):
                inside += 1
                most = max(most, inside)
                inside -= 1
            files.write_atomically(tmp_path / "small", b"x" * 1000)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert names(tmp_path) == {"small"} and (tmp_path / "small").stat().st_size == 1000


# --------------------------------------------------------------------------------------------------
# Full disks, odd files, names


def test_full_disk_is_one_line_and_keeps_the_old(tmp_path):
    files.write_atomically(tmp_path / "file", b"old")
    with pytest.raises(OSError, match="file") as caught, full_disk(1000):
        files.write_atomically(tmp_path / "file", b"x" * 5000)
    assert "no space left" in files.explain(caught.value)
    with pytest.raises(OSError, match="head"), full_disk(1000):
        with files.new_folder(tmp_path / "head") as partial:
            (partial / "view.png").write_bytes(b"x" * 5000)
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_bytes() == b"old"


def test_explain_names_the_file_without_numbers_of_errors():
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.png")
    assert files.explain(error) == "a.png: No such file or directory"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert files.explain(full, pathlib.Path("out")).startswith("out: no space left")
    assert files.explain(OSError("a.png: truncated")) == "a.png: truncated"


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    assert files.sha256(path) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", pathlib.Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=str(odd)):
            files.sha256(odd)


def test_seals():
    sealed = files.seal(b"content")
    assert files.unseal(sealed) == b"content"
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="checksum"):
            files.unseal(bytes(damaged))
    for length in range(len(sealed)):
        with pytest.raises(ValueError, match="checksum"):
            files.unseal(sealed[:length])


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a\0b"])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="rename the input"):
        files.name_inside(name)


def test_names_of_people():
    for name in ("alice", "Zoë", "r_0.3", "head 1", "索菲"):
        assert files.name_inside(name) == name
