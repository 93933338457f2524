"""Models in the formats of others, and back; model cards."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from spinmeround_jax import checkpoints, convert
from spinmeround_jax.models import Model, parameters
from spinmeround_jax.weights import card, diffusers, export, released, sources
from tests.support.tiny_model import CONFIG, NETWORKS, random_model

MEAN, STD = tuple(np.linspace(-0.2, 0.3, 8)), tuple(np.linspace(0.5, 1.5, 8))
PROVENANCE = {
    "command": "python -m spinmeround_jax.train --config=configs/quickstart.py",
    "seed": 0,
    "data": {"source": "data_prep.render_heads: people", "license": "CC0-1.0"},
    "sampling": {**dataclasses.asdict(checkpoints.RELEASED), "steps": 12},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that uses all of float32, with statistics of latents."""
    model = random_model()
    config = dataclasses.replace(CONFIG, latent_mean=MEAN, latent_std=STD)
    folder = tmp_path_factory.mktemp("export") / "model"
    checkpoints.save_model(folder, Model(config, **model.networks), PROVENANCE, np.float32)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    out = folder.parent / "theirs"
    assert run("--export", "diffusers", "--checkpoint", folder, "--out", out) == 0
    return out


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def weights_of(folder):
    model = checkpoints.load_model(folder)
    return {name: parameters.split(getattr(model, name))[1] for name in NETWORKS}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].keys() == values.keys()
        for key, value in values.items():
            np.testing.assert_array_equal(found[name][key], value, err_msg=f"{name}/{key}")


