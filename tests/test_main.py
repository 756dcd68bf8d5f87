"""Ctrl-C or SIGTERM while the program is still being imported ends it as it does later: one error, code 130 or 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what stands in for typer, whose import is the first long one
IN_IMPORT = "import os, signal; os.kill(os.getpid(), signal.{name})"
IN_CALLBACK = """
import os, signal, time, weakref
class Lock: pass
lock = Lock()
watch = weakref.ref(lock, lambda _: os.kill(os.getpid(), signal.{name}))
del lock  # Python drops what is raised in there, as in the callback that ends an import
for _ in range(200): time.sleep(0.1)  # a long one would be slept to its end
"""
ENDS = {"SIGINT": (130, "error: interrupted\n"), "SIGTERM": (75, "error: stopped by SIGTERM\n")}


def _run(stand_in: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "typer.py").write_text(stand_in, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "varcli", "--version"],
        env={**os.environ, **variables, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        # tests that run in the background have Ctrl-C switched off, and hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself signals")
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("stand_in", [IN_IMPORT, IN_CALLBACK], ids=["in an import", "where Python drops it"])
def test_signal_during_the_imports_is_one_error(stand_in: str, name: str, tmp_path: Path):
    code, message = ENDS[name]
    done = _run(stand_in.format(name=name), tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(message), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself signals")
@pytest.mark.parametrize("name", ENDS)
def test_signal_while_options_are_read_is_one_error(name: str):
    """There typer would end with a bare code 130."""
    script = (
        "import os, signal, varcli.__main__ as process\n"
        "from varcli.cli import console\n"
        f"console.result = lambda text: os.kill(os.getpid(), signal.{name})\n"
        "process.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--version"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    code, message = ENDS[name]
    assert done.returncode == code and done.stderr.startswith(message), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself signals")
def test_one_of_several_processes_leaves_sigterm_to_torchrun(tmp_path: Path):
    done = _run(IN_IMPORT.format(name="SIGTERM"), tmp_path, WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_script_starts_where_interrupts_are_cared_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"varcli": "varcli.__main__:main"}
