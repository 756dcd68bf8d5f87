"""`varcli sample`: what it writes, that it resumes, and what bad input gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import run_launches
from typer.testing import CliRunner

from varcli.artifacts.verify import read_manifest, verify_folder
from varcli.cli import app as app_module
from varcli.cli.app import app
from varcli.tokenizer.store import save_tokenizer
from varcli.transformer.store import save_transformer


@pytest.fixture
def model(tiny_tokenizer, tiny_transformer, tmp_path):
    folder = tmp_path / "models" / "tiny"
    save_tokenizer(folder / "tokenizer", tiny_tokenizer)
    info = {"tokenizer": tiny_tokenizer.fingerprint(), "patch_nums": [1, 2, 4], "order": "scale"}
    save_transformer(folder / "transformer", tiny_transformer, {**info, "classes": ["apple", "boat", "cat"]})
    return folder


DRAW_ALL = ["sample", "--classes", "all", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_class_gives_images_a_grid_an_array_and_a_manifest(model, tmp_path):
    out = tmp_path / "out"
    done = run(
        "sample", "--model", model, "--class", "boat", "--n", 5, "--out", out, "--npz", "--json", "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 5
    manifest = read_manifest(out, "samples")
    assert verify_folder(out, manifest) == []
    assert manifest.info["classes"] == ["apple", "boat", "cat"]
    images = np.load(out / "samples.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (5, 32, 32, 3)
    assert np.array_equal(np.asarray(Image.open(out / "0001-00003.png")), images[3])


def test_top_k_0_draws_from_all_codes(model, tmp_path):
    """It was refused, although the help names it."""
    common = ["--model", model, "--class", "boat", "--n", 4, "--device", "cpu"]
    for out, top_k in (("zero", 0), ("all", 16)):  # the tokenizer has 16 codes
        done = run("sample", *common, "--top-k", top_k, "--out", tmp_path / out)
        assert done.exit_code == 0, done.output
    for image in (tmp_path / "all").glob("0001-*.png"):
        assert (tmp_path / "zero" / image.name).read_bytes() == image.read_bytes()


def test_a_rerun_draws_only_what_is_missing_and_the_same_again(model, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "sample",
        "--model",
        model,
        "--classes",
        "all",
        "--per-class",
        2,
        "--out",
        out,
        "--device",
        "cpu",
        "--json",
    ]
    assert json.loads(run(*arguments).stdout)["drawn"] == 6
    lost = out / "0002-00001.png"
    before = lost.read_bytes()
    lost.unlink()
    assert json.loads(run(*arguments, "--batch-size", 1).stdout)["drawn"] == 1
    assert lost.read_bytes() == before


def test_a_model_under_another_name_adds_to_its_samples(model, tmp_path):
    """It counted as another model once its folder was renamed or copied."""
    common = ["sample", "--class", "cat", "--out", tmp_path / "out", "--device", "cpu", "--json"]
    assert json.loads(run(*common, "--model", model, "--n", 2).stdout)["drawn"] == 2
    moved = model.rename(model.with_name("elsewhere"))
    assert json.loads(run(*common, "--model", moved, "--n", 3).stdout)["drawn"] == 1
    assert read_manifest(tmp_path / "out", "samples").info["model"] == "elsewhere"


def test_workers_write_what_is_written_without_them(model, tmp_path):
    common = ["sample", "--model", model, "--classes", "all", "--per-class", 3, "--device", "cpu"]
    for out, workers in (("none", 0), ("two", 2)):
        done = run(*common, "--out", tmp_path / out, "--workers", workers)
        assert done.exit_code == 0, done.output
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).glob("*.png")} for out in ("none", "two")]
    assert len(files[0]) == 10 and files[0] == files[1]


def test_an_npz_alone_is_that_beside_pngs_and_is_evaluated_with_its_classes(model, tiny_images, tmp_path):
    common = ["sample", "--model", model, "--classes", "all", "--per-class", 4, "--device", "cpu"]
    assert run(*common, "--out", tmp_path / "both", "--npz").exit_code == 0
    for drawn in (12, 0):
        done = run(*common, "--out", tmp_path / "only", "--npz-only", "--json")
        assert done.exit_code == 0, done.output
        assert (json.loads(done.stdout)["images"], json.loads(done.stdout)["drawn"]) == (12, drawn)
    names = ("samples.npz", "grid.png")
    assert [(tmp_path / "only" / name).read_bytes() for name in names] == [
        (tmp_path / "both" / name).read_bytes() for name in names
    ]
    assert not list((tmp_path / "only").glob("0*.png"))
    told = []
    for place in ("both", "only", "only/samples.npz"):
        options = ["--ref", tiny_images, "--device", "cpu", "--no-keep", "--features", "lite0", "--no-floor", "--json"]
        done = run("eval", tmp_path / place, *options)
        assert done.exit_code == 0, done.output
        told.append(json.loads(done.stdout))
    assert (
        told[0]["class_counts"]
        == told[1]["class_counts"]
        == told[2]["class_counts"]
        == {"apple": 4, "boat": 4, "cat": 4}
    )
    assert told[0]["fd_lite0"] == pytest.approx(told[1]["fd_lite0"]) and told[1]["fd_lite0"] == told[2]["fd_lite0"]
    assert told[1]["samples"]["settings"] == told[0]["samples"]["settings"]
    for options in ([], ["--npz-only", "--seed", 1]):
        assert run(*common, "--out", tmp_path / "only", *options).exit_code == 1


def test_rejection_is_told_in_the_manifest_and_by_eval(model, tiny_images, tiny_transformer, tmp_path):
    info = read_manifest(model / "transformer").info
    info = {name: value for name, value in info.items() if name != "config"}
    save_transformer(model / "transformer", tiny_transformer, {**info, "source": str(tiny_images)})
    common = [*DRAW_ALL, "--model", model, "--per-class", 2, "--reject", "1/2"]
    done = run(*common, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert (json.loads(done.stdout)["images"], json.loads(done.stdout)["drawn"]) == (6, 12)
    assert read_manifest(tmp_path / "out").info["scorer"]["accuracy"] is not None
    plain = [*DRAW_ALL, "--model", model, "--per-class", 4, "--out", tmp_path / "all"]
    assert run(*plain).exit_code == 0
    for image in (tmp_path / "out").glob("0*.png"):
        assert image.read_bytes() == (tmp_path / "all" / image.name).read_bytes()
    page = tmp_path / "report.html"
    told = run("eval", tmp_path / "out", "--html", page, "--device", "cpu", "--no-keep", "--features", "lite0")
    assert told.exit_code == 0, told.output
    assert "-re: 1/2 of the candidates kept" in told.stdout and "marked -re" in told.stderr
    assert "(-re: 1/2 of the candidates kept)" in page.read_text()


def test_products_in_fp8_are_told_in_the_manifest_and_by_eval(model, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr("varcli.transformer.store.require_fp8", lambda *sizes: None)  # a CPU computes the formulas
    common = [*DRAW_ALL, "--model", model, "--per-class", 2, "--precision", "bf16"]
    done = run(*common, "--fp8", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "out").info["fp8"] is True
    mixed = run(*common, "--out", tmp_path / "out")
    assert mixed.exit_code == 1 and "other settings: fp8 was True, now False" in mixed.output
    assert run(*common, "--out", tmp_path / "plain").exit_code == 0
    for folder, is_marked in (("out", True), ("plain", False)):
        told = run(
            "eval", tmp_path / folder, "--ref", tiny_images, "--device", "cpu", "--no-keep", "--features", "lite0"
        )
        assert told.exit_code == 0, told.output
        assert ("-fp8: drawn with products in FP8" in told.stdout) == is_marked


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--class", "aple"], "apple"),
        (["--class", "207"], "207"),
        (["--n", "0"], "`--n` must be 1 or more, but is 0"),
        (["--count", "0"], "`--n` must be 1 or more, but is 0"),
        (["--classes", "all", "--per-class", "-1"], "`--per-class` must be 1 or more, but is -1"),
        (["--classes", "all", "--per-class", "1", "--n", "2"], "`--n` and `--per-class` both say"),
        (["--cfg", "-1"], "`--cfg` must be 0 or more, but is -1"),
        (["--top-p", "1.5"], "top_p must be above 0 and at most 1, but is 1.5"),
        (["--top-k", "-3"], "`--top-k` must be 0 or more, but is -3"),
        (["--cfg-schedule", "sine"], "linear"),
        (["--classes", "some"], "all"),
        (["--compile", "maybe"], "auto, off, on"),
        (["--precision", "fp64"], "fp32"),
        (["--cfg-interval", "x"], "two numbers"),
        (["--cfg-interval", "0.9,0.1"], "the smaller first"),
        (["--reject", "5/4"], "K from 1 to N"),
        (["--reject", "1/2"], "does not say which"),
        (["--classes", "all", "--class", "apple"], "one of them"),
        (["--device", "cuda:99"], "cuda"),
        (["--device", "cpu", "--fp8"], "fp8 needs an NVIDIA GPU"),
    ],
)
def test_bad_input_is_one_clear_error(model, tmp_path, arguments, said):
    done = run("sample", "--model", model, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_and_a_swapped_tokenizer_are_refused(model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = run("sample", "--model", "tinny")
    assert unknown.exit_code == 1
    assert "tiny" in unknown.output
    tiny_tokenizer.decoder.conv_out.bias.data += 1
    save_tokenizer(model / "tokenizer", tiny_tokenizer)
    swapped = run("sample", "--model", "tiny", "--device", "cpu")
    assert swapped.exit_code == 1
    assert "trained on codes of tokenizer" in swapped.output


def test_samples_of_other_weights_are_never_mixed(model, tiny_transformer, tmp_path):
    out = tmp_path / "out"
    arguments = ["sample", "--model", model, "--class", "boat", "--out", out, "--device", "cpu"]
    assert run(*arguments, "--n", 2).exit_code == 0
    tiny_transformer.output_projection.bias.data += 1
    info = {
        "tokenizer": read_manifest(model / "tokenizer").info["fingerprint"],
        "patch_nums": [1, 2, 4],
        "order": "scale",
    }
    save_transformer(model / "transformer", tiny_transformer, {**info, "classes": ["apple", "boat", "cat"]})
    retrained = run(*arguments, "--n", 3)
    assert retrained.exit_code == 1
    assert "transformer" in retrained.output


def test_an_empty_picture_is_drawn_again(model, tmp_path):
    out = tmp_path / "out"
    arguments = ["sample", "--model", model, "--class", "boat", "--n", 3, "--out", out, "--device", "cpu", "--json"]
    assert run(*arguments).exit_code == 0
    (out / "0001-00001.png").write_bytes(b"")
    assert json.loads(run(*arguments).stdout)["drawn"] == 1
    assert verify_folder(out, read_manifest(out, "samples")) == []


def test_settings_that_the_model_suggests_are_used_and_told_unless_some_are_given(model, tmp_path):
    from varcli.transformer.store import load_transformer

    transformer, manifest = load_transformer(model / "transformer")
    info = {name: value for name, value in manifest.info.items() if name != "config"}
    save_transformer(model / "transformer", transformer, {**info, "sampling": {"cfg": 3.0, "top_k": 4}})
    arguments = ["sample", "--model", model, "--class", "boat", "--n", 1, "--device", "cpu"]
    done = run(*arguments, "--out", tmp_path / "a")
    assert done.exit_code == 0 and "cfg 3.0, top_k 4" in done.stderr
    settings = read_manifest(tmp_path / "a", "samples").info
    assert (settings["cfg"], settings["top_k"], settings["top_p"]) == (3.0, 4, 0.96)
    done = run(*arguments, "--out", tmp_path / "b", "--cfg", 2)
    settings = read_manifest(tmp_path / "b", "samples").info
    assert done.exit_code == 0 and (settings["cfg"], settings["top_k"]) == (2.0, 900)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"cfg": "high"}}, "suggests settings that cannot be: config key `cfg` takes a number"),
        ({"sampling": {"cfg": -3}}, "suggests settings that cannot be: cfg must be 0 or more"),
        ({"sampling": {"seed": 7}}, "suggests settings that cannot be: `seed` is for who draws to choose"),
        ({"sampling": [1]}, "suggests settings that cannot be"),
        ({"tokenizer": 5}, "was trained on codes of tokenizer 5"),
        ({"classes": [1, 2, 3]}, "names are no list of as many texts"),
        ({"config": {"depth": 10**6}}, "has a config that cannot be: depth is at most"),
        ({"config": {"drop_path": "a"}}, "has a config that cannot be: config key `drop_path` takes a number"),
        ({"config": 3}, "has no config"),
    ],
)
def test_an_edited_manifest_is_named_with_what_is_wrong_in_it(changes, message, model, tmp_path):
    path = model / "transformer" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["info"] |= changes
    path.write_text(json.dumps(manifest), encoding="utf-8")
    done = run("sample", "--model", model, "--class", 1, "--n", 1, "--device", "cpu", "--out", tmp_path / "c")
    assert done.exit_code == 1 and message in " ".join(done.stderr.split()), done.stderr
    assert "hint: " in done.stderr and not (tmp_path / "c").exists()


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGTERM to catch")
def test_sigterm_keeps_what_was_drawn_and_says_so(model, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(app_module.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "varcli", "sample", "--model", model, "--class", "boat", "--out", out, "--device"]
    command = [str(part) for part in (*command, "cpu", "--n", 99_999, "--batch-size", 1)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (out.exists() and list(out.glob("0001-*.png"))):
            time.sleep(0.05)
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert told.count("error: ") == 1 and "stopped by SIGTERM" in told and "run the same command again" in told
    assert list(out.glob("0001-*.png")) and not (out / "manifest.json").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_of_torchrun_draw_what_one_draws_and_fill_its_gaps(model, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(app_module.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "varcli", "sample", "--model", model, "--classes", "all", "--per-class", 3, "--device", "cpu"]
    arguments += ["--npz", "--json", "--out"]
    assert run(*arguments[2:], tmp_path / "one").exit_code == 0
    assert (
        run(
            "sample", "--model", model, "--class", "boat", "--n", 2, "--device", "cpu", "--out", tmp_path / "two"
        ).exit_code
        == 0
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [str(part) for part in (*start, *arguments, tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert (told["images"], told["drawn"]) == (9, 7)
    assert verify_folder(tmp_path / "two", read_manifest(tmp_path / "two", "samples")) == []
    for path in (tmp_path / "one").iterdir():
        if path.suffix in (".png", ".npz"):
            assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name
    refused = subprocess.run([*command, "--cfg", "3"], env=environment, capture_output=True, text=True)
    assert refused.returncode != 0 and refused.stderr.count("made with other settings") == 1
    for wrong in (["--model", "nobodys"], ["--count", "0"]):  # found by varcli, and by what reads its options
        refused = subprocess.run([*command, *wrong], env=environment, capture_output=True, text=True)
        assert refused.returncode != 0 and refused.stderr.count("error: ") == 1, refused.stderr


@pytest.mark.distributed
def test_two_processes_tell_a_wrong_option_once(model, tmp_path):
    wrong = (["--compile", "maybe"], ["--model", "nobodys"], ["--reject", "x"], ["--count", "0"])
    common = ["sample", "--model", str(model), "--device", "cpu", "--out", str(tmp_path / "out")]
    program = "from varcli.cli.app import main; main()"
    for ended in run_launches(program, [(2, 2, [*common, *options]) for options in wrong]):
        assert all(process.code for process in ended), ended
        assert sum(process.err.count("error: ") for process in ended) == 1, ended
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_of_torchrun_keep_what_one_keeps(model, tiny_images, tiny_transformer, tmp_path):
    info = {name: value for name, value in read_manifest(model / "transformer").info.items() if name != "config"}
    save_transformer(model / "transformer", tiny_transformer, {**info, "source": str(tiny_images)})
    environment = {**os.environ, "PYTHONPATH": str(Path(app_module.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = ["sample", "--model", model, "--classes", "all", "--per-class", 2, "--device", "cpu", "--reject", "1/2"]
    assert run(*arguments, "--out", tmp_path / "one").exit_code == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "varcli"]
    command = [str(part) for part in (*start, *arguments, "--out", tmp_path / "two", "--json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["drawn"] == 12
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).glob("*.png")} for out in ("one", "two")]
    assert len(files[0]) == 7 and files[0] == files[1]
