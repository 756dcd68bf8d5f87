"""Pictures from a tokenizer and a transformer that belong together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varcli import config as configs
from varcli.data.classes import ClassNames
from varcli.devices import autocast, exact_convolutions, precision_name, resolve_device, resolve_precision
from varcli.errors import ArtifactError, ConfigError, MemoryLimitError, NumericError, is_out_of_memory, unknown_name
from varcli.kernels import resolve_kernels
from varcli.kernels.conv3x3 import introduce
from varcli.kernels.wake import wake
from varcli.order import ORDERS
from varcli.sampling.choose import CodeChooser
from varcli.sampling.engine import Engine
from varcli.sampling.memory import choose_batch_size, choose_decode_chunk, image_bytes
from varcli.sampling.models import find_model
from varcli.sampling.noise import KeyedNoise, Noise
from varcli.sampling.requests import number_images
from varcli.sampling.settings import SampleConfig, check_suggested
from varcli.sampling.transfer import Transfer
from varcli.sampling.walk import walk_steps
from varcli.tokenizer import VQVAE
from varcli.tokenizer.store import load_tokenizer
from varcli.transformer import Transformer
from varcli.transformer.store import load_transformer

_CAPTURE_FROM = 4  # batches: capturing takes about as long as drawing three


class Generator:
    """A transformer, the tokenizer its codes belong to, and the names of its classes.

    Raises ArtifactError if the two do not fit together.
    """

    def __init__(
        self,
        tokenizer: VQVAE,
        transformer: Transformer,
        classes: Sequence[str] | None = None,
        order: str = "scale",
        weights_sha256: str | None = None,
        source: str | None = None,
        suggested: Mapping[str, Any] | None = None,
    ) -> None:
        if order not in ORDERS:
            raise unknown_name("order", order, ORDERS, ArtifactError)
        self.tokenizer, self.transformer = tokenizer, transformer
        self.weights_sha256 = weights_sha256  # of the transformer's file, None if it came from none
        self.source = source  # the images it learned from, as its manifest names them
        self.suggested = dict(suggested or {})  # settings of SampleConfig that its maker found to look best
        self.order = ORDERS[order](tokenizer.quantizer)
        config = transformer.config
        mine = (tuple(config.step_lengths), config.vocab_size, config.code_channels)
        wanted = (tuple(self.order.step_lengths), tokenizer.config.vocab_size, tokenizer.config.code_channels)
        if mine != wanted:
            raise ArtifactError(
                f"the transformer predicts steps, codes and channels {mine}, but the tokenizer has {wanted}",
                "use the tokenizer that its codes were written with",
            )
        if classes is not None:
            is_list = not isinstance(classes, str) and all(isinstance(name, str) for name in classes)
            if not is_list or len(classes) != config.num_classes:
                raise ArtifactError(
                    f"the transformer has {config.num_classes} classes, but their names are no list of as many texts: "
                    f"{str(classes)[:80]}",
                    "its manifest was edited; restore it from a copy",
                )
        self.classes = ClassNames.of(classes, config.num_classes)
        self.device = next(transformer.parameters()).device
        if transformer.output_projection.weight.dtype != torch.float32:  # which computes as golden data do
            transformer.kernels = tokenizer.quantizer.kernels = resolve_kernels("auto", self.device)
        self._to_pixels = to_pixels
        self._decode_chunks: dict[tuple[int, torch.dtype], int] = {}  # images decoded at once, by batch and precision
        self._batch_sizes: dict[tuple[bool, bool, torch.dtype], int] = {}  # by guidance, smoothness and precision
        self._engine: Engine | None = None
        self._engine_key: tuple[SampleConfig, int] | None = None

    @classmethod
    def load(
        cls, name: str | Path | None = None, device: str = "auto", precision: str = "auto", fp8: bool = False
    ) -> Generator:
        """Load a model or run by path or name; None takes the newest run in runs/, else the one that comes with varcli.

        precision: of `SampleConfig`; in half precision the transformer takes half the memory, and samples in that alone.
        fp8: beside bf16, the weights of the large products are rounded to FP8, a quarter of the memory, and multiplied in it.
        Raises ArtifactError if there is none, it is damaged, or tokenizer and transformer do not belong together;
        ConfigError if the device has no FP8.
        """
        folder, where = find_model(name).folder, resolve_device(device)
        if where.type == "cuda" and where.index is None:
            # each thread has a current GPU of its own; to ask for it would start CUDA here, if that is not done yet
            where = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
        dtype = resolve_precision(precision, where)
        with ThreadPoolExecutor(2) as pool:  # most of either is reading, and digests of what was read
            pool.submit(wake, where)  # what fails there fails again where it is needed
            other = pool.submit(_load_tokenizer, folder / "tokenizer", where, dtype)
            transformer, manifest = load_transformer(folder / "transformer", where, dtype, fp8)
            tokenizer, found = other.result()
        wanted = manifest.info.get("tokenizer")
        if wanted is not None and wanted != found:
            raise ArtifactError(
                f"the transformer in `{folder}` was trained on codes of tokenizer {str(wanted)[:6]}, but the one beside it is "
                f"{found[:6]}",
                "put back the tokenizer it was trained with",
            )
        order = str(manifest.info.get("order", "scale"))
        sha256 = manifest.files["weights.safetensors"].sha256
        source = manifest.info.get("source")
        suggested = check_suggested(folder / "transformer", manifest.info.get("sampling"))
        generator = cls(tokenizer, transformer, manifest.info.get("classes"), order, sha256, source, suggested)
        generator.tokenizer_fingerprint = found
        return generator

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """The digest of the tokenizer, which takes as long as reading it."""
        return self.tokenizer.fingerprint()

    def sample(
        self,
        classes: Sequence[int | str],
        indices: Sequence[int] | None = None,
        config: SampleConfig | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw one image for each entry of `classes`: uint8 (n, 3, H, W) on the CPU.

        classes: names or numbers; the number of classes itself stands for "no class". indices: which image of its class
        each is; by default they count up. settings: fields of SampleConfig, e.g. cfg=2.0.
        Equal (seed, class, index) give the same picture whatever the batch; on a CPU byte for byte, as long as no two
        codes tie within rounding and `smooth` is off.
        Raises DataError for an unknown class, ConfigError for an empty list.
        """
        return torch.cat(list(self.batches(classes, indices, config, batch_size, **settings)))

    def batches(
        self,
        classes: Sequence[int | str],
        indices: Sequence[int] | None = None,
        config: SampleConfig | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Iterator[Tensor]:
        """Draw as `sample` does, and yield the images batch by batch in the order given: uint8 (n, 3, H, W) on the CPU.

        Where batches are graphs, one is handed over while the device draws the next. Raises as `sample` does, when the first
        batch is asked for; NumericError from the batch that it is about.
        """
        config = configs.replace(config or SampleConfig(), settings)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, but is {batch_size}", "None takes what fits the memory")
        numbers, indices = number_images(classes, indices, self.classes)
        done = 0
        while done < len(numbers):
            size = min(batch_size or self.batch_size(config), len(numbers))
            is_full = False
            try:
                for images in self._batches_of(size, numbers[done:], indices[done:], config):
                    yield images
                    done += len(images)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                is_full = True
            if is_full:  # only now is what the failed batch held free
                self._engine, self._engine_key = None, None
                if batch_size is not None or size == 1:
                    raise MemoryLimitError(
                        f"there is too little memory on {self.device} to draw {size} images at once",
                        "use --batch-size 1, --precision bf16 or --device cpu, or close what else uses the device",
                    )
                self._batch_sizes[bool(config.cfg), config.smooth, self.dtype(config)] = size // 2
                torch.cuda.empty_cache()

    def _batches_of(self, size: int, numbers: list[int], indices: list[int], config: SampleConfig) -> Iterator[Tensor]:
        """Draw in batches of `size` images."""
        engine = self._engine_for(config, size, num_batches=-(-len(numbers) // size))
        under_way: Transfer | None = None
        for start in range(0, len(numbers), size):
            batch, places = numbers[start : start + size], indices[start : start + size]
            if engine is None:
                noise = KeyedNoise(config.seed, batch, places, self.device)
                f_hat = self.generate(torch.tensor(batch, device=self.device), noise, config)
                yield self.decode(f_hat, config).cpu()
                continue
            following = Transfer(*engine.start(config.seed, batch, places))
            if under_way is not None:
                yield self._land(under_way, config)
            under_way = following
        if under_way is not None:
            yield self._land(under_way, config)

    def _land(self, under_way: Transfer, config: SampleConfig) -> Tensor:
        images, is_bad = under_way.wait()
        self.require_finite(is_bad, config)
        return images

    def _engine_for(self, config: SampleConfig, size: int, num_batches: int) -> Engine | None:
        """Return what draws batches of `size` fastest: None where nothing is gained, as for a few batches."""
        if self.device.type != "cuda":
            return None
        key = configs.replace(config, {"seed": 0}), size
        is_known = self._engine_key == key
        self._engine_key, self._engine = key, self._engine if is_known else None
        if self._engine is None and (is_known or num_batches >= _CAPTURE_FROM):
            self._engine = Engine(self, config, size)
        return self._engine

    def compile(self, backend: str = "inductor") -> None:
        """Let torch.compile fuse the decoder, and steps where Triton does not: a minute once, for many images to come.

        backend: of torch.compile. Equal codes then give pictures that may differ by rounding.
        """
        self._engine, self._engine_key = None, None
        if self.transformer.kernels == "torch":
            self.transformer.compile_steps(backend)
        self.transformer.prefetch_weights()
        if self.device.type == "cuda":
            introduce()
            dtype = self.transformer.output_projection.weight.dtype
            self.tokenizer.post_conv.to(memory_format=torch.channels_last)  # slower than before unless it is compiled
            if dtype == torch.float32:
                self.tokenizer.decoder.to(memory_format=torch.channels_last)
            else:
                self.tokenizer.decoder.lay_out(dtype)
        self._to_pixels = torch.compile(to_pixels, backend=backend, dynamic=False)

    def stream(
        self,
        classes: Sequence[int | str],
        indices: Sequence[int] | None = None,
        config: SampleConfig | None = None,
        **settings: Any,
    ) -> Iterator[Tensor]:
        """Draw as `sample` does, all in one batch, and yield the images after each step: uint8 (n, 3, H, W) on the CPU.

        For pages and notebooks that show a picture while it comes: first its rough colours, the last one finished and equal
        to `sample`'s. Raises as `sample` does, when the first picture is asked for.
        """
        config = configs.replace(config or SampleConfig(), settings)
        numbers, indices = number_images(classes, indices, self.classes)
        chooser = self._chooser(KeyedNoise(config.seed, numbers, indices, self.device), config)
        labels_B = torch.tensor(numbers, device=self.device)
        steps = walk_steps(self.transformer, self.order, labels_B, chooser, config, self.dtype(config))
        while True:
            with self._convolutions(config):
                state = next(steps, None)
            if state is None:
                return
            self.require_finite(chooser.is_bad, config)
            yield self.decode(self._settle(self.order.finish(state), chooser.drawn), config).cpu()

    def batch_size(self, config: SampleConfig) -> int:
        """Images at a time that fit the device's memory, at most 256 on a GPU; fewer once that many did not fit."""
        key = is_guided, is_smooth, dtype = bool(config.cfg), config.smooth, self.dtype(config)
        if key not in self._batch_sizes:
            image = image_bytes(self.transformer.config, dtype, is_guided, is_smooth)
            self._batch_sizes[key] = choose_batch_size(self.transformer.config, image, self.device)
        return self._batch_sizes[key]

    def dtype(self, config: SampleConfig) -> torch.dtype:
        """Precision of matrix products. Raises ConfigError for another one than the weights were loaded in."""
        stored = self.transformer.output_projection.weight.dtype
        if stored == torch.float32:
            return resolve_precision(config.precision, self.device)
        if config.precision != "auto" and resolve_precision(config.precision, self.device) != stored:
            raise ConfigError(
                f"the model was loaded in {precision_name(stored)}, but precision is {config.precision}",
                f"load it with precision={config.precision!r}",
            )
        return stored

    def generate(self, labels_B: Tensor, noise: Noise, config: SampleConfig) -> Tensor:
        """Draw the codes of a batch of class numbers, step by step; return f_hat (B, Z, h, w), float32.

        Raises NumericError if a logit is no finite number.
        """
        f_hat, is_bad = self.generate_unchecked(labels_B, noise, config)
        self.require_finite(is_bad, config)
        return f_hat

    def generate_unchecked(self, labels_B: Tensor, noise: Noise, config: SampleConfig) -> tuple[Tensor, Tensor]:
        """Do as `generate` without waiting for the device: return f_hat, and what `require_finite` reads."""
        chooser = self._chooser(noise, config)
        with self._convolutions(config):
            *_, state = walk_steps(self.transformer, self.order, labels_B, chooser, config, self.dtype(config))
        return self._settle(self.order.finish(state), chooser.drawn), chooser.is_bad

    def require_finite(self, is_bad: Tensor, config: SampleConfig) -> None:
        """Raise NumericError if a generation met logits that are no finite numbers. is_bad: 0-d, 1 if it did."""
        if is_bad.item():
            raise NumericError(
                "the transformer's logits are not finite",
                "use --precision bf16 or fp32"
                if self.dtype(config) == torch.float16
                else "its training has diverged: look at the losses in the run's metrics.jsonl",
            )

    def _convolutions(self, config: SampleConfig) -> contextlib.AbstractContextManager:
        """Convolutions in float32 if that is the precision: cuDNN rounds to TF32 unless told otherwise."""
        is_exact = self.device.type == "cuda" and self.dtype(config) == torch.float32
        return exact_convolutions() if is_exact else contextlib.nullcontext()

    def _chooser(self, noise: Noise, config: SampleConfig) -> CodeChooser:
        return CodeChooser(self.order, self.tokenizer.quantizer.codebook.weight.float(), noise, config)

    @torch.no_grad()
    def _settle(self, f_hat: Tensor, drawn: Sequence[Tensor]) -> Tensor:
        """Return f_hat, on a CPU put together from the vectors `drawn`, each image alone: so equal codes give equal bytes.

        Convolutions there round differently in another batch.
        """
        if self.device.type != "cpu":
            return f_hat
        return torch.cat([self._assemble([vectors[i : i + 1] for vectors in drawn]) for i in range(len(f_hat))])

    @torch.no_grad()
    def decode(self, f_hat_BZhw: Tensor, config: SampleConfig | None = None) -> Tensor:
        """Turn feature maps into uint8 images (B, 3, H, W), rounded to the nearest level, a few at a time."""
        config = config or SampleConfig()
        key = batch, dtype = len(f_hat_BZhw), self.dtype(config)
        if key not in self._decode_chunks:  # asked once, so that it is not asked while a graph is captured
            self._decode_chunks[key] = choose_decode_chunk(batch, self.tokenizer.config, dtype, self.device)
        chunk = self._decode_chunks[key]
        with autocast(self.device, dtype), self._convolutions(config):
            return torch.cat([self._to_pixels(self.tokenizer, part) for part in f_hat_BZhw.split(chunk)])

    def _assemble(self, vectors: Sequence[Tensor]) -> Tensor:
        """Put the vectors (B, l, Z) of every step together to f_hat (B, Z, h, w)."""
        state = self.order.start(len(vectors[0]), self.device)
        for step, vectors_BlZ in enumerate(vectors):
            state, _ = self.order.advance(state, step, vectors_BlZ)
        return self.order.finish(state)


def _load_tokenizer(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[VQVAE, str]:
    """A tokenizer that decodes in `dtype`, on its device, and its fingerprint."""
    tokenizer = load_tokenizer(folder)
    fingerprint = tokenizer.fingerprint()
    tokenizer.keep_decoder_in(dtype)
    return tokenizer.to(device), fingerprint


def to_pixels(tokenizer: VQVAE, f_hat_BZhw: Tensor) -> Tensor:
    """Decode feature maps to uint8 images (B, 3, H, W)."""
    return ((tokenizer.decode(f_hat_BZhw).float() + 1) * 127.5).round().to(torch.uint8)
