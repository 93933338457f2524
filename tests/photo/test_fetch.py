"""Getting models: from a server on this machine, resumed, verified, and out of hostile zip files."""

import dataclasses
import functools
import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from spinmeround_jax import files
from spinmeround_jax.photo import assets, fetch
from spinmeround_jax.photo.assets import Archive, Asset, AssetError

MODEL = bytes(range(256)) * 5000
OTHER = b"recognition" * 1000


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


PACK = zipped({"pack/one.onnx": MODEL, "pack/../../two.onnx": OTHER, "/etc/three.onnx": b"evil"})


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and parts of them (Range), which the standard one does not."""

    asked = []  # noqa: RUF012

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        Handler.asked.append(start)
        content = (self.directory_path / self.path[1:]).read_bytes()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])

    @property
    def directory_path(self):
        return fetch.pathlib.Path(self.directory)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Three assets, one with a zip, one alone, one without a known hash; (url, models folder)."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "pack.zip").write_bytes(PACK)
    (site / "alone.onnx").write_bytes(MODEL)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(site))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    pack = Archive("pack.zip", f"{url}/pack.zip", sha256(PACK), len(PACK))
    one = Asset("one.onnx", "does one", "free", pack.url, sha256(MODEL), len(MODEL), pack)
    two = dataclasses.replace(one, name="two.onnx", sha256=sha256(OTHER), size=len(OTHER))
    alone = Asset("alone.onnx", "is alone", "other", f"{url}/alone.onnx", sha256(MODEL), len(MODEL))
    unknown = dataclasses.replace(alone, name="unknown.onnx", sha256=None, size=None, need="asked")
    monkeypatch.setattr(assets, "ASSETS", (one, two, alone, unknown))
    Handler.asked.clear()
    yield site, tmp_path / "models"
    server.shutdown()
    server.server_close()
    thread.join()


def run(folder, *arguments):
    return fetch.main(["--models", str(folder), *(str(argument) for argument in arguments)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_needed_is_fetched_once(served, capsys):
    _, folder = served
    assert run(folder) == 0
    assert names(folder) == ["alone.onnx", "one.onnx", "two.onnx"]
    assert (folder / "two.onnx").read_bytes() == OTHER
    captured = capsys.readouterr()
    assert "licence: free" in captured.err
    assert captured.out.count("ok ") == 3
    assert len(Handler.asked) == 2
    assert run(folder) == 0
    assert len(Handler.asked) == 2
    # Nothing of the zip file landed where its names pointed.
    assert not (folder.parent / "two.onnx").exists()
    assert not list(folder.parent.rglob("three.onnx"))


def test_an_interrupted_download_goes_on(served):
    _, folder = served
    folder.mkdir()
    (folder / "alone.onnx.part").write_bytes(MODEL[:1000])
    assert run(folder) == 0
    assert 1000 in Handler.asked
    assert (folder / "alone.onnx").read_bytes() == MODEL


def test_a_changed_file_is_refused(served, capsys):
    site, folder = served
    (site / "alone.onnx").write_bytes(MODEL[:-1] + b"!")
    assert run(folder) == 1
    assert "do not use it" in capsys.readouterr().err
    assert names(folder) == ["one.onnx", "two.onnx"]
    # A damaged file that is already there is named.
    (folder / "one.onnx").write_bytes(b"damaged")
    assert run(folder) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_server_that_sends_too_much_or_breaks_off(served, capsys, monkeypatch):
    site, folder = served
    (site / "alone.onnx").write_bytes(MODEL + b"0" * 30_000_000)
    assert run(folder) == 1
    assert "sends more than the file has" in capsys.readouterr().err
    assert sum(path.stat().st_size for path in folder.glob("alone*")) <= len(MODEL)

    def broken(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"not a length\r\n")

    monkeypatch.setattr(Handler, "do_GET", broken)
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")
    for part in folder.glob("*.part"):
        part.unlink()
    assert run(folder) == 1
    assert "cannot be downloaded" in capsys.readouterr().err


def test_two_fetches_do_not_share_a_file(served, capsys):
    _, folder = served
    folder.mkdir()
    with files.lock(folder / "pack.zip.part"):
        assert run(folder) == 1
    assert "is writing here" in capsys.readouterr().err
    assert run(folder) == 0


def test_no_home(monkeypatch, capsys):
    monkeypatch.delenv("SPINMEROUND_MODELS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(fetch.pathlib.Path, "home", nobody)
    assert fetch.main(["--list"]) == 1
    assert "$SPINMEROUND_MODELS" in capsys.readouterr().err


def test_no_server(served, capsys):
    site, folder = served
    (site / "pack.zip").unlink()
    assert run(folder) == 1
    assert "--from" in capsys.readouterr().err
    assert not list(folder.glob("*.onnx"))


def test_without_a_network(served, tmp_path, capsys):
    _, folder = served
    local = tmp_path / "downloads"
    local.mkdir()
    (local / "any name.zip").write_bytes(PACK)
    (local / "resnet.onnx").write_bytes(MODEL)
    Handler.asked.clear()
    # By content: one.onnx and alone.onnx are the same bytes here, so the first takes it.
    assert run(folder, "--from", local / "any name.zip") == 0
    (local / "bad.onnx").write_bytes(b"bad")
    assert run(folder, "--from", local / "bad.onnx") == 1
    assert "none of the files needed" in capsys.readouterr().err
    assert run(folder, "--from", local / "nothing") == 1


def test_a_model_without_a_published_hash(served, capsys):
    site, folder = served
    (site / "alone.onnx").write_bytes(MODEL)
    assert run(folder, "--also", "unknown.onnx") == 0
    assert "no published SHA-256" in capsys.readouterr().err
    assert (folder / "unknown.onnx.sha256").read_text().split()[0] == sha256(MODEL)
    (folder / "unknown.onnx").unlink()
    (site / "alone.onnx").write_bytes(OTHER)
    assert run(folder, "--also", "unknown.onnx") == 1
    assert not (folder / "unknown.onnx").exists()


def test_broken_and_swollen_zip_files(served, tmp_path):
    _, folder = served
    folder.mkdir()
    archive = assets.ASSETS[0].archive
    path = tmp_path / "a.zip"
    for content, message in (
        (b"PK\x03\x04 nothing", "a broken zip file"),
        (PACK[:2000], "a broken zip file"),
        (zipped({"one.onnx": MODEL}), "no two.onnx in it"),
        (zipped({"one.onnx": MODEL + b"0" * 10_000_000, "two.onnx": OTHER}), "a wrong size"),
    ):
        path.write_bytes(content)
        with pytest.raises(AssetError, match=message):
            fetch.extract(path, archive, folder)
    assert "two.onnx" not in names(folder)


def test_the_list_says_whose_models_they_are(capsys, tmp_path):
    assert run(tmp_path, "--list") == 0
    text = capsys.readouterr().out
    for asset in assets.ASSETS:
        assert asset.name in text
        assert asset.licence in text
        assert asset.url.startswith("https://")
        assert asset.sha256 is None or len(asset.sha256) == 64
    assert text.count("non-commercial") >= 4


def test_where_models_live(monkeypatch, tmp_path):
    monkeypatch.setenv("SPINMEROUND_MODELS", str(tmp_path / "a"))
    assert assets.models_folder() == tmp_path / "a"
    monkeypatch.delenv("SPINMEROUND_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert assets.models_folder() == tmp_path / "b" / "spinmeround_jax" / "models"
    assert assets.models_folder(tmp_path) == tmp_path
    # As insightface unpacks its zip file.
    nested = tmp_path / "antelopev2" / "antelopev2"
    nested.mkdir(parents=True)
    (nested / assets.DETECTOR.name).write_bytes(b"")
    assert assets.require(assets.DETECTOR, tmp_path) == nested / assets.DETECTOR.name
