"""What the pages tell people to type: every command and option named in them exists."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.main import get_command

from varcli.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *ROOT.glob("examples/**/*.md"), *ROOT.glob("varcli/embedded/*/CARD.md"))
)


def named_commands(text: str) -> list[list[str]]:
    """Words of every `varcli ...` in code blocks and between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [part.replace("\n", " ") for part in re.findall(r"`(varcli [^`]+)`", text)]
    found = []
    for line in [*lines, *inline]:
        words = shlex.split(line.replace("...", ""), comments=True)
        if "varcli" in words:
            found.append(words[words.index("varcli") + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_of_a_page_exists(page):
    for words in named_commands((ROOT / page).read_text(encoding="utf-8")):
        command = get_command(app)
        rest = list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        assert not getattr(command, "commands", None) or words == rest == ["--help"], f"no command in {words}"
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            assert not word.startswith("--") or word in {*known, "--help"}, f"{word} of varcli {' '.join(words)}"


def test_pages_name_commands_at_all():
    assert sum(len(named_commands((ROOT / page).read_text(encoding="utf-8"))) for page in PAGES) > 30


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("examples/")])
def test_every_file_a_page_links_is_there(page):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


SRUN = """#!/bin/bash
echo "$@" > "$STUBS/started"
trap 'exit 1' TERM
sleep 30 &
wait
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'alpha\\nbeta\\n'; else echo "$@" > "$STUBS/asked"; fi
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_the_slurm_script_starts_all_hosts_and_queues_itself_again_when_the_time_is_up(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "alpha,beta",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "17",
        "STUBS": str(tmp_path),
    }
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ROOT / "examples" / "train_slurm.sh"
    job = subprocess.Popen(["bash", str(script), "codes", "--name", "d 30"], env=environment)
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)  # srun's stand-in has set its trap
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=20) == 0
    finally:
        job.kill()
    started = (tmp_path / "started").read_text()
    assert "--nnodes 2 " in started and "--rdzv-endpoint alpha:29500 -m varcli train codes --name d 30" in started
    assert (tmp_path / "asked").read_text().split() == ["requeue", "17"]
