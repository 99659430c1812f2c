"""Files are read through one door: regular files of a bounded size, records by their schema, logs by whole lines."""

import json
import multiprocessing
import os
from typing import NotRequired

import pytest

from common.errors import UserError
from common.reading import JsonLines, JsonRecord, read_bytes, read_record, read_text


class Line(JsonRecord):
    step: int
    loss: NotRequired[float]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "damaged"),
        (b'{"step": 3', "damaged"),
        (b'{"step": "3"}', "'step'"),
        (b'{"step": true}', "'step'"),
        (b'{"step": 3.5}', "'step'"),
        (b'{"loss": 1.0}', "'step' is missing"),
        (b'{"step": 3, "new": 1}', "newer version"),
        (b"[]", "object"),
        (b'{"step": "\xff"}', "damaged"),
        (b'{"step": ' + b"[" * 3000 + b"]" * 3000 + b"}", "damaged"),
        (b'{"step": ' + b"9" * 5000 + b"}", "damaged"),
    ],
)
def test_a_record_that_does_not_fit_is_one_line_with_file_key_and_remedy(tmp_path, data, says):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_record(tmp_path / "a.json", Line, "make it again")
    assert all(part in str(error.value) for part in ("a.json", says, "make it again"))
    assert "\n" not in str(error.value)


def test_what_is_no_regular_file_or_too_large_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for path in (
        tmp_path / "fifo",
        tmp_path,
        tmp_path / "link",
        "/dev/zero",
        tmp_path / "none",
        "a\0b",
        "\ud800",
    ):
        with pytest.raises(UserError):
            read_bytes(path)
    with pytest.raises(UserError, match="too large"):
        read_bytes(tmp_path / "large", limit=10)
    assert read_bytes(tmp_path / "large", limit=11) == b"x" * 11


def test_text_has_neither_a_byte_order_mark_nor_the_line_ends_of_windows(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffä\r\nb\n".encode())
    assert read_text(tmp_path / "a") == "ä\nb\n"
    (tmp_path / "a").write_bytes(b"\xe4")
    with pytest.raises(UserError, match="UTF-8"):
        read_text(tmp_path / "a")


def test_half_a_line_is_left_out_and_said_and_the_next_line_begins_anew(tmp_path, capsys):
    log = JsonLines(tmp_path / "log.jsonl", Line)
    assert log.read() == []
    log.append({"step": 1})
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert log.read() == [{"step": 1}]
    assert "incomplete" in capsys.readouterr().err
    log.append({"step": 3, "loss": 0.5})
    assert log.path.read_text() == '{"step": 1}\n{"step": 3, "loss": 0.5}\n'


def test_a_line_that_is_there_is_not_added_twice(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", Line)
    for loss in (1.0, 2.0):
        log.append({"step": 1, "loss": loss}, unless=lambda line: line["step"] == 1)
    assert log.read() == [{"step": 1, "loss": 1.0}]


def test_a_damaged_line_is_an_error_or_left_out_and_said(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n\0\0\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*log.jsonl"):
        JsonLines(tmp_path / "log.jsonl", Line).read()
    assert JsonLines(tmp_path / "log.jsonl", Line, None).read() == [{"step": 1}, {"step": 2}]
    assert "line 2 of" in capsys.readouterr().err


def append_many(path, first):
    for step in range(first, first + 100):
        JsonLines(path, Line).append({"step": step})


def test_no_line_is_lost_when_one_process_splits_the_log_while_others_append(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", Line)
    writers = [
        multiprocessing.get_context("fork").Process(target=append_many, args=(log.path, first))
        for first in (0, 1000)
    ]
    for writer in writers:
        writer.start()
    into, even = tmp_path / "taken.jsonl", lambda line: line["step"] % 2 == 0
    while any(writer.is_alive() for writer in writers):
        log.split(even, into)
    log.split(even, into)
    taken = JsonLines(into, Line).read()
    kept = [json.loads(line) for line in log.path.read_text().splitlines()]
    steps = sorted(line["step"] for line in (*kept, *taken))
    assert steps == [*range(100), *range(1000, 1100)]
    assert {line["step"] % 2 for line in taken} == {1}
