"""`varcli eval`: how good samples are, beside real images measured in the same way."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.formats import images, number
from varcli.cli.options import (
    AllowUnknownWeightsOption,
    BatchSizeOption,
    CacheOption,
    DeviceOption,
    FeaturesOption,
    InceptionWeightsOption,
    JsonOption,
    KeepOption,
    WorkersOption,
)
from varcli.cli.reconstruction import evaluate_tokenizer
from varcli.errors import ConfigError, DataError
from varcli.progress import ignore

_NEIGHBOURS = 12  # samples in a report beside the real images nearest to them


def evaluate(
    samples: Annotated[
        Path,
        Argument(
            help="Folder of images, e.g. from `varcli sample`, or an npz file; with --tokenizer, the images it is to keep."
        ),
    ],
    ref: Annotated[
        str | None,
        Option(
            "--ref",
            help="Real images: a folder, an npz file with images or statistics, emoji64, imagenet256 or imagenet512; "
            "default: what the samples' manifest names, else ImageNet at their size.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        Option(
            "--metrics",
            help="Comma-separated: fid, sfid, inception_score, precision, recall, kid, density, coverage; default: the "
            "usual ones for the features.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        Option(
            "--tokenizer",
            help="Measure a tokenizer's reconstructions of the images instead: its folder or name, a model or a run.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        Option("--split", help="With --tokenizer: train or val; default: val if there is one.", show_default=False),
    ] = None,
    count: Annotated[
        int | None, Option("--n", min=2, help="With --tokenizer: images, default: all.", show_default=False)
    ] = None,
    lpips_weights: Annotated[
        Path | None,
        Option(
            "--lpips-weights",
            help="With --tokenizer: folder of the two weight files of LPIPS; default: torch's downloads.",
            show_default=False,
        ),
    ] = None,
    features: FeaturesOption = "auto",
    inception_weights: InceptionWeightsOption = None,
    allow_unknown_weights: AllowUnknownWeightsOption = False,
    floor: Annotated[bool, Option("--floor/--no-floor", help="Also measure real images in the samples' place.")] = True,
    self_test: Annotated[
        bool,
        Option("--self-test", help="Compare with the original evaluator's numbers, on a sample file of the ADM suite."),
    ] = False,
    html: Annotated[
        Path | None, Option("--html", help="Also write a report as a page of HTML.", show_default=False)
    ] = None,
    cache: CacheOption = None,
    keep: KeepOption = True,
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Measure samples against real images: FID, Inception Score, precision, recall and others.

    With --tokenizer: what a tokenizer changes in images: rFID, PSNR, SSIM, LPIPS, and how it uses its codebook.

    With several GPUs: torchrun --nproc-per-node 8 -m varcli eval SAMPLES.
    """
    if tokenizer is not None:
        # the reference is always the same crops, every number is computed, and nothing is kept
        others = {"--ref": ref, "--metrics": metrics, "--html": html, "--cache": cache}
        others |= {"--no-floor": not floor, "--no-keep": not keep, "--self-test": self_test}
        _refuse(others, "makes no sense with --tokenizer, which measures against the very images that it reconstructs")
        evaluate_tokenizer(
            tokenizer,
            samples,
            as_json=json,
            split=split,
            count=count,
            features=features,
            inception_weights=inception_weights,
            allow_unknown_weights=allow_unknown_weights,
            lpips_weights=lpips_weights,
            device=device,
            batch_size=batch_size,
            workers=workers,
        )
        return
    _refuse({"--split": split, "--n": count, "--lpips-weights": lpips_weights}, "needs --tokenizer")
    from varcli.distributed import join_world
    from varcli.metrics.evaluate import EvalConfig, fill_cache
    from varcli.metrics.evaluate import evaluate as run
    from varcli.metrics.feature_cache import default_cache

    names = None if metrics is None else tuple(name.strip() for name in metrics.split(",") if name.strip())
    if names == ():
        raise ConfigError("`--metrics` names none", "e.g. --metrics fid,precision,recall")
    if self_test:
        others = {"--metrics": metrics, "--allow-unknown-weights": allow_unknown_weights, "--html": html}
        _refuse(others, "makes no sense with --self-test, which needs all numbers, of the published weights")
        features, floor = "inception", False
    config = EvalConfig(
        reference=ref,
        metrics=names,
        features=features,
        inception_weights=inception_weights,
        allow_unknown_weights=allow_unknown_weights,
        device=device,
        batch_size=batch_size,
        workers=workers,
        cache=(cache or default_cache()) if keep else None,
        floor=floor,
        neighbours=_NEIGHBOURS if html else 0,
    )
    if html:
        from varcli.report.evaluation import check_report_path, write_report

        check_report_path(html)
    with join_world(device) as (world, own_device):
        if world.size > 1:
            config = replace(config, device=own_device)
            fill_cache(samples, config, console.progress("reading images") if world.is_first else ignore, world)
        if not world.is_first:
            return
    result = run(samples, config, on_step=console.progress("reading images"))
    if self_test:
        _show_self_test(result, json)
        return
    if html:
        write_report(result, html)
        console.note(f"report: {html}")
    if json:
        console.json_result(result.to_json())
        return
    show(result)


