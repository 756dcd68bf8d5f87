"""The README's commands run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import varcli

ROOT = Path(__file__).parents[1]


# varcli, but of the images that it unpacks an eighth is left: thousands take minutes on two cores
PROGRAM = """#!/bin/sh
"{python}" -m varcli "$@" || exit
if [ "$1" = data ]; then find "$4" -name "*[!08]-*.webp" -delete; fi
"""


@pytest.mark.timeout(1200)  # a training among other tests on two cores
def test_the_quick_start_runs_as_written(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- quickstart.*?-->\n```bash\n(.*?)```", text, re.DOTALL)
    assert block, "the quick start has lost its mark"
    program = tmp_path / "bin" / "varcli"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-euc", block[1]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "samples").glob("0003-*.png"))) == 16
    assert "kid_lite0" in done.stdout or "fid" in done.stdout


def test_every_file_the_readme_links_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_importing_varcli_is_light_and_offers_the_generator():
    code = (
        "import sys, varcli; assert 'torch' not in sys.modules; from varcli import Generator; print(Generator.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Generator"
    assert varcli.__version__
