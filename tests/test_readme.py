"""What README.md and CONTRIBUTING.md say is true: their snippets run and print what is shown, their commands exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
GUIDES = ["README.md", "CONTRIBUTING.md"]


def fenced(text: str, language: str) -> str:
    """The text with every line blanked that is not inside a ```language block: line numbers stay those of the file."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside and line.strip() == f"```{language}"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


def commands(text: str) -> list[list[str]]:
    """Every `make …` and `rarefy …` that a guide shows, in ```sh blocks and in single backticks."""
    shown = fenced(text, "sh").splitlines() + re.findall(r"`([^`\n]+)`", text)
    words = [shlex.split(line, comments=True) for line in shown if line.startswith(("make ", "rarefy "))]
    return [each for each in words if len(each) > 1]


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A reader's own interpreter, with one thing more: warnings are errors."""
    path = os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("guide", GUIDES)
def test_snippets_run_in_order(guide: str, tmp_path: Path):
    text = (REPOSITORY / guide).read_text()
    script = tmp_path / guide
    script.write_text(fenced(text, "python"))
    done = run(script, cwd=tmp_path)
    assert done.returncode == 0, f"a snippet of {guide} fails:\n{done.stdout}{done.stderr}"
    for line in filter(None, fenced(text, "console").splitlines()):
        assert line in done.stdout, f"{guide} shows {line!r}, which its snippets do not print:\n{done.stdout}"


def test_commands_exist(tmp_path: Path):
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    cli = run("-c", "from rarefy.cli import main; main()", "--help", cwd=tmp_path)
    assert cli.returncode == 0, cli.stderr
    known = {"make": set(targets), "rarefy": set(re.findall(r"[a-z-]+", cli.stdout))}
    for guide in GUIDES:
        shown = commands((REPOSITORY / guide).read_text())
        assert shown, f"{guide} shows no command"
        for program, command, *_ in shown:
            assert command in known[program], f"{guide} shows `{program} {command}`, which does not exist"
