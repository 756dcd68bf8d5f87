"""`varcli import`, `varcli export` and `varcli info`."""

from __future__ import annotations

import json

import pytest
import torch
from released_names import released_tokenizer_state, released_transformer_state
from typer.testing import CliRunner

from varcli.artifacts.verify import read_manifest
from varcli.cli.app import app
from varcli.tokenizer.store import load_tokenizer, save_tokenizer
from varcli.transformer.store import save_transformer

runner = CliRunner()


@pytest.fixture
def files(tiny_tokenizer, tiny_transformer, tmp_path):
    torch.save(released_tokenizer_state(tiny_tokenizer), tmp_path / "vae.pth")
    torch.save(released_transformer_state(tiny_transformer), tmp_path / "var_d2.pth")
    return [str(tmp_path / "vae.pth"), str(tmp_path / "var_d2.pth")]


def test_import_info_export_and_import_again(files, tmp_path):
    model, released, again = tmp_path / "models" / "tiny", tmp_path / "released", tmp_path / "again"
    result = runner.invoke(app, ["import", *files, "--out", str(model)])
    assert result.exit_code == 0, result.output
    assert "depth 2, 3 classes, 21 tokens" in result.stdout
    assert f"varcli sample --model {model}" in result.stderr

    shown = runner.invoke(app, ["info", str(model), "--verify"])
    assert shown.exit_code == 0 and "a model folder with tokenizer and transformer" in shown.stdout
    assert "every file is as its manifest says" in shown.stderr

    result = runner.invoke(app, ["export", str(model), "--out", str(released)])
    assert result.exit_code == 0
    exported = result.stdout.split()
    assert [name.rsplit("/", 1)[-1] for name in exported] == [
        "vae_ch32v16z8.safetensors",
        "var_d2.safetensors",
        "config.json",
    ]

    result = runner.invoke(app, ["import", *exported[:2], "--out", str(again), "--json"])
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert value["patch_nums"] == [1, 2, 4] and value["depth"] == 2
    infos = [json.loads(runner.invoke(app, ["info", str(path), "--json"]).stdout) for path in (model, again)]
    fingerprints = [info["parts"]["tokenizer"]["fingerprint"] for info in infos]
    assert fingerprints[0] == fingerprints[1] == value["tokenizer"]


def test_an_export_leaves_other_peoples_folders_alone(files, tmp_path):
    model, photos = tmp_path / "models" / "tiny", tmp_path / "photos"
    assert runner.invoke(app, ["import", *files, "--out", str(model)]).exit_code == 0
    photos.mkdir()
    (photos / "config.json").write_text("mine")
    for command in (["export", str(model), "--out", str(photos)], ["import", *files, "--out", str(photos)]):
        result = runner.invoke(app, command)
        assert result.exit_code == 1 and "is not empty" in result.stderr
    result = runner.invoke(app, ["export", str(model), "--out", str(model)])
    assert result.exit_code == 1 and "is not empty" in result.stderr
    assert [path.name for path in photos.iterdir()] == ["config.json"]
    result = runner.invoke(app, ["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")])
    assert result.exit_code == 1 and "nowhere" in result.stderr


def test_an_export_carries_options_and_class_names_back(tiny_tokenizer, tiny_transformer, tmp_path):
    info = {"tokenizer": tiny_tokenizer.fingerprint(), "patch_nums": [1, 2, 4], "order": "scale"}
    info["classes"] = ["apple", "boat", "cat"]
    save_tokenizer(tmp_path / "model" / "tokenizer", tiny_tokenizer)
    save_transformer(tmp_path / "model" / "transformer", tiny_transformer, info)
    out = tmp_path / "released"
    assert runner.invoke(app, ["export", str(tmp_path / "model"), "--out", str(out)]).exit_code == 0
    weights = [str(path) for path in sorted(out.glob("*.safetensors"))]
    assert runner.invoke(app, ["import", *weights, "--out", str(tmp_path / "again")]).exit_code == 0
    again = load_tokenizer(tmp_path / "again" / "tokenizer")
    assert again.config == tiny_tokenizer.config
    assert read_manifest(tmp_path / "again" / "transformer").info["classes"] == info["classes"]


def test_options_are_given_with_set(files, tmp_path):
    out = str(tmp_path / "model")
    result = runner.invoke(app, ["import", *files, "--out", out, "--set", "using_znorm=true", "--set", "beta=1"])
    assert result.exit_code == 0, result.output
    value = json.loads(runner.invoke(app, ["info", out, "--json"]).stdout)
    config = value["parts"]["tokenizer"]["config"]
    assert config["cosine_codes"] is True and config["commitment_weight"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["import", "{var}"], 1, "there is no VQVAE in", "vae_ch160v4096z32.pth"),
        (
            ["import", "{vae}", "{var}", "--set", "depth=16"],
            1,
            "has depth = 2, but 16 was asked for",
            "leave depth out",
        ),
        (["import", "{vae}", "{var}", "--set", "num_head=2"], 1, "unknown option `num_head`", "num_heads"),
        (["import", "{evil}", "{var}"], 4, "asks for `print`", "safetensors"),
        (["import", "{cut}", "{var}"], 1, "is not whole", "download it again"),
        (["import", "{tmp}/none.pth"], 1, "cannot read", None),
        (["export", "{tmp}"], 1, "holds neither tokenizer/ nor transformer/", "varcli import"),
        (["info", "{tmp}/none"], 1, "does not exist", None),
    ],
)
def test_what_goes_wrong_is_one_clear_error(files, tmp_path, arguments, code, message, hint):
    class Evil:
        def __reduce__(self):
            return print, ("boo",)

    torch.save({"a": torch.ones(1), "evil": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "vae.pth").read_bytes()[:-100])
    places = {
        "vae": files[0],
        "var": files[1],
        "evil": tmp_path / "evil.pth",
        "cut": tmp_path / "cut.pth",
        "tmp": tmp_path,
    }
    out = tmp_path / "out"
    options = [] if arguments[0] == "info" else ["--out", str(out)]
    result = runner.invoke(app, [argument.format(**places) for argument in arguments] + options)
    assert result.exit_code == code, result.output
    assert "error: " in result.stderr and message in result.stderr
    assert hint is None or hint in result.stderr.partition("hint:")[2]
    assert not (out / "tokenizer").exists() and "Traceback" not in result.output
