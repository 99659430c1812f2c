"""The README tells the truth: its tree names every file, and its commands are commands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.report import PAGE, refreshed
from errors import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("## The tree")[1].split("```")[1]
COMMANDS = [
    line
    for page in (README, (ROOT / "preprocessing" / "README.md").read_text(encoding="utf-8"))
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python ")
]


def test_the_tree_names_every_file_and_no_other():
    named = {
        word
        for line in TREE.splitlines()
        for word in line[:40].split()
        if re.search(r"\.(py|yaml|toml|txt)$", word)
    }
    folders = ("configs", "preprocessing", "models", "training", "evaluation", "benchmarks", ".")
    files = {path.name for folder in folders for path in (ROOT / folder).iterdir() if path.is_file()}
    code = {name for name in files if re.search(r"\.(py|yaml|toml|txt)$", name)} - {"__init__.py"}
    assert named == code


def test_the_tables_of_the_benchmarks_are_those_of_their_results():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- end -->") == len(list((ROOT / "benchmarks" / "results").glob("*.json"))) == 5
    assert refreshed(page) == page
    assert "FAIL" not in page


def test_there_are_commands_to_try():
    assert len(COMMANDS) >= 22


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_real_run_asks_for_its_data_and_for_nothing_else(command, tmp_path, monkeypatch):
    """Without ImageNet each ends in the one line that says what is missing; a wrong option would end in argparse's."""
    _, script, *arguments = shlex.split(command, comments=True)
    arguments = [
        str(ROOT / argument) if argument.startswith("configs/") else argument for argument in arguments
    ]
    monkeypatch.chdir(tmp_path)
    module = script.removesuffix(".py").replace("/", ".")
    with pytest.raises(UserError):
        importlib.import_module(module).main(arguments)