def _show_self_test(result: Any, as_json: bool) -> None:
    """Print the comparison with the original evaluator; raise DataError if a number differs by too much."""
    from varcli.metrics.self_test import compare_with_original

    compared = compare_with_original(result)
    if as_json:
        console.json_result({**result.to_json(), "self_test": [asdict(entry) for entry in compared]})
    else:
        rows = [
            (entry.name, f"{entry.original:.5g}", f"{entry.here:.5g}", f"{entry.here - entry.original:+.4f}",
             f"{entry.allowed:g}", "agrees" if entry.agrees else "differs")
            for entry in compared
        ]  # fmt: skip
        console.table(("metric", "TensorFlow", "varcli", "difference", "allowed", ""), rows)
    wrong = [entry.name for entry in compared if not entry.agrees]
    if wrong:
        raise DataError(
            f"the self-test failed: {', '.join(wrong)} differ from the original evaluator's",
            "are these the published sample and reference files? Else please report it with this table",
        )


def _refuse(given: dict[str, Any], reason: str) -> None:
    """Raise ConfigError at the first option that was given and has no place here."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"`{name}` {reason}", "leave it out")


def show(result: Any) -> None:
    """Print an EvalResult for people: the numbers with the floor beside them, then what they stand for."""
    from varcli.metrics.compute import larger_is_better

    network = result.features["network"]
    rows = []
    for name, value in result.metrics.items():
        better = "higher" if larger_is_better(name, network) else "lower"
        row = (name, number(value), number(result.floor.get(name)), better)
        rows.append(row if result.floor else (row[0], row[1], row[3]))
    console.table(
        ("metric", "samples", "real images", "better") if result.floor else ("metric", "samples", "better"), rows
    )
    console.result("")
    marks = "".join(f"; {mark}: {reason}" for mark, reason in result.marks.items())
    console.result(f"samples:     {images(result.samples)}{marks}")
    if result.reference is not None:
        console.result(f"reference:   {images(result.reference)}")
    if result.floor:
        console.result(f"real images: {result.floor_images}")
    console.result(f"features:    {network}, weights {result.features['weights_sha256'][:12]}")
    if result.published:
        _show_published(result)
    for name, reason in result.skipped.items():
        console.note(f"skipped {name}: {reason}")
    for warning in result.warnings:
        console.note(f"warning: {warning}")
    if network != "inception":
        console.note(
            "for FID, fetch weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases and pass "
            "--inception-weights PATH"
        )


def _show_published(result: Any) -> None:
    """Print where the result stands among published ones."""
    from varcli.metrics.published import OWN, neighbours

    own = (OWN, f"{result.samples['path']}{result.mark}", result.metrics["fid"], result.metrics.get("inception_score"))
    near = neighbours(result.published, result.metrics["fid"])
    rows = [(row.kind, row.model, row.fid, row.inception_score) for row in near]
    rows = sorted([*rows, own], key=lambda row: row[2])
    count = result.samples["count"]
    console.result("")
    console.result(f"beside published results, of 50,000 samples each (this result: {count:,})")
    console.table(
        ("", "model", "FID", "IS"),
        [(kind, model, f"{fid:.2f}", "-" if score is None else f"{score:.1f}") for kind, model, fid, score in rows],
    )
