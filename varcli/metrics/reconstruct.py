"""How well a tokenizer keeps images: the core of `varcli eval --tokenizer`."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varcli import __version__
from varcli.artifacts.verify import is_artifact
from varcli.data.emoji import unpack_emoji64
from varcli.data.images import open_images, typical_side
from varcli.data.paths import escape_path
from varcli.devices import exact_convolutions, resolve_device
from varcli.errors import ArtifactError, ConfigError, DataError, NumericError, unknown_name
from varcli.metrics import cautions
from varcli.metrics.features import Extractor, choose_extractor
from varcli.metrics.fid import FID, frechet_distance
from varcli.metrics.kid import KID, paired_kernel_distance
from varcli.metrics.npz import open_npz
from varcli.metrics.reconstruction import ReconstructionConfig, ReconstructionResult, ScaleUse
from varcli.metrics.reference import EMBEDDED
from varcli.metrics.sources import ImageSource, from_folder, from_npz, from_tensor, from_tree
from varcli.metrics.ssim import WINDOW, ssim
from varcli.pretrained.lpips import LPIPS_SHA256, VGG_SHA256, load_lpips
from varcli.pretrained.lpips import MIN_SIDE as LPIPS_SIDE
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer.find import tokenizer_folder
from varcli.tokenizer.health import codebook_report, count_codes
from varcli.tokenizer.judge import peak_signal_to_noise
from varcli.tokenizer.losses import PerceptualLoss
from varcli.tokenizer.store import load_tokenizer
from varcli.tokenizer.vqvae import VQVAE

_MIN_IMAGES = 2  # a distance between sets needs a spread
_GPU_BATCH = 64
_CHOICE_SEED = 0  # of the images taken where not all of a split are
_BITS_OF_A_PIXEL = 24


def evaluate_reconstruction(
    tokenizer: Path | str,
    images: Path | Tensor,
    config: ReconstructionConfig | None = None,
    on_step: OnStep = ignore,
) -> ReconstructionResult:
    """Encode and decode images, and measure what the tokenizer changed.

    tokenizer: a folder or name, see `tokenizer_folder`. images: a folder of images, cut as `varcli tokenize` cuts
    validation images; emoji64; an npz file or uint8 (N, 3, H, W) of the tokenizer's size. Images are read once, and only
    their features are kept. Reconstructions are rounded to 8 bits before anything is measured:

    - psnr: mean over the images of each one's own, in dB, over 8 bits; images without any error, whose PSNR is infinite,
      are left out and counted in `num_exact`. psnr_of_mean_error: of the mean squared error over all images, never above
      it if there are no exact ones. If all are exact, both are skipped;
    - ssim, lpips, lite0_distance: means over the images; the last is what `PerceptualLoss` returns;
    - rfid and rkid (rfd_lite0 and rkid_lite0 in lite0 features): between the reconstructions and the same crops;
    - codebook_used, perplexity: over all scales, and in `scales` for each.

    Codes are computed in float32 without TF32. Raises VarcliError children for a tokenizer or images that cannot be used,
    DataError for fewer than two images, NumericError if a reconstruction is not finite.
    """
    config = config or ReconstructionConfig()
    device = resolve_device(config.device)
    folder = tokenizer_folder(tokenizer)
    model = load_tokenizer(folder, device)
    extractor = choose_extractor(config.features, config.inception_weights, device, config.allow_unknown_weights)
    lpips, reason = _choose_lpips(config.lpips_weights, device)
    with contextlib.ExitStack() as stack:
        source, warnings = _open(images, config, model.config.image_size, stack)
        if source.count < _MIN_IMAGES:
            raise DataError(
                f"`{source.shown}`: {source.count} image, but at least {_MIN_IMAGES} are needed", "pass more images"
            )
        seen = _Pass(model, extractor, lpips, source)
        if reason is not None:
            seen.skipped["lpips"] = reason
        stack.enter_context(torch.inference_mode())
        stack.enter_context(exact_convolutions())
        size = config.batch_size or (extractor.batch_size if device.type == "cpu" else _GPU_BATCH)
        on_step(Step(0, source.count, "images"))
        for batch in source.batches(size, workers=config.workers):
            seen.add(batch)
            on_step(Step(seen.count, source.count, "images"))
        metrics, skipped = seen.finish()
    described = {
        "network": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "preprocessing": extractor.preprocessing(source.height, source.width),
        "lpips_weights_sha256": None if lpips is None else [VGG_SHA256, LPIPS_SHA256],
        "device": str(device),
        "precision": "float32 features, float64 metrics",
    }
    found = cautions.Findings(
        shown=source.shown, samples=None, reference=None, extractor=extractor, metrics={}, info={}
    )
    return ReconstructionResult(
        metrics=metrics,
        skipped=skipped,
        scales=seen.scale_use(),
        num_exact=seen.num_exact,
        images=source.describe(),
        measured_against=f"the same {source.count:,} crops",
        tokenizer=_describe(model, folder),
        features=described,
        warnings=(*cautions.find(found), *warnings, *_count_warnings(source.count, extractor)),
        versions={
            "varcli": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "pillow", "torch-fidelity")},
        },
    )


class _Pass:
    """What is gathered while the images go by."""

    def __init__(self, model: VQVAE, extractor: Extractor, lpips: nn.Module | None, source: ImageSource) -> None:
        self.model, self.extractor, self.lpips, self.source = model, extractor, lpips, source
        self.perceptual = PerceptualLoss(extractor.device)
        self.features = np.empty((2, source.count, extractor.num_features), np.float32)  # of images, of reconstructions
        scales = model.config.scales
        # whole numbers: float32 stops counting at 2^24, which 50,000 images of 680 tokens exceed
        self.counts_KV = torch.zeros(scales.num_scales, model.config.vocab_size, dtype=torch.int64)
        self.count = self.num_exact = 0
        self.squared_error = self.psnr = 0.0
        self.sums: dict[str, float] = {}
        self.skipped: dict[str, str] = {}

    def add(self, images_u8: Tensor) -> None:
        """Encode, decode and measure one batch of uint8 images (n, 3, H, W)."""
        model, images = self.model, images_u8.to(self.extractor.device)
        codes_BL = model.encode(images.float() / 127.5 - 1)
        decoded = model.decode(model.quantizer.embed(codes_BL))
        if not torch.isfinite(decoded).all():
            raise NumericError(f"reconstructions of `{self.source.shown}` are not finite", "use --device cpu")
        others = ((decoded + 1) * 127.5).round().to(torch.uint8)
        self.counts_KV += count_codes(codes_BL, model.config.scales, model.config.vocab_size).long().cpu()
        for kept, pixels in zip(self.features, (images, others), strict=True):
            kept[self.count : self.count + len(images)] = self.extractor.extract(pixels)[0].float().cpu().numpy()
        self._add_pixels(images, others)
        self._add_perceived(images, others)
        self.count += len(images)

    def _add_pixels(self, images: Tensor, others: Tensor) -> None:
        # sums of whole numbers, which no batch size changes
        squared = (images.int() - others.int()).square().sum(dim=(1, 2, 3)).cpu().double() / images[0].numel()
        wrong = squared[squared > 0]
        self.num_exact += len(squared) - len(wrong)
        self.squared_error += float(squared.sum())
        self.psnr += float(peak_signal_to_noise(wrong, peak=255).sum())
        if min(images.shape[2:]) < WINDOW:
            self.skipped["ssim"] = f"its window is {WINDOW} px wide, but the images {images.shape[3]}"
        else:
            self._sum("ssim", ssim(images, others))

    def _add_perceived(self, images: Tensor, others: Tensor) -> None:
        if self.lpips is not None and min(images.shape[2:]) < LPIPS_SIDE:
            self.skipped["lpips"] = f"it needs images of {LPIPS_SIDE} px, but these have {images.shape[3]}"
        pair = [pixels.float() / 127.5 - 1 for pixels in (images, others)]
        if self.lpips is not None and "lpips" not in self.skipped:
            self._sum("lpips", self.lpips(*pair).expand(len(images)))
        self._sum("lite0_distance", self.perceptual(*pair).expand(len(images)))

    def _sum(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())

    def finish(self) -> tuple[dict[str, float], dict[str, str]]:
        """Return the metrics and what was skipped."""
        for kept, what in zip(self.features, ("images", "reconstructions"), strict=True):
            if not np.isfinite(kept).all():
                raise NumericError(
                    f"the {self.extractor.name} features of the {what} are not finite", "use --device cpu"
                )
        device, metrics = self.extractor.device, dict[str, float]()
        fid, kid = (f"r{metric.names(self.extractor.name)[0]}" for metric in (FID, KID))
        # rounding may leave the distance of equal sets a trace below 0
        metrics[fid] = max(0.0, frechet_distance(*self.features, device))
        metrics[kid] = paired_kernel_distance(*self.features, device)
        if self.num_exact < self.count:
            metrics["psnr"] = self.psnr / (self.count - self.num_exact)
            mean = torch.tensor(self.squared_error / self.count, dtype=torch.float64)
            metrics["psnr_of_mean_error"] = float(peak_signal_to_noise(mean, peak=255))
        else:
            reason = f"infinite: all {self.count:,} images came back without any error"
            self.skipped |= dict.fromkeys(("psnr", "psnr_of_mean_error"), reason)
        metrics |= {key: total / self.count for key, total in self.sums.items()}
        report = codebook_report(self.counts_KV.double())
        return {**metrics, **{key: report[key] for key in ("codebook_used", "perplexity")}}, self.skipped

    def scale_use(self) -> tuple[ScaleUse, ...]:
        """Return the use of the codebook, scale by scale."""
        report = codebook_report(self.counts_KV.double())
        scales, vocab_size = self.model.config.scales, self.model.config.vocab_size
        return tuple(
            ScaleUse(
                side=side,
                tokens=tokens,
                codebook_used=report[f"codebook_used_scale_{number}"],
                codebook_reachable=min(1.0, self.count * tokens / vocab_size),
                perplexity=report[f"perplexity_scale_{number}"],
            )
            for number, (side, tokens) in enumerate(zip(scales, scales.step_lengths, strict=True))
        )


def _choose_lpips(folder: Path | None, device: torch.device) -> tuple[nn.Module | None, str | None]:
    """Return LPIPS, or None and why it is left out: its weights are not at hand, and nobody asked for it."""
    try:
        return load_lpips(folder).to(device), None
    except ArtifactError as error:
        if folder is not None:
            raise
        return None, str(error)


def _open(
    images: Path | Tensor, config: ReconstructionConfig, side: int, stack: contextlib.ExitStack
) -> tuple[ImageSource, tuple[str, ...]]:
    """Open images at the tokenizer's size, and say what of them a reader must know. stack: holds temporary files."""
    path = None if isinstance(images, Tensor) else Path(images)
    if path is not None and str(images) == EMBEDDED and not path.exists():
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="varcli-"))) / EMBEDDED
        unpack_emoji64(path)
    if path is not None and path.suffix.lower() != ".npz" and not is_artifact(path):
        return _open_tree(path, escape_path(str(images)), config, side)
    source = from_tensor(images) if path is None else from_folder(path) if path.is_dir() else from_npz(open_npz(path))
    if source is None:
        raise DataError(f"`{escape_path(str(path))}` holds statistics alone, but images are needed")
    if config.split is not None:
        raise ConfigError(f"`{source.shown}` has no splits, but `{config.split}` was asked for", "leave --split out")
    if (source.height, source.width) != (side, side):
        raise DataError(
            f"`{source.shown}`: the images are {source.width} x {source.height} pixels, but this tokenizer takes "
            f"{side} x {side}",
            "pass a folder of the original images, which are cut to size, or the tokenizer for this size",
        )
    if config.count is not None and config.count < source.count:
        source = replace(source, count=config.count, shown=f"{source.shown}, the first {config.count:,}")
    return source, ()


