"""The home folder stands for ~ in every path of a command line, and integers have limits."""

from pathlib import Path

import pytest

from common.arguments import Parser, between
from common.errors import UserError
from common.files import expand_home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_path_of_a_command_line_may_begin_with_the_home_folder(home):
    parser = Parser()
    parser.add_argument("runs", type=Path, nargs="+")
    below = Parser()
    sub = below.add_subparsers().add_parser("x")
    sub.add_mutually_exclusive_group().add_argument("--out", type=Path)
    assert parser.parse_args(["~/a", "b", "c~", "~"]).runs == [home / "a", Path("b"), Path("c~"), home]
    assert below.parse_args(["x", "--out", "~/a"]).out == home / "a"


def test_the_home_of_nobody_is_one_line():
    with pytest.raises(UserError, match=r"^there is no home folder for ~nobody_here/x"):
        expand_home("~nobody_here/x")


def test_a_file_whose_name_begins_with_a_tilde_stays_what_it_is(home, monkeypatch):
    monkeypatch.chdir(home)
    assert expand_home(str(Path(expand_home("./~x")))) == str(home / "~x")


@pytest.mark.parametrize("text", ["0", "11", "x", "9" * 100, "1.0", ""])
def test_an_integer_outside_its_limits_is_refused(text, capsys):
    parser = Parser()
    parser.add_argument("--number", type=between(1, 10))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--number", text])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: argument --number: ")
    assert said.index("\n") == len(said) - 1
    assert parser.parse_args(["--number", "10"]).number == 10
