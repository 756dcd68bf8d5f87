"""The released VAR models by name: where their files lie and what they are."""

from __future__ import annotations

from dataclasses import dataclass

TOKENIZER_FILE = "vae_ch160v4096z32.pth"
"""The one tokenizer of every released transformer."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A tokenizer and a transformer that others trained and published."""

    repo: str  # on the Hugging Face Hub
    revision: str  # branch, tag or commit there
    tokenizer: str  # file in the repo
    transformer: str  # file in the repo
    depth: int  # transformer blocks
    side: int  # pixels of an image
    licence: str  # of the weights, as their repo states it
    source: str  # page about them, for people

    @property
    def files(self) -> dict[str, str]:
        """The released file of each part of a model folder."""
        return {"tokenizer": self.tokenizer, "transformer": self.transformer}


def _var(depth: int, side: int) -> Release:
    return Release(
        repo="FoundationVision/var",
        revision="main",
        tokenizer=TOKENIZER_FILE,
        transformer=f"var_d{depth}.pth",
        depth=depth,
        side=side,
        licence="MIT",
        source="https://huggingface.co/FoundationVision/var",
    )


RELEASES = {
    "var-d16": _var(16, 256),
    "var-d20": _var(20, 256),
    "var-d24": _var(24, 256),
    "var-d30": _var(30, 256),
    "var-d36": _var(36, 512),
}
"""Every model that `varcli pull` knows. Source: FoundationVision/VAR, the code of arXiv:2404.02905."""
