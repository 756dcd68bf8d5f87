"""What `varcli bench` runs: the models, the batches, and how they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from varcli import config as configs
from varcli.errors import ConfigError
from varcli.scales import PatchNums
from varcli.tokenizer import TokenizerConfig
from varcli.training.tokenizer_settings import TokenizerTrainConfig
from varcli.transformer import TransformerConfig

_SMALL_SIDE = 64  # pixels, of the small tokenizer


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is run. The defaults are the released model for 256 px at depth 16."""

    depth: int = 16  # of the transformer
    scales: str = "256"  # name of a schedule, or sides joined by commas
    tokenizer_width: int = 160  # channels of the tokenizer at full resolution
    # train-tokenizer: settings of the training; of them tokenizer (None: as above), batch_size, precision, compile do not count
    tokenizer_training: TokenizerTrainConfig | None = None
    batch_sizes: tuple[int, ...] = (64,)  # images at once, one measurement each
    precision: str = "auto"  # auto, fp32, bf16 or fp16
    compile: bool = False  # torch.compile what runs often
    kernels: tuple[str, ...] = ("auto",)  # train, sample: auto, torch or triton, one measurement each
    # train in several processes: ddp, fsdp or hsdp, one measurement each, after one of each process
    # for itself; none is ddp
    parallel: tuple[str, ...] = ()
    fp8: bool = False  # train, sample: the blocks' large products in FP8
    profile: bool = False  # also where the time goes, kernel by kernel
    repeats: int = 5  # timed runs, of which the median counts
    device: str = "auto"  # auto, cpu, cuda or mps
    num_files: int = 16_384  # tokenize-files: JPEG files
    workers: int | None = None  # tokenize-files: processes that decode; None takes one a core, at most 16

    def __post_init__(self) -> None:
        sizes = [("batch_size", size) for size in self.batch_sizes]
        for name, value in (("depth", self.depth), ("repeats", self.repeats), *sizes):
            if value < 1:
                raise ConfigError(f"{name} must be 1 or more, but is {value}")
        _ = self.patch_nums  # sides that cannot be are refused before anything is measured
        if not self.batch_sizes:
            raise ConfigError("batch_sizes must hold one size or more")
        if not self.kernels:
            raise ConfigError("kernels must be at least one of auto, torch, triton")
        if self.num_files < 2 or (self.workers is not None and self.workers < 0):
            raise ConfigError("tokenize-files needs two files or more, and 0 or more workers")

    @property
    def patch_nums(self) -> PatchNums:
        """The schedule of scales."""
        return PatchNums.parse(self.scales)

    @property
    def architecture(self) -> dict[str, Any]:
        """Settings of `tokenizer`: the released one's, or the small one's for 64 px if these are its schedule and width."""
        sides = tuple(self.patch_nums.sides)
        small = TokenizerConfig.for_side(_SMALL_SIDE)
        is_small = (sides, self.tokenizer_width) == (small.patch_nums, small.width)
        return configs.to_dict(small) if is_small else {"patch_nums": sides, "width": self.tokenizer_width}

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer of the schedule and width."""
        return configs.from_dict(TokenizerConfig, self.architecture)

    def describe(self, stage: str) -> dict[str, Any]:
        """The sizes that decide the rate of a stage."""
        training = self.tokenizer_training if stage == "train-tokenizer" else None
        tokenizer = (training.tokenizer if training else None) or self.tokenizer
        sizes = {"image_size": tokenizer.image_size, "patch_nums": list(tokenizer.patch_nums)}
        if stage in ("train", "sample"):
            sizes["depth"] = self.depth
        if stage != "train":
            sizes |= {"tokenizer_width": tokenizer.width, "vocab_size": tokenizer.vocab_size}
        return sizes

    @property
    def transformer(self) -> TransformerConfig:
        """A transformer of the paper's architecture that predicts this tokenizer's codes."""
        tokenizer = self.tokenizer
        return TransformerConfig.from_depth(
            self.depth,
            step_lengths=self.patch_nums.step_lengths,
            vocab_size=tokenizer.vocab_size,
            code_channels=tokenizer.code_channels,
        )
