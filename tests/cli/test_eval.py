"""`varcli eval`."""

from __future__ import annotations

import json

import pytest
from small_sets import draw, write_pngs
from typer.testing import CliRunner

from varcli.cli.app import app

runner = CliRunner()


@pytest.fixture
def paths(tmp_path):
    for split, seed in (("train", 1), ("val", 2)):
        for name in ("ant", "bee"):
            write_pngs(tmp_path / "real" / split / name, draw(4, seed=seed))
    return write_pngs(tmp_path / "samples", draw(6, seed=3)), tmp_path / "real"


def run(*arguments: object):
    return runner.invoke(app, ["eval", *map(str, arguments), "--features", "lite0"])


def test_the_table_has_the_floor_beside_the_numbers(paths):
    samples, real = paths
    result = run(samples, "--ref", real)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["metric", "samples", "real", "images", "better"]
    assert [line.split()[0] for line in lines[2:7]] == [
        *("kid_lite0", "precision_lite0", "recall_lite0", "fd_lite0", "is_lite0")
    ]
    assert f"reference:   {real}, val images; 8 images, 32 x 32" in result.stdout
    assert "these numbers are not FID" in result.stderr
    assert "--inception-weights" in result.stderr


def test_json_has_each_number_under_its_name(paths):
    samples, real = paths
    result = run(samples, "--ref", real, "--json", "--no-floor", "--metrics", "kid, coverage")
    value = json.loads(result.stdout)
    assert isinstance(value["kid_lite0"], float)
    assert 0 <= value["coverage_lite0"] <= 1
    assert value["floor"] is None and value["skipped"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "there are no samples"),
        (["{tmp}/samples", "--ref", "{tmp}/real", "--html", "{tmp}"], "is a folder"),
        (["{tmp}/samples"], "do not say which real images"),
        (["{tmp}/samples", "--ref", "{tmp}/none"], "there is no reference"),
        (["{tmp}/samples", "--ref", "{tmp}/real", "--metrics", "fid"], "pass --inception-weights"),
        (["{tmp}/samples", "--ref", "{tmp}/real", "--device", "cud"], "unknown device"),
    ],
)
def test_what_cannot_be_evaluated_is_one_error_with_a_hint(paths, tmp_path, arguments, message):
    result = run(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.output


def test_html_leaves_a_page_with_pictures_and_json_has_the_counts(paths, tmp_path):
    samples, real = paths
    result = run(samples, "--ref", real, "--metrics", "kid", "--html", tmp_path / "out" / "report.html", "--json")
    assert result.exit_code == 0
    assert "report.html" in result.stderr
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("<img") == 6 * 6
    value = json.loads(result.stdout)
    assert value["class_counts"] == {} and value["published"] == []


def test_a_published_protocol_is_set_beside_papers(capsys):
    from varcli.cli.eval import show
    from varcli.metrics.published import published_at
    from varcli.metrics.result import EvalResult

    sample = {"path": "mine.npz", "count": 50_000, "width": 256, "height": 256, "preparation": "as they are"}
    show(
        EvalResult(
            metrics={"fid": 2.2},
            skipped={},
            floor={},
            floor_images=None,
            samples=sample,
            reference=None,
            features={"network": "inception", "weights_sha256": "0" * 64},
            warnings=(),
            versions={},
            published=published_at(256),
        )
    )
    shown = capsys.readouterr().out
    assert "of 50,000 samples each (this result: 50,000)" in shown
    lines = [line for line in shown.splitlines() if line.startswith(("VAR", "this result", "real images"))]
    assert lines[-3].startswith("VAR") and any("mine.npz" in line for line in lines)


class TestTokenizer:
    """`varcli eval --tokenizer`."""

    @pytest.fixture
    def tokenizer(self, tiny_tokenizer, tmp_path):
        from varcli.tokenizer.store import save_tokenizer

        save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
        return tmp_path / "tokenizer"

    def test_the_table_is_followed_by_one_row_a_scale(self, paths, tokenizer):
        result = run(paths[1], "--tokenizer", tokenizer, "--n", 5)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert [line.split()[0] for line in lines[2:10]] == [
            *("rfd_lite0", "rkid_lite0", "psnr", "psnr_of_mean_error", "ssim", "lite0_distance"),
            *("codebook_used", "perplexity"),
        ]
        assert [line.split()[:4] for line in lines[13:16]] == [[str(s), "x", str(s), str(s * s)] for s in (1, 2, 4)]
        assert "val images, 5 of 8 drawn with seed 0; 5 images, 32 x 32" in result.stdout
        assert "reference: the same 5 crops" in result.stdout
        assert "skipped lpips: LPIPS needs `vgg16-397923af.pth`" in result.stderr

    def test_json_has_each_number_and_each_scale(self, paths, tokenizer):
        result = run(paths[1], "--tokenizer", tokenizer, "--split", "train", "--json")
        value = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert {"rfd_lite0", "psnr", "ssim", "perplexity"} <= set(value)
        assert value["images"]["count"] == 8 and len(value["scales"]) == 3
        assert value["measured_against"] == "the same 8 crops"

    @pytest.mark.parametrize("extra", [("--ref", "x"), ("--html", "x.html"), ("--no-floor",), ("--metrics", "fid")])
    def test_options_of_the_other_kind_are_one_error(self, paths, tokenizer, extra):
        result = run(paths[1], "--tokenizer", tokenizer, *extra)
        assert result.exit_code == 1
        assert extra[0] in result.stderr and "makes no sense with" in result.stderr

    @pytest.mark.parametrize("extra", [("--n", "4"), ("--split", "val"), ("--lpips-weights", "x")])
    def test_options_for_tokenizers_need_one(self, paths, extra):
        result = run(paths[0], "--ref", paths[1], *extra)
        assert result.exit_code == 1
        assert extra[0] in result.stderr and "needs --tokenizer" in result.stderr

    def test_a_tokenizer_that_is_not_there_is_one_error(self, paths, tmp_path):
        result = run(paths[1], "--tokenizer", tmp_path / "none")
        assert result.exit_code == 1
        assert "unknown tokenizer" in result.stderr and "Traceback" not in result.output


def test_the_self_test_needs_the_published_weights_and_all_metrics(paths, tmp_path, monkeypatch):
    monkeypatch.delenv("VARCLI_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    samples, real = paths
    result = runner.invoke(app, ["eval", str(samples), "--ref", str(real), "--self-test"])
    assert result.exit_code == 1 and "Inception weights are not at hand" in result.stderr
    assert run(samples, "--self-test", "--metrics", "fid").exit_code == 1