def _open_tree(
    folder: Path, shown: str, config: ReconstructionConfig, side: int
) -> tuple[ImageSource, tuple[str, ...]]:
    tree = open_images(folder, allow_single_class=True)
    split = config.split or ("val" if "val" in tree.splits else next(iter(tree.splits)))
    if split not in tree.splits:
        raise unknown_name("split", split, tree.splits)
    chosen = tree.splits[split]
    typical = typical_side(tree.root, chosen)
    if typical < side and chosen.pixels is None:
        raise DataError(
            f"{shown}, {split} images: mostly smaller ({typical} px) than what this tokenizer takes ({side} px)",
            "enlarged images are blurred, and no measure: pass larger ones, or a tokenizer for their size",
        )
    if config.count is None or config.count >= len(chosen):
        source = from_tree(tree, split, side, shown=shown)
    else:
        # spread over the classes, in whose order a split lies
        indices = np.sort(np.random.default_rng(_CHOICE_SEED).permutation(len(chosen))[: config.count])
        source = from_tree(tree, split, side, indices, shown)
        drawn = f"{config.count:,} of {len(chosen):,} drawn with seed {_CHOICE_SEED}"
        source = replace(source, shown=f"{source.shown}, {drawn}")
    warnings = ()
    if split == "train" and "val" in tree.splits:
        warnings = (
            "these are training images: if the tokenizer learned from them, the numbers are better than those of images "
            "it has not seen; pass --split val",
        )
    return source, warnings


def _count_warnings(count: int, extractor: Extractor) -> tuple[str, ...]:
    """Say what the number of images does to the Frechet distance."""
    if count <= extractor.num_features:
        return (
            f"{count:,} images are few for {extractor.num_features:,} features: compare the Frechet distance only with that "
            "of other tokenizers on the same images",
        )
    if extractor.name == "inception" and count != cautions.PUBLISHED_COUNT:
        return (
            f"{count:,} images: published rFIDs are of the {cautions.PUBLISHED_COUNT:,} validation images of ImageNet; "
            "another number of images gives another rFID",
        )
    return ()


def _describe(model: VQVAE, folder: Path) -> dict[str, Any]:
    config = model.config
    bits_per_pixel = config.scales.seq_len * float(np.log2(config.vocab_size)) / config.image_size**2
    return {
        "path": escape_path(str(folder)),
        "fingerprint": model.fingerprint(),
        "image_size": config.image_size,
        "patch_nums": list(config.patch_nums),
        "vocab_size": config.vocab_size,
        "tokens_per_image": config.scales.seq_len,
        "bits_per_pixel": bits_per_pixel,
        "compression": _BITS_OF_A_PIXEL / bits_per_pixel if bits_per_pixel else None,
    }
