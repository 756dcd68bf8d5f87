"""Training a transformer on a codes cache: the one call behind `varcli train`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varcli import config as configs
from varcli.artifacts.verify import read_manifest, verify_folder
from varcli.artifacts.write import prepare_folder
from varcli.data.codes import CodesCache, CodesSplit, require_tokenizer
from varcli.devices import precision_name, resolve_device, resolve_precision
from varcli.distributed import ALONE, World
from varcli.errors import ArtifactError
from varcli.progress import OnStep, ignore
from varcli.tokenizer.find import find_tokenizer, tokenizer_folder
from varcli.tokenizer.store import KIND as TOKENIZER_KIND
from varcli.tokenizer.store import load_tokenizer
from varcli.training.loop import run_training
from varcli.training.memory import memory_limits
from varcli.training.parent import find_parent
from varcli.training.plan import TrainPlan
from varcli.training.run import copy_artifact, open_run
from varcli.training.settings import FREE, TrainConfig, resolve
from varcli.training.source import CodesSource
from varcli.training.transformer_parent import read_parent, remember_parent
from varcli.training.transformer_trainer import OnEvaluate, OnSamples, SampleRequest, TransformerTrainer
from varcli.transformer.store import KIND

__all__ = ["OnPlan", "OnSamples", "SampleRequest", "TrainConfig", "TrainPlan", "TrainResult", "train_transformer"]

OnPlan = Callable[[TrainPlan], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run came to."""

    folder: Path  # the run folder, which is a model folder too
    step: int  # optimizer steps done
    seconds: float  # spent training, over all resumptions
    num_parameters: int  # weights of the transformer
    values: dict[str, float] = field(default_factory=dict)  # of the last log line of this call
    validation: dict[str, Any] = field(default_factory=dict)  # the last one of this call
    best: dict[str, float] | None = None  # step and loss of the best validation


def train_transformer(
    codes: Path,
    out: Path,
    config: TrainConfig | None = None,
    *,
    tokenizer: Path | str | None = None,
    init_from: Path | str | None = None,
    device: str = "auto",
    resume: str = "auto",
    given: Collection[str] | None = None,
    on_step: OnStep = ignore,
    on_plan: OnPlan | None = None,
    on_samples: OnSamples | None = None,
    on_evaluate: OnEvaluate | None = None,
    world: World = ALONE,
) -> TrainResult:
    """Train a transformer on a codes cache, into a run folder that can be sampled from; go on with a run begun there.

    codes: written by `varcli tokenize`. tokenizer: the one that wrote them, None looks for it by its fingerprint.
    init_from: a run, model or transformer folder whose architecture and weights a new run begins with; its classes may be
    others (`varcli.training.transformer_parent.load_parent`).
    resume: "auto", "last-good" after damage, or "never". given: names of settings that a resumed run must have been begun
    with, None means those that are not at their defaults; it keeps the others. on_plan: told once, before the first step.
    on_samples: draws the picture for samples/. on_evaluate: measures samples every `eval_every` steps. world:
    processes that share each batch and all call this, each with a device of its own; the first one alone validates, tells
    and writes (but for shards), and any number of them, copies or shards, may go on with a run. Sets torch's random seed.
    Raises ArtifactError or IntegrityError for codes, tokenizer or checkpoints that are not whole or do not belong
    together, ConfigError for settings that cannot be or differ from the run's, and what `run_training` raises.
    """
    where = resolve_device(device)
    cache = CodesCache.open(codes)
    source_folder = _choose_tokenizer(cache, Path(out), tokenizer)
    with open_run(out, resume, world) as run, _fast_matmul(where):
        parent = find_parent(run, init_from, KIND, read_parent, remember_parent)
        origin = {} if parent is None else {"init_from": parent.fingerprint}
        inputs = {"codes": cache.manifest.digest, "tokenizer": cache.tokenizer, **origin}
        run.require_same(KIND, inputs)
        train, validation = _load_splits(cache)
        config = config or TrainConfig()
        given = configs.changed(config) if given is None else given
        inherited = {} if parent is None else parent.settings(given)
        if config.steps is not None:
            run.is_finished(config.steps)  # fewer than are done is the first thing to say
        config = resolve(
            config,
            num_images=len(train.sources.unique()),
            has_validation=validation is not None,
            device_type=where.type,
            precision=precision_name(resolve_precision(config.precision, where)),
            stored={**(run.config or {}), **inherited},
            given=given,
        )
        run.require_same(KIND, inputs, configs.to_dict(config), FREE)  # before anything is foretold of another run
        is_finished = run.is_finished(config.steps)
        own_tokenizer = load_tokenizer(source_folder, where)
        require_tokenizer(cache, own_tokenizer.fingerprint(), f"`{source_folder}`")  # which its manifest need not know
        trainer = TransformerTrainer(
            config,
            own_tokenizer,
            CodesSource(train, config.batch_size, config.seed, where),
            CodesSource(validation, config.batch_size, config.seed, where) if validation else None,
            classes=cache.classes,
            device=where,
            on_samples=on_samples,
            on_evaluate=on_evaluate,
            images=cache.info.get("source"),
            on_step=on_step if world.is_first else ignore,
            parent=parent,
            world=world,
        )
        if not is_finished:
            num_saves = config.keep_checkpoints + 1 if run.checkpoint is None else 1
            if world.is_first:
                prepare_folder(run.path, need_bytes=num_saves * trainer.checkpoint_bytes())
            with memory_limits(trainer, world):
                plan = trainer.prepare(run.step)
            if on_plan is not None and world.is_first:
                on_plan(plan)
        run.settle(KIND, configs.to_dict(config), inputs, FREE)  # only now, so that what cannot be leaves no trace
        if world.is_first and not run.holds(TOKENIZER_KIND, TOKENIZER_KIND):
            copy_artifact(source_folder, run.path / TOKENIZER_KIND, TOKENIZER_KIND)
        info = {"codes": cache.manifest.digest, "images": trainer.source.num_images, **origin}
        info["source"] = cache.info.get("source")
        result = run_training(trainer, run, config.loop(), on_step, info)
    return TrainResult(
        folder=Path(out),
        step=result.step,
        seconds=result.seconds,
        num_parameters=trainer.model.num_parameters,
        values=result.values,
        validation=result.validation,
        best=result.best,
    )


def _load_splits(cache: CodesCache) -> tuple[CodesSplit, CodesSplit | None]:
    """Read what to learn from and, if it is there, what to measure on."""
    train = cache.load("train" if "train" in cache.splits else next(iter(cache.splits)))
    has_validation = "val" in cache.splits and "train" in cache.splits and cache.num_rows("val") > 0
    return train, cache.load("val") if has_validation else None


def _choose_tokenizer(cache: CodesCache, out: Path, given: Path | str | None) -> Path:
    """Return the folder of the tokenizer that wrote the codes: as given, the run's own copy, or one at hand."""
    if given is not None:
        folder = tokenizer_folder(given)
        require_tokenizer(cache, str(read_manifest(folder, TOKENIZER_KIND).info.get("fingerprint")))
        return folder
    own = out / TOKENIZER_KIND
    with contextlib.suppress(ArtifactError):  # not there, or not whole: then it is copied anew
        manifest = read_manifest(own, TOKENIZER_KIND)
        if manifest.info.get("fingerprint") == cache.tokenizer and not verify_folder(own, manifest):
            return own
    return find_tokenizer(cache.tokenizer)


@contextlib.contextmanager
def _fast_matmul(device: torch.device) -> Iterator[None]:
    """Let float32 products on a GPU use TF32, as VAR's trainer does."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