def test_with_the_names_of_the_release_and_back(folder, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    assert run("--export", "released", "--checkpoint", folder, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"spmr.safetensors", "README.md"}
    tensors = load_file(out / "spmr.safetensors")
    prefixes = (released.UNET_PREFIX, released.AUTOENCODER_PREFIX, released.IDENTITY_PREFIX)
    assert all(name.startswith(prefixes) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}

    assert run("--released", out / "spmr.safetensors", "--out", back) == 0
    assert_same(weights_of(back), weights_of(folder))
    found = checkpoints.describe(back)
    assert found.config.latent_std == STD and found.sampling.steps == 12
    assert found.config == checkpoints.describe(folder).config
    assert found.provenance["command"] == PROVENANCE["command"]
    assert [source["file"] for source in found.provenance["sources"]] == ["spmr.safetensors"]


def test_folders_of_diffusers_and_transformers(folder, theirs):
    ours = checkpoints.load_model(folder)
    found = {}
    for name, file in (
        ("autoencoder", "vae/diffusion_pytorch_model"),
        ("identity", "text_encoder/model"),
    ):
        opened = sources.open_file(theirs / f"{file}.safetensors")
        table = diffusers.targets(getattr(ours, name), opened.shapes)
        assert table.keys() == opened.shapes.keys()
        values = {n: t.value(opened.read(n), np.dtype(np.float32)) for n, t in table.items()}
        found[name] = {table[n].name: value for n, value in values.items()}
    expected = weights_of(folder)
    unet = load_file(theirs / "unet" / "diffusion_pytorch_model.safetensors")
    assert sum(t.size for t in unet.values()) == parameters.count(expected.pop("unet"))
    given = parameters.split(ours.unet)[1]["conv_in/kernel"]
    np.testing.assert_array_equal(unet["conv_in.weight"], np.transpose(given, (3, 2, 0, 1)))
    assert_same(found, expected)


def test_statistics_of_latents_are_not_lost(theirs):
    config = json.loads((theirs / "vae" / "config.json").read_text())
    # diffusers: (z - mean) * scaling_factor / std
    mean = np.multiply(config["latents_mean"], config["scaling_factor"])
    np.testing.assert_allclose(mean, MEAN[:4])
    assert config["latents_std"] == list(STD[:4])
    text = (theirs / "README.md").read_text()
    assert all(f"{value:.6g}" in text for value in MEAN + STD)
    file = sources.open_file(theirs / "unet" / "diffusion_pytorch_model.safetensors")
    described = file.metadata[export.METADATA].encode()
    assert checkpoints.parse_description(described, "x")[0].latent_mean == MEAN


def changed(folder, copy, network, **changes):
    """A copy with another config, as of a model with parts that others lack."""
    shutil.copytree(folder, copy)
    (copy / checkpoints.SUMS).unlink()
    description = json.loads((copy / "model.json").read_text())
    description["config"][network] |= changes
    (copy / "model.json").write_text(json.dumps(description))
    return copy


@pytest.mark.parametrize(
    ("format_", "network", "changes", "message"),
    [
        ("released", "autoencoder", {"linear_path": True}, "autoencoder.linear_path is on"),
        ("diffusers", "autoencoder", {"linear_path": True}, "autoencoder.linear_path is on"),
        ("diffusers", "autoencoder", {"channel_mult": [2, 2]}, "autoencoder.channel_mult begins"),
        ("diffusers", "unet", {"channel_mult": [2]}, "unet.channel_mult begins with 2"),
    ],
)
def test_what_others_cannot_compute_is_refused(
    folder, tmp_path, capsys, format_, network, changes, message
):
    model = changed(folder, tmp_path / "model", network, **changes)
    assert run("--export", format_, "--checkpoint", model, "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_float16(tmp_path, capsys):
    model = random_model()
    model.unet.conv_out.bias[...] = np.full(8, 1e6, np.float32)
    checkpoints.save_model(tmp_path / "model", model, {}, np.float32)
    arguments = [
        "--export",
        "released",
        "--checkpoint",
        tmp_path / "model",
        "--out",
        tmp_path / "out",
    ]
    assert run(*arguments, "--dtype", "float16") == 1
    assert "model.diffusion_model.out.2.bias: not finite as float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_usage(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, message in (
        (["--export", "released"], "need each other"),
        (["--checkpoint", folder, "--run", tmp_path], "need each other"),
        (["--export", "released", "--checkpoint", folder, "--run", tmp_path], "give --released"),
    ):
        assert run(*arguments, "--out", out) == 2
        assert message in capsys.readouterr().err and not out.exists()
    assert run("--export", "released", "--checkpoint", tmp_path / "no", "--out", out) == 1
    assert "no such file" in capsys.readouterr().err and not out.exists()

    # Nothing is replaced unasked, and a model never by an export.
    (out / "unet").mkdir(parents=True)
    arguments = ["--export", "diffusers", "--checkpoint", folder, "--out"]
    assert run(*arguments, out) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert run(*arguments, folder, "--overwrite") == 2
    assert "holds other things" in capsys.readouterr().err
    assert run(*arguments, out, "--overwrite") == 0
    assert (out / "unet" / "config.json").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "{", "not usable JSON"),
        (lambda text: text.replace('"heads": 2', '"heads": 0'), "heads"),
        (lambda text: text.replace('"res_blocks": 1', '"res_blocks": 10000000'), "res_blocks"),
        (lambda text: text.replace('"kind": "model"', '"kind": "autoencoder"'), "holds 'autoencoder'"),
        (lambda text: text.replace('"width": 512', '"width": 1024'), "the other networks need 1024"),
    ],
)  # fmt: skip
def test_a_strangers_metadata(tmp_path, capsys, damage, message):
    text = checkpoints.description_text(CONFIG, {})
    assert damage(text) != text
    tensors = {"a": np.zeros(1, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors", {export.METADATA: damage(text)})
    assert run("--released", tmp_path / "a.safetensors", "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Model cards


def front_matter(text):
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_a_model_has_a_card(folder, theirs):
    for place, tag in ((folder, "jax"), (theirs, "safetensors")):
        matter, body = front_matter((place / "README.md").read_text())
        assert matter["library_name"] == "spinmeround_jax" and tag in matter["tags"]
        assert {"license", "pipeline_tag"} < matter.keys()
        for known in (PROVENANCE["command"], "CC0-1.0", "expect little of photographs", "| `0` |"):
            assert known in body


def test_a_card_may_be_edited(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    assert_same(weights_of(tmp_path / "model"), weights_of(folder))


def test_provenance_is_inert_in_a_card():
    hostile = "x`\n---\nlicense: mit\n---\n| <script>alert(1)</script> [a](javascript:b) `"
    strange = {
        "command": hostile,
        "data": {"source": hostile},
        "sources": [hostile, {"file": hostile}],
    }
    for provenance in (strange, {"data": [hostile], "sources": 3, "recogniser": 1}):
        matter, body = front_matter(card.text(CONFIG, provenance, {}, "model"))
        assert matter["license"] == "unknown" and "\nlicense:" not in body
        for line in body.splitlines():
            outside = "".join(line.split("`")[::2])
            assert "<script>" not in outside and "javascript" not in outside
