"""Text that users bring: every format, and the sentence for each way to get it wrong."""

import codecs
import csv
import json

from common.data import tables
from common.errors import UserError

import pyarrow
import pytest
from pyarrow import parquet

ROWS = [{"file_name": "a.png", "text": 'a cat, a "dog"'}, {"file_name": "b.png", "text": "zwei Hühner\u2028eins"}]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("suffix", ["csv", "TSV", "jsonl", "json", "json lines in .json", "a list in .jsonl"])
def test_each_format_holds_the_same_rows(tmp_path, suffix, mark):
    """Written by `csv` and `json`, with blank rows between."""
    path = tmp_path / f"table.{suffix.split('.')[-1]}"
    if suffix in ("csv", "TSV"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            file.write("\n,\n" if suffix == "csv" else "\r\n \t \n")
            writer.writerows(ROWS)
    elif suffix in ("json", "a list in .jsonl"):
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS), encoding="utf-8")
    path.write_bytes(mark + path.read_bytes())
    assert [row for _, row in tables.read_table(path, columns=("text", "file_name"))] == ROWS
    assert tables.read_prompts(path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"text,n\na,1\na, b,2\n", "row 2 .line 3. has 3 cells, and .* 2 columns .text, n.; put tex"),
        ("a.csv", b"\ntext\na cat, a dog\nb\n", "row 1 .line 3. has 2 cells, and"),
        ("a.csv", b'text,n\n"two\nlines",1\nb\n', "row 2 .line 4. has 1 cells, and"),
        ("a.tsv", b"text\na\tb\n", "holds a tab in quotes"),
        ("a.csv", b'text,n\n"a cat,1\nb,2\n', "row 1 .line 2. cannot be read .unexpected end of data"),
        ("a.csv", b'text,n\n"a" cat,1\n', "row 1 .line 2. cannot be read .',' expected"),
        ("a.csv", b"text;n\na;1\n", "a.csv has no column text; its first row names text;n, with a comma between two"),
        ("a.csv", b"text,text\na,b\n", "names the column 'text' twice"),
        ("a.csv", b"text\n\n", "holds no row below its first, which names the columns"),
        ("a.csv", b"", "a.csv holds no row$"),
        ("a.csv", b"text\nH\xfchner\n", "a.csv is not UTF-8 text .line 2 holds the byte 0xfc.; save it as UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16"), "it is UTF-16 text"),
        ("a.csv", "text\na\n".encode("utf-16-le"), "as UTF-16 does"),
        ("a.csv", b"PK\x03\x04\xff", "a zip archive .or an .xlsx."),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer.* `git lfs pull`"),
        ("a.csv", b"<!DOCTYPE html>\n<html>", "is an HTML page"),
        ("a.xlsx", b"PK", "is no table: give .csv, .tsv"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"caption": "a"}\n', "line 2 has no text, only caption"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2 is no object with columns but '\[1\]'"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2 is no object with columns but '3'"),
        ("a.json", b'[{"text": "a"}', "a.json is no JSON"),
        ("a.json", b"[" * 100_000, "a.json is no JSON"),
        ("none.csv", None, "none.csv cannot be read .No such file"),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        tables.read_table(tmp_path / name, f"--flag={tmp_path / name}", ["text"])
    assert str(caught.value).startswith(f"--flag={tmp_path / name}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("p.txt", b"\xef\xbb\xbfa\r\n\r\n b, c \rd", None, ["a", "b, c", "d"]),
        ("prompts", b"a\n", None, ["a"]),
        ("p.json", b'["a", " b, c "]', None, ["a", "b, c"]),
        ("p.jsonl", b'"a"\n"b, c"\n', None, ["a", "b, c"]),
        ("p.json", b'[{"text": "x", "prompt": "a"}, {"prompt": null}]', None, ["a"]),
        ("p.csv", b"id, caption\n1,a\n2,\n", None, ["a"]),
        ("p.csv", b"id,p\n1,a\n", "p", ["a"]),
        ("p.csv", b'id,prompt\n1,"a, b", ,\n2,c,\n', None, ["a, b", "c"]),
        ("p.csv", b"id,p\n1,a\n", None, "has no column prompt, text or caption; its columns are id, p"),
        ("p.csv", b"id,p\n1,a\n", "q", "has no column 'q'; its columns are id, p"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 7}\n', None, "the prompt of line 2 is no text but '7'"),
        ("p.txt", b"a\n", "q", "`prompt_column`=q is for a table, and --p is none; drop it"),
        ("p.txt", b"a\nH\xfchner\n", None, "--p is not UTF-8 text .line 2"),
        ("p.parquet", b"PAR1", None, "--p cannot be read"),
    ],
)
def test_prompts_of_a_file(tmp_path, name, content, column, expected):
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, list):
        assert tables.read_prompts(tmp_path / name, "--p", column) == expected
    else:
        with pytest.raises(UserError, match=expected):
            tables.read_prompts(tmp_path / name, "--p", column)


def test_prompts_of_parquet(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", None, " b"], "n": [1, 2, 3]}), tmp_path / "p.parquet")
    assert tables.read_prompts(tmp_path / "p.parquet") == ["a", "b"]
    for column, sentence in (("q", "no column 'q'; its columns are text, n"), ("n", "the prompt of row 1 is no text")):
        with pytest.raises(UserError, match=sentence):
            tables.read_prompts(tmp_path / "p.parquet", None, column)
