"""Parts of a model that do not learn: what fine-tuning leaves bit for bit as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from varcli.errors import ConfigError


def freeze(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Let the modules and parameters of these dotted names learn no more; return the modules, for `learn`."""
    modules = []
    for name in names:
        owner, _, last = name.rpartition(".")
        part: nn.Module | nn.Parameter = getattr(model.get_submodule(owner), last)
        part.requires_grad_(False)
        if isinstance(part, nn.Module):
            modules.append(part)
    return modules


def learn(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Put a model into training mode, but for its frozen modules, which must drop out nothing."""
    model.train()
    for module in frozen:
        module.eval()


def refuse_frozen_start(frozen: Sequence[str], kind: str, has_parent: bool) -> None:
    """Raise ConfigError if a model of `kind` that starts from nothing is to have frozen parts."""
    if frozen and not has_parent:
        raise ConfigError(
            f"{', '.join(frozen)} cannot be frozen before having learned anything",
            f"name a {kind} to start from with --init-from, or leave out `frozen`",
        )
