"""CSVs are read through one door: what is not as it must be is one line with file, line number and remedy."""

import os

import pytest

from cache.csv_file import read_csv
from cache.image_list import read_samples
from common.errors import UserError


def read(path):
    return [row for _, row in read_csv(path, ["a", "b"], "make it again")]


@pytest.mark.parametrize("data", ["a,b\n1,é\n", "\ufeffa,b\r\n1,é\r\n", "a,b\n\n1,é", '"a","b"\n"1","é"\n'])
def test_byte_order_mark_line_ends_and_quotes_do_not_matter(tmp_path, data):
    (tmp_path / "x.csv").write_bytes(data.encode())
    assert read(tmp_path / "x.csv") == [["1", "é"]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "columns must be a, b"),
        (b"b,a\n", "columns must be a, b"),
        (b"a,b\n1,2\n1,2,3\n", "line 3 of"),
        (b"a,b\n1\n", "line 2 of"),
        (b'a,b\n"1,2\n', "damaged"),
        (b"a,b\n1," + b"2" * 200_000, "field limit"),
    ],
)
def test_what_is_damaged_is_one_line_with_a_remedy(tmp_path, data, says):
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        read(tmp_path / "x.csv")
    assert "x.csv" in str(error.value)
    assert "make it again" in str(error.value)


def test_other_encodings_fifos_and_missing_files_are_one_line(tmp_path):
    (tmp_path / "utf16").write_bytes("a,b\n".encode("utf-16"))
    os.mkfifo(tmp_path / "fifo")
    for name, says in (("utf16", "no UTF-8"), ("fifo", "no regular file"), ("none", "does not exist")):
        with pytest.raises(UserError, match=says):
            read(tmp_path / name)


@pytest.mark.parametrize("class_id", ["", "-1", "+1", " 1", "1_0", "٣", "1.0", "9" * 5000, str(2**31)])
def test_a_class_is_ascii_digits_alone(tmp_path, class_id):
    (tmp_path / "x.csv").write_text(f"id,img_path,class_id,synset\nx,x.png,{class_id},n\n")
    with pytest.raises(UserError, match=r"line 2 of .*class_id"):
        read_samples(tmp_path / "x.csv")
