"""What a tokenizer changes in images is measured against the same crops, in one pass."""

from __future__ import annotations

import json

import golden_eval
import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import draw, write_pngs

from varcli.data.emoji import unpack_emoji64
from varcli.data.images import decode_images, open_images
from varcli.data.views import DecodeConfig
from varcli.errors import ArtifactError, ConfigError, DataError, NumericError
from varcli.metrics import frechet_distance, reconstruct
from varcli.metrics.features import choose_extractor
from varcli.metrics.reconstruct import ReconstructionConfig, evaluate_reconstruction
from varcli.pretrained.lpips import Lpips
from varcli.tokenizer.health import codebook_report, count_codes
from varcli.tokenizer.judge import evaluate_tokenizer
from varcli.tokenizer.losses import PerceptualLoss
from varcli.tokenizer.store import load_tokenizer, save_tokenizer

ON_CPU = {"features": "lite0", "device": "cpu", "workers": 0}


def run(tokenizer, images, **settings):
    return evaluate_reconstruction(tokenizer, images, ReconstructionConfig(**{**ON_CPU, **settings}))


def pixels(count: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.from_numpy(draw(count, seed, side)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    return tmp_path / "tokenizer"


class Changed:
    """A tokenizer that gives back what it got, after `change` of the images in [-1, 1]."""

    def __init__(self, real, change):
        self.real, self.change = real, change
        self.config, self.fingerprint, self.quantizer = real.config, real.fingerprint, self

    def encode(self, images):
        self.kept = images
        return self.real.encode(images)

    def embed(self, codes):
        return self.kept

    def decode(self, images):
        return self.change(images)


@pytest.fixture
def changed(monkeypatch, folder):
    def use(change) -> None:
        monkeypatch.setattr(
            reconstruct, "load_tokenizer", lambda path, device: Changed(load_tokenizer(path, device), change)
        )

    return use


def test_a_tokenizer_that_loses_nothing_has_no_distance_and_valid_json(changed, folder):
    changed(lambda images: images)
    result = run(folder, pixels(6))
    assert result.metrics["rfd_lite0"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["rkid_lite0"] == pytest.approx(0, abs=1e-9)
    assert result.metrics["ssim"] == pytest.approx(1, rel=1e-12)
    assert result.metrics["lite0_distance"] == 0
    assert result.num_exact == 6
    assert "psnr" not in result.metrics and "psnr_of_mean_error" not in result.metrics
    assert result.skipped["psnr"] == "infinite: all 6 images came back without any error"
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["num_exact"] == 6 and value["measured_against"] == "the same 6 crops"


def test_images_without_error_are_left_out_of_the_mean_psnr_only(changed, folder):
    def shift_first(images):
        return torch.cat([images[:1] + 10 / 127.5, images[1:]])

    changed(shift_first)
    result = run(folder, pixels(4) // 2)
    assert result.num_exact == 3
    assert result.metrics["psnr"] == pytest.approx(20 * np.log10(255 / 10))
    assert result.metrics["psnr_of_mean_error"] == pytest.approx(10 * np.log10(255**2 / 25))


def test_reconstructions_are_rounded_not_cut_off(changed, folder):
    changed(lambda images: images + 0.4 / 127.5)
    assert run(folder, pixels(3) // 2).num_exact == 3
    changed(lambda images: images + 0.6 / 127.5)
    assert run(folder, pixels(3) // 2).metrics["psnr"] == pytest.approx(20 * np.log10(255))


def test_a_reconstruction_that_is_no_number_stops_it(changed, folder):
    changed(lambda images: images * torch.nan)
    with pytest.raises(NumericError, match="not finite"):
        run(folder, pixels(3))


def test_batches_change_nothing(folder):
    images = pixels(8)
    whole, pieces = (run(folder, images, batch_size=size) for size in (8, 3))
    assert whole.metrics == pytest.approx(pieces.metrics, rel=1e-4, abs=1e-6)
    assert whole.metrics["psnr_of_mean_error"] == pytest.approx(pieces.metrics["psnr_of_mean_error"], rel=1e-12)
    assert whole.scales == pieces.scales


def test_use_of_the_codebook_is_that_of_its_health_report(folder):
    images, tokenizer = pixels(5), load_tokenizer(folder)
    config = tokenizer.config
    codes = tokenizer.encode(images.float() / 127.5 - 1)
    report = codebook_report(count_codes(codes, config.scales, config.vocab_size))
    result = run(folder, images)
    assert result.metrics["codebook_used"] == report["codebook_used"]
    assert result.metrics["perplexity"] == pytest.approx(report["perplexity"], rel=1e-5)
    assert [(scale.side, scale.tokens) for scale in result.scales] == [(1, 1), (2, 4), (4, 16)]
    for number, scale in enumerate(result.scales):
        assert scale.codebook_used == report[f"codebook_used_scale_{number}"]
        assert scale.perplexity == pytest.approx(report[f"perplexity_scale_{number}"], rel=1e-5)
        assert scale.codebook_used <= scale.codebook_reachable <= 1
    assert result.scales[0].codebook_reachable == 5 / 16


def test_distance_between_sets_is_that_of_images_and_rounded_reconstructions(folder):
    images, tokenizer = pixels(7), load_tokenizer(folder)
    decoded = tokenizer.decode(tokenizer.quantizer.embed(tokenizer.encode(images.float() / 127.5 - 1)))
    extractor = choose_extractor("lite0")
    with torch.no_grad():
        sets = [extractor.extract(part)[0] for part in (images, ((decoded + 1) * 127.5).round().to(torch.uint8))]
    assert run(folder, images).metrics["rfd_lite0"] == pytest.approx(frechet_distance(*sets), rel=1e-3)


def test_embedded_tokenizer_is_as_good_as_the_judge_of_its_training_says(tmp_path):
    root = unpack_emoji64(tmp_path / "emoji64").folder
    result = run("emoji64", root, count=12)
    # the judge sees reconstructions before they are rounded to 8 bits
    tree = open_images(root)
    indices = np.sort(np.random.default_rng(0).permutation(len(tree.splits["val"]))[:12])
    (batch,) = decode_images(tree, "val", DecodeConfig(size=64, crop="none"), indices, workers=0)
    judged = evaluate_tokenizer(load_tokenizer(reconstruct.tokenizer_folder("emoji64")), batch.images, PerceptualLoss())
    assert 20 < result.metrics["psnr"] < 30
    assert result.metrics["psnr"] == pytest.approx(judged["psnr"], abs=0.05)
    assert result.metrics["psnr_of_mean_error"] == pytest.approx(10 * np.log10(4 / judged["mse"]), abs=0.05)
    assert result.metrics["lite0_distance"] == pytest.approx(judged["perceptual"], rel=0.05)
    assert result.metrics["codebook_used"] == pytest.approx(judged["codebook_used"])
    assert result.images["path"].endswith("val images, 12 of 535 drawn with seed 0")
    assert result.tokenizer["tokens_per_image"] == 155
    assert result.tokenizer["bits_per_pixel"] == pytest.approx(155 * 10 / 64**2)
    assert result.tokenizer["compression"] == pytest.approx(24 * 64**2 / 1550)


def test_inception_gives_the_names_of_papers_and_lite0_never_does(folder, tmp_path):
    from varcli.metrics.inception_network import InceptionNetwork

    weights = tmp_path / "weights.pth"
    torch.save(golden_eval.formula_weights(InceptionNetwork().state_dict()), weights)
    changes = {"features": "inception", "inception_weights": weights, "allow_unknown_weights": True}
    result = run(folder, pixels(3), **changes)
    assert list(result.metrics)[:2] == ["rfid", "rkid"]
    assert "not the published ones" in result.warnings[0]
    result = run(folder, pixels(3))
    assert list(result.metrics)[:2] == ["rfd_lite0", "rkid_lite0"]
    assert "rfid" not in result.to_json()
    assert "these numbers are not FID" in result.warnings[0]
    assert "few for 1,280 features" in result.warnings[1]


def test_lpips_needs_its_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert "LPIPS needs `vgg16-397923af.pth`" in run(folder, pixels(2)).skipped["lpips"]
    with pytest.raises(ArtifactError, match="vgg16"):
        run(folder, pixels(2), lpips_weights=tmp_path)
    monkeypatch.setattr(reconstruct, "load_lpips", lambda _: Lpips().requires_grad_(False))
    result = run(folder, pixels(2))
    assert result.metrics["lpips"] > 0 and "lpips" not in result.skipped
    assert len(result.features["lpips_weights_sha256"]) == 2


def test_images_are_cut_as_the_tokenizer_saw_them(folder, tmp_path):
    root = tmp_path / "large" / "ant"
    for number, (width, height) in enumerate(((48, 40), (40, 56), (64, 64))):
        write_pngs(
            root, np.asarray(Image.fromarray(draw(1, number, 64)[0]).resize((width, height)))[None], [f"{number}.png"]
        )
    result = run(folder, tmp_path / "large")
    assert result.images["preparation"] == "centre crops of 32 px, shorter edge at 36"
    (batch,) = decode_images(
        open_images(tmp_path / "large", allow_single_class=True), "train", DecodeConfig(size=32), workers=0
    )
    assert result.metrics["psnr"] == pytest.approx(run(folder, batch.images).metrics["psnr"])


def test_validation_images_are_taken_where_there_are_any_and_training_ones_are_warned_of(folder, real):
    result = run(folder, real)
    assert result.images["path"] == f"{real}, val images" and result.images["count"] == 8
    result = run(folder, real, split="train", count=5)
    assert result.images["count"] == 5
    assert any("these are training images" in warning for warning in result.warnings)


def test_npz_files_and_flat_folders_are_images_too(folder, samples, tmp_path):
    images = draw(4, seed=5)
    np.savez(tmp_path / "images.npz", images)
    assert run(folder, tmp_path / "images.npz").metrics == pytest.approx(
        run(folder, torch.from_numpy(images).permute(0, 3, 1, 2)).metrics
    )
    result = run(folder, tmp_path / "images.npz", count=3)
    assert result.images["count"] == 3 and result.images["path"].endswith("images.npz, the first 3")
    assert run(folder, samples).images["count"] == 10


def test_images_that_cannot_be_used_are_one_error(folder, real, tmp_path):
    (tmp_path / "empty").mkdir()
    write_pngs(tmp_path / "one", draw(1, seed=0))
    write_pngs(tmp_path / "small", draw(3, seed=0, side=16))
    np.savez(tmp_path / "large.npz", draw(3, seed=0, side=64))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    (write_pngs(tmp_path / "damaged", draw(3, seed=0)) / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, message in (
        ("none", "there is no folder"),
        ("empty", "holds nothing"),
        ("one", "1 image, but at least 2"),
        ("small", "mostly smaller .16 px. than what this tokenizer takes .32 px."),
        ("large.npz", "64 x 64 pixels, but this tokenizer takes 32 x 32"),
        ("statistics.npz", "statistics alone"),
        ("damaged", "1.png"),
    ):
        with pytest.raises(DataError, match=message):
            run(folder, tmp_path / name)
    with pytest.raises(ConfigError, match="unknown split `test`"):
        run(folder, real, split="test")
    with pytest.raises(ConfigError, match="has no splits"):
        run(folder, tmp_path / "large.npz", split="val")
    with pytest.raises(ArtifactError):
        run(folder, folder)  # a tokenizer in place of images


def test_what_is_no_tokenizer_is_one_error(real, tmp_path):
    with pytest.raises(ArtifactError, match="unknown tokenizer"):
        run(tmp_path / "none", real)
    with pytest.raises(ArtifactError, match="holds no tokenizer"):
        run(real, real)


def test_images_smaller_than_a_window_leave_ssim_and_lpips_out(tmp_path):
    from varcli.tokenizer import VQVAE, TokenizerConfig

    torch.manual_seed(0)
    config = TokenizerConfig(
        patch_nums=(1, 2), vocab_size=8, code_channels=4, width=8, channel_multipliers=(1, 1, 1), num_res_blocks=1,
        norm_groups=4, num_phis=1,
    )  # fmt: skip
    save_tokenizer(tmp_path / "small", VQVAE(config))
    result = run(tmp_path / "small", pixels(3, side=8))
    assert result.skipped["ssim"] == "its window is 11 px wide, but the images 8"
    assert "ssim" not in result.metrics
