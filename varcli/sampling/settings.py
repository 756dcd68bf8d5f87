"""How codes are drawn: the settings that decide a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varcli import config as configs
from varcli.errors import ArtifactError, ConfigError, unknown_name
from varcli.sampling.logits import CFG_SCHEDULES

_NOT_SUGGESTED = {"seed", "precision"}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How codes are drawn. The defaults are those of the paper's FIDs."""

    cfg: float = 1.5  # classifier-free guidance in VAR's convention: 0 is none
    cfg_schedule: str = "linear"  # how guidance grows with the steps; a name of CFG_SCHEDULES
    cfg_interval: tuple[float, float] | None = None  # progress, from 0 to 1, in which guidance is on; None is all of it
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
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, but is {self.seed}")
        if self.cfg_interval is not None:
            object.__setattr__(self, "cfg_interval", tuple(self.cfg_interval))  # a manifest holds lists
            if len(self.cfg_interval) != 2 or not 0 <= self.cfg_interval[0] <= self.cfg_interval[1] <= 1:
                raise ConfigError(
                    f"cfg_interval must be two numbers from 0 to 1, the smaller first, but is {self.cfg_interval}"
                )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, but is {self.top_k}", "None draws from all codes")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, but is {self.top_p}", "1 draws from all codes")

    def guidance(self, num_steps: int) -> list[float]:
        """Return the strength of guidance at each of `num_steps` steps, at progress k / (K - 1)."""
        low, high = self.cfg_interval or (0.0, 1.0)
        shares = [step / max(num_steps - 1, 1) for step in range(num_steps)]
        schedule = CFG_SCHEDULES[self.cfg_schedule]
        return [self.cfg * schedule(share) if low <= share <= high else 0.0 for share in shares]


def check_suggested(folder: Path, settings: Any) -> Mapping[str, Any] | None:
    """Return the settings that a transformer's manifest suggests for looking at: fields of SampleConfig, or None.

    Raises ArtifactError if they cannot be.
    """
    if settings is None:
        return None
    try:
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{settings!r} is no table")
        for name in _NOT_SUGGESTED & set(settings):
            raise ConfigError(f"`{name}` is for who draws to choose")
        configs.replace(SampleConfig(), settings)
    except ConfigError as error:
        raise ArtifactError(
            f"the manifest of `{folder}` suggests settings that cannot be: {error}",
            "it was edited; restore it from a copy",
        ) from None
    return settings
