"""Pictures from a tokenizer and a transformer that belong together."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varcli import config as configs
from varcli.data.classes import ClassNames
from varcli.devices import autocast, resolve_device, resolve_precision
from varcli.errors import ArtifactError, ConfigError, NumericError, unknown_name
from varcli.order import ORDERS
from varcli.sampling.logits import CFG_SCHEDULES, draw, guide, smooth_vectors, truncate
from varcli.sampling.models import find_model
from varcli.sampling.noise import KeyedNoise, Noise
from varcli.tokenizer import VQVAE
from varcli.tokenizer.store import load_tokenizer
from varcli.transformer import Transformer
from varcli.transformer.store import load_transformer

Choose = Callable[[int, Tensor], Tensor]

_MAX_NOISE = 2**26  # numbers of one step's noise: bounds what a batch takes besides the model
_STREAM_CODES, _STREAM_SMOOTH = 0, 1


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How codes are drawn. The defaults are those of the paper's FIDs."""

    cfg: float = 1.5  # classifier-free guidance in VAR's convention: 0 is none
    cfg_schedule: str = "linear"  # how guidance grows with the steps; a name of CFG_SCHEDULES
    top_k: int | None = 900  # codes a draw may choose from; None is off
    top_p: float | None = 0.96  # probability those of them keep; None is off
    smooth: bool = False  # blend code vectors instead of picking one; nicer to look at, never for a metric
    seed: int = 0  # image i of a class depends on (seed, class, i) alone
    precision: str = "auto"  # auto, fp32, bf16 or fp16

    def __post_init__(self) -> None:
        if self.cfg_schedule not in CFG_SCHEDULES:
            raise unknown_name("guidance schedule", self.cfg_schedule, CFG_SCHEDULES)
        if not self.cfg >= 0:
            raise ConfigError(f"cfg must be 0 or more, but is {self.cfg}", "0 is no guidance, 1.5 the paper's, 4 vivid")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, but is {self.top_k}", "leave it out to draw from all codes")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, but is {self.top_p}", "1 draws from all codes")


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
        self.classes = ClassNames.of(classes, config.num_classes)
        self.device = next(transformer.parameters()).device

    @classmethod
    def load(cls, name: str | Path | None = None, device: str = "auto") -> Generator:
        """Load a model or run by path or name; None takes the newest run in runs/, else the one that comes with varcli.

        Raises ArtifactError if there is none, it is damaged, or tokenizer and transformer do not belong together.
        """
        folder, where = find_model(name).folder, resolve_device(device)
        transformer, manifest = load_transformer(folder / "transformer", where)
        tokenizer = load_tokenizer(folder / "tokenizer", where)
        wanted, found = manifest.info.get("tokenizer"), tokenizer.fingerprint()
        if wanted is not None and wanted != found:
            raise ArtifactError(
                f"the transformer in `{folder}` was trained on codes of tokenizer {wanted[:6]}, but the one beside it is "
                f"{found[:6]}",
                "put back the tokenizer it was trained with",
            )
        order = str(manifest.info.get("order", "scale"))
        sha256 = manifest.files["weights.safetensors"].sha256
        source = manifest.info.get("source")
        suggested = manifest.info.get("sampling")
        suggested = suggested if isinstance(suggested, Mapping) else None
        return cls(tokenizer, transformer, manifest.info.get("classes"), order, sha256, source, suggested)

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
        config = configs.replace(config or SampleConfig(), settings)
        numbers, indices = self._number(classes, indices)
        size = batch_size or self.default_batch_size
        parts = []
        for start in range(0, len(numbers), size):
            batch, places = numbers[start : start + size], indices[start : start + size]
            noise = KeyedNoise(config.seed, batch, places, self.device)
            f_hat = self.generate(torch.tensor(batch, device=self.device), noise, config)
            parts.append(self.decode(f_hat, config).cpu())
        return torch.cat(parts)

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
        numbers, indices = self._number(classes, indices)
        noise = KeyedNoise(config.seed, numbers, indices, self.device)
        labels_B = torch.tensor(numbers, device=self.device)
        for f_hat in self._generate_steps(labels_B, noise, config):
            yield self.decode(f_hat, config).cpu()

    @property
    def default_batch_size(self) -> int:
        """Images at a time whose noise fits a fixed budget: 24 at 256 px, 512 for small models."""
        config = self.transformer.config
        return max(1, min(512, _MAX_NOISE // (max(config.step_lengths) * config.vocab_size)))

    def generate(self, labels_B: Tensor, noise: Noise, config: SampleConfig) -> Tensor:
        """Draw the codes of a batch of class numbers, step by step; return f_hat (B, Z, h, w), float32."""
        drawn: list[Tensor] = []
        f_hat = self.walk(labels_B, self._drawing(noise, config, drawn), config)
        return self._settle(f_hat, drawn)

    @torch.no_grad()
    def _generate_steps(self, labels_B: Tensor, noise: Noise, config: SampleConfig) -> Iterator[Tensor]:
        """Draw as `generate` does; yield what f_hat is after each step."""
        drawn: list[Tensor] = []
        for state in self._steps(labels_B, self._drawing(noise, config, drawn), config):
            yield self._settle(self.order.finish(state), drawn)

    def _drawing(self, noise: Noise, config: SampleConfig, drawn: list[Tensor]) -> Choose:
        """Return how vectors are chosen: from truncated logits, by `noise`; they are added to `drawn`."""

        def choose(step: int, logits_BlV: Tensor) -> Tensor:
            logits_BlV = truncate(logits_BlV, config.top_k, config.top_p)
            drawn.append(self._draw_vectors(logits_BlV, noise, step, config))
            return drawn[-1]

        return choose

    @torch.no_grad()
    def _settle(self, f_hat: Tensor, drawn: Sequence[Tensor]) -> Tensor:
        """Return f_hat, on a CPU put together from the vectors `drawn`, each image alone: so equal codes give equal bytes.

        Convolutions there round differently in another batch.
        """
        if self.device.type != "cpu":
            return f_hat
        return torch.cat([self._assemble([vectors[i : i + 1] for vectors in drawn]) for i in range(len(f_hat))])

    @torch.no_grad()
    def walk(self, labels_B: Tensor, choose: Choose, config: SampleConfig) -> Tensor:
        """Go through every step with cached keys and values; return f_hat (B, Z, h, w), float32.

        choose: from (step, guided logits (B, l, V), float32) to the vectors (B, l, Z) that the step adds. Whoever wants
        to record logits, or to force some codes, does it there.
        """
        # around all steps, so that autocast turns each weight once
        with autocast(self.device, resolve_precision(config.precision, self.device)):
            *_, state = self._steps(labels_B, choose, config)
        return self.order.finish(state)

    @torch.no_grad()
    def _steps(self, labels_B: Tensor, choose: Choose, config: SampleConfig) -> Iterator[Any]:
        """Yield the order's state after each step; `choose` as in `walk`."""
        dtype = resolve_precision(config.precision, self.device)
        batch, last = len(labels_B), max(len(self.order.step_lengths) - 1, 1)
        rows = labels_B
        if config.cfg:
            rows = torch.cat((labels_B, torch.full_like(labels_B, self.transformer.config.num_classes)))
        state, x_BlZ = self.order.start(batch, self.device), None
        with autocast(self.device, dtype):
            cache = self.transformer.start_cache(rows)
        for step in range(len(self.order.step_lengths)):
            with autocast(self.device, dtype):
                features = x_BlZ.repeat(len(rows) // batch, 1, 1) if x_BlZ is not None else None
                logits = self.transformer.step(features, cache).float()
                if not torch.isfinite(logits).all():
                    raise NumericError(
                        f"the transformer's logits at step {step} are not finite",
                        "use --precision bf16 or fp32"
                        if dtype == torch.float16
                        else "its training has diverged: look at the losses in the run's metrics.jsonl",
                    )
                if config.cfg:
                    share = CFG_SCHEDULES[config.cfg_schedule](step / last)
                    logits = guide(*logits.split(batch), config.cfg * share)
                state, x_BlZ = self.order.advance(state, step, choose(step, logits))
            yield state

    @torch.no_grad()
    def decode(self, f_hat_BZhw: Tensor, config: SampleConfig | None = None) -> Tensor:
        """Turn feature maps into uint8 images (B, 3, H, W), rounded to the nearest level."""
        dtype = resolve_precision((config or SampleConfig()).precision, self.device)
        chunk = 1 if self.device.type == "cpu" else len(f_hat_BZhw)  # as in `generate`
        with autocast(self.device, dtype):
            images = torch.cat([self.tokenizer.decode(part) for part in f_hat_BZhw.split(chunk)])
        return ((images.float() + 1) * 127.5).round().to(torch.uint8)

    def _assemble(self, vectors: Sequence[Tensor]) -> Tensor:
        """Put the vectors (B, l, Z) of every step together to f_hat (B, Z, h, w)."""
        state = self.order.start(len(vectors[0]), self.device)
        for step, vectors_BlZ in enumerate(vectors):
            state, _ = self.order.advance(state, step, vectors_BlZ)
        return self.order.finish(state)

    def _draw_vectors(self, logits_BlV: Tensor, noise: Noise, step: int, config: SampleConfig) -> Tensor:
        """Return the vectors (B, l, Z) of truncated logits."""
        _, length, vocab_size = logits_BlV.shape
        if not config.smooth:
            return self.order.lookup(draw(logits_BlV, noise(step, _STREAM_CODES, length, vocab_size)))
        progress = step / max(len(self.order.step_lengths) - 1, 1)
        gumbel = noise(step, _STREAM_SMOOTH, length, vocab_size)
        with torch.autocast(self.device.type, enabled=False):
            return smooth_vectors(logits_BlV, gumbel, self.tokenizer.quantizer.codebook.weight.float(), progress)

    def _number(self, classes: Sequence[int | str], indices: Sequence[int] | None) -> tuple[list[int], list[int]]:
        """Return the class number of each image asked for, and which image of its class it is."""
        if isinstance(classes, str):
            raise ConfigError(
                f"classes must be a list of names or numbers, but is `{classes}`", f"e.g. ['{classes}'] * 4"
            )
        numbers = [self._resolve(entry) for entry in classes]
        if not numbers:
            raise ConfigError("there is nothing to sample", "ask for at least one image")
        if indices is None:
            counters: dict[int, itertools.count] = defaultdict(itertools.count)
            indices = [next(counters[number]) for number in numbers]
        if len(indices) != len(numbers):
            raise ConfigError(f"there are {len(numbers)} classes, but {len(indices)} indices", "pass one for each")
        return numbers, list(indices)

    def _resolve(self, entry: int | str) -> int:
        if not isinstance(entry, str):
            if isinstance(entry, bool) or not hasattr(entry, "__index__"):
                raise ConfigError(f"a class is a name or a whole number, but got {entry!r}")
            entry = operator.index(entry)  # numpy's and torch's whole numbers, too
        no_class = self.transformer.config.num_classes
        return no_class if entry == no_class else self.classes.resolve(entry)
