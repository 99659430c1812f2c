"""The README tells the truth: its tree names every file, and its commands are commands."""

import importlib
import json
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

import train
from ablate import DIFFERENCES, measures_of_table
from benchmarks.gpu_check import PARTS
from benchmarks.report import PAGES as BENCHMARKED
from benchmarks.report import refreshed
from common.errors import UserError
from configs.loading import knobs
from report.ablation import markdown, summarise

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("## The tree")[1].split("```")[1]
TRACKED = [
    path
    for top in ROOT.iterdir()
    if top.name not in {".venv", ".git", "runs", "data"}
    for path in [top, *top.rglob("*")]
    if path.is_file() and not {"runs", "data"} & set(path.relative_to(ROOT).parts)
]
PAGES = [ROOT / "preprocessing" / "README.md", ROOT / "docs" / "method.md"]
COMMANDS = [
    line
    for page in (README, *map(Path.read_text, PAGES))
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python ")
]


def test_the_tree_names_every_folder_and_every_file_beside_them_and_no_other():
    words = {word for line in TREE.splitlines() for word in line[:64].split()}
    folders = {
        path.parent.relative_to(ROOT).as_posix() for path in TRACKED if path.suffix in (".py", ".yaml")
    }
    named = {word.rstrip("/") for word in words if word.endswith("/")}
    innermost = {folder.rsplit("/", 1)[-1] for folder in folders if not folder.startswith("tests/")} - {""}
    assert named - {"docs"} == innermost - {"."}
    assert {word for word in words if re.search(r"\.(py|txt|toml)$", word)} == {
        path.name for path in ROOT.iterdir() if path.suffix in (".py", ".txt", ".toml")
    }


def test_the_tables_of_the_benchmarks_are_those_of_their_results():
    pages = [page.read_text(encoding="utf-8") for page in BENCHMARKED]
    blocks = {name for page in pages for name in re.findall(r"^<!-- (\w+) -->$", page, re.MULTILINE)} - {
        "end"
    }
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    not_yet = {f"gpu_check_{part}" for part in PARTS}  # until there is a GPU
    assert blocks - not_yet == results - not_yet
    assert results <= blocks
    assert not_yet <= blocks
    assert len(results) >= 9
    for page in pages:
        assert refreshed(page) == page
        assert "FAIL" not in page


@pytest.mark.parametrize("name", ["study", "study_grid4", "study_mmdit", "study_turned", "study_moving"])
def test_the_tables_of_the_study_are_those_of_its_results(name):
    found = json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))
    alien = {arm: set(measures) for arm, measures in found["not_comparable"].items()}
    rows = summarise(found["results"], found["reference"], alien)
    table = markdown(rows, measures_of_table(rows), DIFFERENCES)
    assert table in (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert all(len(seeds) >= 3 for seeds in found["results"].values())


def test_the_table_of_options_has_every_option_of_the_method_with_its_default():
    rows = dict(
        re.findall(r"^\| `([\w.]+)`[^|]*\| (.*?) \|", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)
    )
    for key, field in knobs().items():
        if key.split(".")[0] not in ("align", "teacher", "diffusion"):
            continue
        default = field.default[0] if isinstance(field.default, tuple) else field.default
        assert yaml.safe_load(rows[key].strip("`")) == default, key


def test_there_are_commands_to_try():
    assert len(COMMANDS) >= 22


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_real_run_asks_for_its_data_and_for_nothing_else(command, tmp_path, monkeypatch):
    """Without ImageNet each ends in the one line that says what is missing; a wrong option would end in argparse's.
    A plan needs no data; test_plan.py and test_large.py print some.
    """
    _, script, *arguments = shlex.split(command, comments=True)
    arguments = [
        str(ROOT / argument) if argument.startswith("configs/") else argument for argument in arguments
    ]
    monkeypatch.chdir(tmp_path)
    module = script.removesuffix(".py").replace("/", ".")
    planned = []
    monkeypatch.setattr(train, "print_plan", planned.append)
    with nullcontext() if "--plan" in arguments else pytest.raises(UserError):
        importlib.import_module(module).main(arguments)
    assert len(planned) == ("--plan" in arguments)
