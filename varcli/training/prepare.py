"""Before a transformer's first step: one micro-batch is tried out, made smaller until it fits, and the plan is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from varcli.devices import try_compiled
from varcli.distributed.context import exchange
from varcli.errors import is_out_of_memory
from varcli.progress import Step
from varcli.training.plan import TrainPlan, is_tight, process_bytes, share_evenly, time_once, update_bytes
from varcli.training.recipes import choose_recipe
from varcli.training.state import undisturbed
from varcli.transformer import drop_branches

if TYPE_CHECKING:
    from varcli.training.transformer_trainer import TransformerTrainer

_CALIBRATION_IMAGES = 8  # timed on a CPU, where a whole micro-batch may take long


def prepare(trainer: TransformerTrainer, start_step: int) -> TrainPlan:
    """Compile, time one micro-batch without learning from it, and say what the run will take.

    start_step: optimizer steps done already. If torch.compile fails and was not asked for, it is left out. If memory does
    not suffice, a micro-batch that nobody asked for is made smaller until it does: by all processes, if one of them has too
    little; but not where they hold shards, since one that fails leaves the others waiting for its own. On CUDA the peak of
    memory is counted anew from here on: it is the training's.
    """
    while True:
        found: tuple[float, int] | None = None
        try:
            found = _try_out(trainer, start_step)
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and _can_shrink(trainer)):
                raise
        # not within the except clause, where the error still holds on to what filled the memory
        has_room = found is not None and not is_tight(found[1], trainer.device)
        (is_short,) = trainer.world.largest(not has_room)
        if found is not None and not (is_short and _can_shrink(trainer)):
            _reset_peak(trainer.device)
            return _describe(trainer, start_step, *found)
        _shrink(trainer, start_step)


def _can_shrink(trainer: TransformerTrainer) -> bool:
    is_open = trainer.config.micro_batch_size is None and not trainer.config.cuda_graphs
    return is_open and trainer.micro_batch_size > 1 and not trainer.parallel.is_sharded


def _shrink(trainer: TransformerTrainer, start_step: int) -> None:
    before = trainer.micro_batch_size
    trainer.micro_batch_size = share_evenly(trainer.share_size, before // 2)
    trainer.updater.optimizer.zero_grad(set_to_none=True)
    if trainer.is_compiled:
        torch.compiler.reset()  # what was compiled for a size that does not fit would take the place of others
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    text = f"{before:,} images at a time do not fit the memory: going on with {trainer.micro_batch_size:,}"
    trainer.on_step(Step(start_step, trainer.config.steps, message=text))


def _try_out(trainer: TransformerTrainer, start_step: int) -> tuple[float, int]:
    """Return the seconds that an image takes, and the bytes at the peak of a step."""
    device, on_cuda = trainer.device, trainer.device.type == "cuda"
    images = trainer.micro_batch_size if on_cuda else min(trainer.micro_batch_size, _CALIBRATION_IMAGES)
    codes, labels = (tensor[:images] for tensor in trainer.source.batch(start_step))

    def try_out(with_gradients: bool = False) -> None:
        branches = drop_branches(trainer.model_config, images, None, device)
        if not with_gradients:
            trainer.updater.optimizer.zero_grad(set_to_none=True)
        # copies exchange nothing, so that one that runs out of memory can tell the others; of shards nothing must be left over
        with exchange(and_more=True), trainer.parallel.accumulating(is_last=trainer.parallel.is_sharded):
            trainer.updater.backward(trainer.objective.loss(codes, labels, branches)[0])

    def tell(text: str) -> None:
        trainer.on_step(Step(start_step, trainer.config.steps, message=text))

    with undisturbed(device):
        if trainer.is_compiled:
            # shards that were gathered once more by one process alone would have the others wait
            is_optional = not trainer.config.compile and not trainer.parallel.is_sharded
            trainer.is_compiled = try_compiled(try_out, trainer.objective.uncompile, tell, is_optional=is_optional)
        else:
            try_out()
        _reset_peak(device)  # compiling may have taken more than a step will
        is_cut = trainer.micro_batch_size < trainer.share_size  # all but a step's first piece find gradients
        seconds = time_once(lambda: try_out(with_gradients=is_cut), device)
    trainer.updater.optimizer.zero_grad(set_to_none=True)
    memory_bytes = torch.cuda.max_memory_allocated(device) if on_cuda else process_bytes()
    held = trainer.model.num_parameters // trainer.parallel.num_shards
    memory_bytes += 8 * held  # the moments come with the first step
    memory_bytes += (trainer.micro_batch_size - images) * trainer.image_bytes()
    return seconds / images, max(memory_bytes, update_bytes(held, len(trainer.averages.members)))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _describe(trainer: TransformerTrainer, start_step: int, image_seconds: float, memory_bytes: int) -> TrainPlan:
    config, model, source = trainer.config, trainer.model_config, trainer.source
    is_cuda = trainer.device.type == "cuda"
    return TrainPlan(
        recipe=choose_recipe(config.depth, trainer.device.type).name,
        device=torch.cuda.get_device_name(trainer.device) if is_cuda else trainer.device.type,
        precision=config.precision,
        is_fp8=config.fp8,
        is_compiled=trainer.is_compiled,
        depth=model.depth,
        width=model.width,
        num_parameters=trainer.model.num_parameters,
        tokens_per_image=model.seq_len,
        vocab_size=model.vocab_size,
        num_images=source.num_images,
        num_views=int(source.num_views.max()),
        num_validation=0 if trainer.validation is None else len(trainer.validation.labels),
        num_classes=len(trainer.classes),
        start_step=start_step,
        steps=config.steps,
        batch_size=trainer.batch_size,
        micro_batch_size=trainer.micro_batch_size,
        processes=trainer.world.size,
        parallel=trainer.mode,
        learning_rate=config.learning_rate,
        memory_bytes=memory_bytes,
        seconds=(config.steps - start_step) * image_seconds * trainer.share_size,
        notes=_notes(trainer),
    )


def _notes(trainer: TransformerTrainer) -> tuple[str, ...]:
    notes = list(trainer.start_notes)
    if trainer.batch_size > trainer.source.num_images:
        times = trainer.batch_size / trainer.source.num_images
        notes.append(
            f"the batch is larger than the data: each step takes an image {times:.3g} times, and a signal waits for its end"
        )
    if trainer.validation is None:
        notes.append("the codes have no val split: nothing is held out, so overfitting would not be seen")
    if trainer.model.num_parameters > 20 * trainer.source.num_images * trainer.model_config.seq_len:
        notes.append("few images for so many parameters: expect the model to learn them by heart")
    return tuple(notes)
