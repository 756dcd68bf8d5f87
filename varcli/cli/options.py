"""Options that several commands share, so that they read and mean the same everywhere.

A command gives the default in its signature: `device: DeviceOption = "auto"`; an option without one is required.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

OutOption = Annotated[Path, Option("--out", "-o", help="Folder to write; a rerun goes on where the last one stopped.")]
DeviceOption = Annotated[
    str, Option("--device", help="auto, cpu, cuda, cuda:1 or mps; auto takes a GPU if there is one.")
]
PrecisionOption = Annotated[
    str, Option("--precision", help="auto, fp32, bf16 or fp16; auto is bf16 on CUDA and fp32 elsewhere.")
]
SeedOption = Annotated[int, Option("--seed", min=0, help="Seed of everything random.")]
JsonOption = Annotated[bool, Option("--json", help="Print the result as JSON.", show_default=False)]
WorkersOption = Annotated[
    int | None,
    Option("--workers", min=0, max=256, help="Processes that decode images; default: one a core.", show_default=False),
]
MaxSkipOption = Annotated[
    int | None,
    Option("--max-skip", min=0, help="Unusable images that are tolerated; default: 100 or 0.1 %.", show_default=False),
]
BatchSizeOption = Annotated[
    int | None,
    Option("--batch-size", min=1, help="Images at a time; default: chosen for the device.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    Option(
        "--model",
        help="Folder or name of a model or run; default: the newest run in runs/, else the model that comes with varcli.",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    str | None,
    Option("--tokenizer", help="Tokenizer, model or run folder; default: chosen by image size.", show_default=False),
]
ClassesOption = Annotated[
    list[str] | None, Option("--class", help="Class name or number; repeat it for several.", show_default=False)
]
FeaturesOption = Annotated[
    str, Option("--features", help="inception, lite0, or auto: Inception if its weights are at hand.")
]
InceptionWeightsOption = Annotated[
    Path | None,
    Option(
        "--inception-weights",
        help="weights-inception-2015-12-05-6726825d.pth; default: VARCLI_INCEPTION_WEIGHTS, then torch's downloads.",
        show_default=False,
    ),
]
AllowUnknownWeightsOption = Annotated[
    bool, Option("--allow-unknown-weights", help="Take Inception weights other than the published ones.")
]
CacheOption = Annotated[
    Path | None,
    Option(
        "--cache",
        help="Folder that keeps the features of 256 images or more; default: varcli/features in the user's cache.",
        show_default=False,
    ),
]
KeepOption = Annotated[bool, Option("--keep/--no-keep", help="Keep features for the next time, and for a rerun.")]
ResumeOption = Annotated[
    str, Option("--resume", help="auto goes on with what the run folder holds; last-good after damage; never.")
]
ConfigFileOption = Annotated[
    Path | None, Option("--config", help="TOML file with settings; other options win over it.", show_default=False)
]
SetOption = Annotated[
    list[str] | None, Option("--set", help="key=value for any setting; may be repeated.", show_default=False)
]


def collect_settings(config: Path | None, assignments: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Join the settings of a config file, of `--set`, and of options of their own (None if not given), which win.

    Raises ConfigError if `--set` and an option give one setting different values.
    """
    from varcli import config as configs
    from varcli.errors import ConfigError

    values = configs.read_toml(config) if config else {}
    assigned = configs.parse_assignments(assignments or [])
    given = {key: value for key, value in options.items() if value is not None}
    for key in sorted(assigned.keys() & given.keys()):
        if assigned[key] != given[key]:
            raise ConfigError(f"`--set {key}={assigned[key]}` and an option that says {given[key]}", "give one of them")
    return {**values, **assigned, **given}


def gather_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose `tokenizer.NAME` entries, as `--set` gives them, are in the table `tokenizer`, where they win.

    Raises ConfigError if `tokenizer` is there and no table.
    """
    from varcli.errors import ConfigError

    table = values.get("tokenizer", {})
    if not isinstance(table, dict):
        raise ConfigError(
            "`tokenizer` is a table of settings", "e.g. [tokenizer] in a file, --set tokenizer.vocab_size=1024"
        )
    prefix = "tokenizer."
    single = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    others = {key: value for key, value in values.items() if key != "tokenizer" and not key.startswith(prefix)}
    return {**others, "tokenizer": {**table, **single}} if table or single else others
