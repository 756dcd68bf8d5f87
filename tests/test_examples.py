"""What the pages tell people to type: every command and option named in them exists."""

from __future__ import annotations

import re
import shlex
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
