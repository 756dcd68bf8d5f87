"""A run folder: one writer at a time, the settings it was begun with, and the checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varcli import config as configs
from varcli.artifacts.lock import hold_folder
from varcli.artifacts.manifest import MANIFEST_NAME, Manifest, describe_process, digest_json
from varcli.artifacts.verify import read_checked_bytes, read_json, read_manifest, verify_folder
from varcli.artifacts.write import atomic_folder, write_bytes, write_json
from varcli.config import Config
from varcli.distributed import ALONE, World
from varcli.errors import ArtifactError, ConfigError, unknown_name
from varcli.training.checkpoint import RESUME_MODES, await_checkpoint, find_checkpoint

CONFIG_NAME = "config.json"


class RunFolder:
    """An open run folder, held by this job; get one from `open_run`.

    world: the processes that train here; the first one writes. told: what its `tell` said, for the others.
    """

    def __init__(self, path: Path, resume: str, world: World = ALONE, told: str | None = None) -> None:
        self.path, self.world = path, world
        if told is None:
            stored = read_json(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else None
            if stored is not None and not (isinstance(stored, dict) and isinstance(stored.get("config"), dict)):
                raise ArtifactError(f"`{path / CONFIG_NAME}` is not a run's config", "choose another --out")
            self.checkpoint = find_checkpoint(path, resume)
        else:
            stored, found = json.loads(told)
            self.checkpoint = None if found is None else await_checkpoint(path / found[0], found[1])
        self.stored: dict[str, Any] | None = stored
        if self.checkpoint is not None and resume == "never":
            raise ConfigError(f"`{path}` holds a run already", "choose another --out, or leave out --resume never")
        self.digest: str | None = None

    def tell(self) -> str:
        """Put into words what was found here, so that all processes go on from the same."""
        found = self.checkpoint and (str(self.checkpoint[0].relative_to(self.path)), self.checkpoint[1].digest)
        return json.dumps([self.stored, found])

    @property
    def config(self) -> dict[str, Any] | None:
        """The config the run was begun with, None for a new run."""
        return None if self.stored is None else self.stored["config"]

    @property
    def step(self) -> int:
        """Optimizer steps done by the checkpoint the run goes on from."""
        return 0 if self.checkpoint is None else int(self.checkpoint[1].info["step"])

    def require_same(
        self, kind: str, inputs: Mapping[str, Any], config: Mapping[str, Any] | None = None, free: Collection[str] = ()
    ) -> None:
        """Raise ConfigError if the run, once it has a checkpoint, is another one: of another kind, inputs or settings.

        The arguments are those of `settle`; without config, settings are not compared yet.
        """
        if self.stored is None or self.checkpoint is None:
            return
        if self.stored.get("kind") != kind:
            raise ConfigError(
                f"`{self.path}` is a run of kind {self.stored.get('kind')}, not {kind}", "choose another --out"
            )
        known = self.stored.get("inputs", {})
        others = [name for name, value in inputs.items() if name in known and known[name] != value]
        if others:  # what was given is known by its fingerprint only, which would tell nobody anything
            raise ConfigError(
                f"`{self.path}` was begun with other {' and '.join(others)}",
                "give those to go on with that run, or choose another --out for a new one",
            )
        fixed = {key: value for key, value in (config or {}).items() if key not in free}
        changes = configs.differences(self.stored["config"], fixed)
        if changes:
            raise ConfigError(
                f"`{self.path}` was begun with other settings: {'; '.join(changes.values())}",
                f"what a run does when is made for its steps; to train on, begin a new one from it: --init-from "
                f"{shlex.quote(str(self.path))} --out NEW"
                if changes.keys() == {"steps"}
                else "repeat them to go on with that run, or choose another --out for a new one",
            )

    def settle(self, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Any], free: Collection[str]) -> None:
        """Write config.json, or hold against it that a resumed run is the same run.

        kind: what is trained. config: resolved settings. inputs: what else decides the numbers, such as fingerprints.
        free: settings that may differ. A run that has no checkpoint yet is begun anew. Raises ConfigError naming what
        differs.
        """
        self.require_same(kind, inputs, config, free)
        record = {"kind": kind, "config": dict(config), "inputs": dict(inputs)}
        fixed = {key: value for key, value in record["config"].items() if key not in free}
        self.digest = digest_json({**record, "config": fixed})
        if self.world.is_first:
            write_json(self.path / CONFIG_NAME, {**record, "made_by": describe_process()})

    def is_finished(self, steps: int) -> bool:
        """Say whether the run has done `steps` optimizer steps. Raises ConfigError if it has done more."""
        if self.step > steps:
            raise ConfigError(
                f"`{self.path}` has trained {self.step:,} steps already, but {steps:,} are asked for",
                "ask for more steps, or choose another --out",
            )
        return self.step == steps

    def holds(self, name: str, kind: str) -> bool:
        """Say whether a folder within the run is there and whole."""
        try:
            return not verify_folder(self.path / name, read_manifest(self.path / name, kind))
        except ArtifactError:
            return False


@contextmanager
def open_run(path: Path, resume: str = "auto", world: World = ALONE) -> Iterator[RunFolder]:
    """Make or open a run folder and hold it while the body runs.

    resume: see `find_checkpoint`; "never" refuses a folder that holds a run. world: all its processes open the folder,
    the first one holds it for them. Raises ArtifactError if it cannot be
    written or holds something else, LockedError if another process trains there, IntegrityError if its newest
    checkpoint is damaged.
    """
    path = Path(path)
    if resume not in RESUME_MODES:
        raise unknown_name("resume mode", resume, RESUME_MODES)
    if world.is_first:
        with hold_folder(path, {CONFIG_NAME}, "run"):
            run = RunFolder(path, resume, world)
            world.say(run.tell())
            world.wait()  # the others have read what there is, before it changes
            yield run
    else:
        run = RunFolder(path, resume, world, told=world.say(""))
        world.wait()
        yield run


def keep_stored(config: Config, stored: Mapping[str, Any] | None, given: Collection[str]) -> Config:
    """Return `config` with every setting that is not among `given` as in `stored`, the config the run was begun with."""
    names = {field.name for field in dataclasses.fields(config)} - set(given)  # type: ignore[arg-type]
    return configs.replace(config, {name: value for name, value in (stored or {}).items() if name in names})


def copy_artifact(source: Path, target: Path, kind: str) -> Manifest:
    """Copy a finished folder of `kind`, byte for byte and checked, to `target`, whole or not at all."""
    manifest = read_manifest(source, kind)
    with atomic_folder(target) as temporary:
        for name in manifest.files:
            write_bytes(temporary / name, read_checked_bytes(source, name, manifest))
        write_bytes(temporary / MANIFEST_NAME, (Path(source) / MANIFEST_NAME).read_bytes())
    return manifest
