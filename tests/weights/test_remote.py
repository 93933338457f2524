"""Model folders by name: from a stand-in for the Hugging Face Hub, and from a bucket in memory."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import upath

from spinmeround_jax import checkpoints, evaluate, sample
from spinmeround_jax.files import InputError
from spinmeround_jax.models import parameters
from spinmeround_jax.weights import remote
from tests.support.hub_server import Hub
from tests.support.paths import ROOT
from tests.support.tiny_model import random_model

SECRET = "hf_unspeakable"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    checkpoints.save_model(folder, random_model(), {"command": "train", "seed": 1}, np.float32)
    return folder


def same_weights(found, expected):
    found, expected = (
        parameters.split(checkpoints.load_model(f).unet)[1] for f in (found, expected)
    )
    return all(np.array_equal(found[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------------------------
# The hub, whose client reads its environment when it is imported


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the extra [hub]")
    hub = Hub()
    with hub.serving() as hub.url:
        yield hub


def locate(name, home, url, **environment):
    """What `remote.locate` gives or prints in a process of its own."""
    code = (
        "import sys; from spinmeround_jax import cli; from spinmeround_jax.weights import remote\n"
        "sys.exit(cli.guarded(lambda: print(*remote.locate(sys.argv[1]).__dict__.values()), ''))"
    )
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": SECRET, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert SECRET not in done.stdout + done.stderr
    return done.stdout.split() if done.returncode == 0 else done.stderr.splitlines()[-1]


def test_a_model_of_the_hub(hub, folder, tmp_path):
    commit = hub.publish("owner/head-model", folder)
    path, name, origin = locate("hf://owner/head-model", tmp_path, hub.url)
    assert (name, origin) == ("head-model", f"hf://owner/head-model@{commit}")
    assert tmp_path in type(tmp_path)(path).parents
    assert same_weights(path, folder)
    asked = len(hub.requests)
    assert locate("hf://owner/head-model", tmp_path, hub.url)[0] == path
    assert not any("/resolve/" in line for line in hub.requests[asked:]), "it was in the cache"

    # Another revision beside it; and without a network what is in the cache.
    other = hub.publish("owner/head-model", folder, "v1.0")
    assert locate("hf://owner/head-model@v1.0", tmp_path, hub.url)[2].endswith(other)
    assert locate(origin, tmp_path, hub.url)[0] == path
    for away in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert locate("hf://owner/head-model", tmp_path, hub.url, **away)[2] == origin
        message = locate("hf://owner/other", tmp_path, hub.url, **away)
        assert message.startswith("error: hf://owner/other: the hub cannot be reached"), message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://owner/model@v9", "has no revision 'v9'"),
        ("hf://owner/none", "no such repository, or a private one"),
        ("hf://owner/gated", "asks for an agreement"),
        ("hf://owner/broken", "the hub cannot be reached or has a fault"),
        ("hf://owner/data", "has no model.json"),
    ],
)
def test_what_the_hub_does_not_have(hub, folder, tmp_path, name, message):
    hub.publish("owner/model", folder)
    hub.status = {"owner/gated": (403, "GatedRepo"), "owner/broken": (500, "fault")}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("other things")
    hub.publish("owner/data", tmp_path / "data")
    found = locate(name, tmp_path / "home", hub.url)
    assert found.startswith(f"error: {name}: ") and message in found, found


def test_a_server_cannot_write_elsewhere(hub, folder, tmp_path):
    hub.publish("owner/model", folder)
    hub.extra_paths = ["weights/../../../../../../outside", "weights/./../../x"]
    found = locate("hf://owner/model", tmp_path / "a" / "b", hub.url)
    assert "cannot be downloaded" in found
    assert not list(tmp_path.rglob("outside")) and not list(tmp_path.rglob("x"))


@pytest.mark.parametrize(
    "name",
    [
        "hf://", "hf://owner", "hf://owner/", "hf://owner/name/more", "hf://../name", "hf://a/..",
        "hf://owner/na..me", "hf://owner/name@", "hf://owner/name@../../x", "hf://owner/name@a/../b",
        "hf://owner/name@/etc", "hf://owner/name\n", "hf://o:p@host/name", "hf://owner/name?x=1",
    ],
)  # fmt: skip
def test_names_that_are_none(name):
    with pytest.raises(InputError, match=r"expected hf://owner/name"):
        remote.locate(name)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'spinmeround_jax\[hub\]'"):
        remote.locate("hf://owner/never-asked-for")


# --------------------------------------------------------------------------------------------------
# Buckets


@pytest.fixture
def bucket(folder, tmp_path, monkeypatch):
    """The URL of a copy of `folder`, another one for each test: a name is looked up once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://models/{tmp_path.name}"
    upath.UPath(url).fs.put(str(folder), upath.UPath(url).path, recursive=True)
    return url


def test_a_model_in_a_bucket(bucket, folder, tmp_path):
    assert same_weights(bucket, folder)
    assert checkpoints.describe(f"{bucket}/").provenance == {"command": "train", "seed": 1}
    found = remote.locate(bucket)
    assert (found.name, found.origin) == (tmp_path.name, bucket)
    assert len(list((tmp_path / "cache" / "spinmeround_jax" / "weights").iterdir())) == 1


def test_the_commands_take_names(bucket, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--unconditional", "1", "--steps", "2", "--yaw-pitch", "30,0", "--out", str(out)]
    assert sample.main(["--checkpoint", bucket, *arguments]) == 0
    settings = json.loads((out / "new_0000" / "settings.json").read_text())
    assert settings["checkpoint"] == bucket
    capsys.readouterr()
    arguments = ["--data", str(tmp_path / "none"), "--out", str(out), "--checkpoint"]
    assert evaluate.main([*arguments, "a=hf://owner"]) == 1
    assert "expected hf://owner/name" in capsys.readouterr().err


def test_faults_of_a_bucket(bucket, tmp_path):
    path = upath.UPath(bucket)
    with pytest.raises(
        InputError, match=r"model\.json: damaged, its SHA-256 is not that in SHA256SUMS"
    ):
        (path / "model.json").write_text("{}")
        remote.locate(bucket)
    with pytest.raises(InputError, match=r"model\.json is missing"):
        (path / "model.json").unlink()
        remote.locate(bucket)
    with pytest.raises(InputError, match="SHA256SUMS: damaged"):
        (path / "SHA256SUMS").write_text(f"{'0' * 64}  ../outside\n")
        remote.locate(bucket)
    with pytest.raises(InputError, match="SHA256SUMS is missing"):
        (path / "SHA256SUMS").unlink()
        remote.locate(bucket)
    with pytest.raises((InputError, OSError), match="nosuchprotocol://"):
        remote.locate("nosuchprotocol://a/b")
    assert not any(p.is_dir() for p in tmp_path.glob("cache/spinmeround_jax/weights/*"))


def test_damage_in_the_cache_is_told(bucket, tmp_path):
    path = remote.locate(bucket).path
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(b"\0" + largest.read_bytes()[1:])
    with pytest.raises(InputError, match="damaged or edited"):
        checkpoints.load_model(bucket)
    shutil.rmtree(path)
