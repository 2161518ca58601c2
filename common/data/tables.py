"""Text that users bring: tables (csv, tsv, jsonl, json, parquet), lists of prompts, and what a file's first bytes say.

All text is UTF-8, with or without a byte order mark. Nothing is guessed: a row that does not fit its header is an
error.
"""

import csv
import io
import json
import re
from pathlib import Path

from common.errors import UserError, blame

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
FORMATS = "csv, tsv, jsonl, json (a list of objects or of texts), parquet or txt (one text a line)"
PROMPT_COLUMNS = ("prompt", "text", "caption")
SIGNATURES = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (rb"\s*(?i:<!doctype html|<html)", "an HTML page, perhaps a login or error page"),
    (rb"\s*<\?xml|\s*<Error>", "XML, perhaps a server's error message"),
    (rb"PK\x03\x04", "a zip archive (or an .xlsx)"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text"),
    (rb"....ftyp(?:hei|hev|mif|msf)", "a HEIC image: convert it, to PNG for example"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", "an image"),
    (rb"\s*[{\[]", "JSON text"),
)


def what_is(head: bytes) -> str:
    """A few words on what a file that begins with `head` is; "" where that is not known."""
    if not head:
        return "an empty file"
    return next((words for pattern, words in SIGNATURES if re.match(pattern, head, re.DOTALL)), "")


def read_text(path, name=None) -> str:
    """The text of a UTF-8 file, line ends as they are. name: what an error calls it.

    Raises UserError where it cannot be read, is not UTF-8, or is a pointer or web page in place of the file.
    """
    name = name or str(path)
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = what_is(data[:512])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"it is {found}" if found else f"line {line} holds the byte 0x{data[error.start]:02x}"
        raise UserError(f"{name} is not UTF-8 text ({where}); save it as UTF-8") from None
    if "git-lfs" in found or "HTML" in found:
        raise UserError(f"{name} is {found}")
    if "\0" in text:
        raise UserError(f"{name} is not UTF-8 text (it holds zero bytes, as UTF-16 does); save it as UTF-8")
    return text


def _lines(text):
    """Not `splitlines`, which also cuts at characters that a prompt may hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_lines(path, name=None) -> list[str]:
    """The lines of a UTF-8 file, stripped, without blank ones. Raises UserError as `read_text` does."""
    return [line.strip() for line in _lines(read_text(path, name)) if line.strip()]


def read_table(path, name=None, columns=(), bare=None) -> list[tuple[str, dict]]:
    """The rows of a csv, tsv, jsonl or json table: (place in words, such as "row 1 (line 2)", {column: value}).

    columns: those that each row must have. bare: the column that a json list of texts makes. Values of csv and tsv are
    str, those of json as they are. Blank rows are left out.
    Raises UserError, one sentence that begins with `name` (default: the path), for any other format, for text that is
    not UTF-8, a row with more or fewer cells than the header, a missing column, and a table without rows.
    """
    name, suffix = name or str(path), Path(path).suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"{name} is no table: give {', '.join(TABLES)}")
    text = read_text(path, name)
    if suffix in (".csv", ".tsv"):
        rows = _separated(text, name, columns, "," if suffix == ".csv" else "\t")
    else:
        rows = _json(text, name)
    if bare is not None:
        rows = [(place, {bare: row} if isinstance(row, str) else row) for place, row in rows]
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{name}: {place} is no object with columns but {str(row)[:40]!r}")
        if missing := [column for column in columns if column not in row]:
            raise UserError(f"{name}: {place} has no {', '.join(missing)}, only {', '.join(row) or 'nothing'}")
    if not rows:
        raise UserError(f"{name} holds no row{' below its first, which names the columns' if text.strip() else ''}")
    return rows


def _separated(text, name, columns, delimiter):
    """(place, row) of csv or tsv. The first row names the columns."""
    separator = "comma" if delimiter == "," else "tab"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, header = [], None
    while True:
        place = f"row {len(rows) + 1} (line {reader.line_num + 1})" if header else "its first row"
        with blame(
            f"{name}: {place} cannot be read",
            csv.Error,
            way_out='text that holds quotes is written as "say ""hello"""',
        ):
            cells = next(reader, None)
        if cells is None:
            return rows
        if not any(map(str.strip, cells)):
            continue
        while header is not None and len(cells) > len(header) and not cells[-1].strip():
            cells.pop()  # a spreadsheet's comma at the end of each row
        if header is None:
            header = [cell.strip() for cell in cells]
            if missing := [column for column in columns if column not in header]:
                raise UserError(
                    f"{name} has no column {', '.join(missing)}; its first row names {', '.join(header)}, with a "
                    f"{separator} between two"
                )
            if twice := [column for column in header if column and header.count(column) > 1]:
                raise UserError(f"{name}: its first row names the column {twice[0]!r} twice")
        elif len(cells) == len(header):
            rows.append((place, dict(zip(header, cells, strict=True))))
        else:
            raise UserError(
                f"{name}: {place} has {len(cells)} cells, and the first row names {len(header)} columns "
                f'({", ".join(header)}); put text that holds a {separator} in quotes, as "a cat{delimiter} a dog"'
            )


def _json(text, name):
    """(place, value) of a json list, or of json lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{name} is no JSON ({error})") from None
    else:
        return [(f"row {number}", row) for number, row in enumerate(value if isinstance(value, list) else [value], 1)]
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            with blame(f"{name}: line {number} is no JSON", ValueError, RecursionError):
                rows.append((f"line {number}", json.loads(line)))
    return rows


def read_prompts(path, name=None, column=None) -> list[str]:
    """The prompts of a file: a column of a table, or one a line of any other text; stripped, without empty ones.

    column: of a table; default: the first of `prompt`, `text` and `caption`. Raises UserError as `read_table` does.
    """
    name, path = name or str(path), Path(path).expanduser()
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet(path, name, column)
    elif suffix in TABLES:
        rows = read_table(path, name, bare=column or PROMPT_COLUMNS[0])
        column = _prompt_column(name, rows[0][1], column)
        rows = [(place, row.get(column)) for place, row in rows]
    elif column is not None:
        raise UserError(f"`prompt_column`={column} is for a table, and {name} is none; drop it")
    else:
        return read_lines(path, name)
    for place, prompt in rows:
        if not isinstance(prompt, str | None):
            raise UserError(f"{name}: the prompt of {place} is no text but {str(prompt)[:40]!r}")
    return [prompt.strip() for _, prompt in rows if prompt and prompt.strip()]


def _prompt_column(name, there, column):
    wanted = [column] if column else PROMPT_COLUMNS
    found = next((column for column in wanted if column in there), None)
    if found is None:
        wanted = repr(column) if column else "prompt, text or caption"
        raise UserError(f"{name} has no column {wanted}; its columns are {', '.join(there) or 'none'}")
    return found


def _parquet(path, name, column):
    from pyarrow import ArrowException, parquet

    try:
        column = _prompt_column(name, parquet.read_schema(path).names, column)
        values = parquet.read_table(path, columns=[column]).column(column).to_pylist()
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{name} cannot be read ({str(error).splitlines()[0]})") from None
    return [(f"row {number}", value) for number, value in enumerate(values, 1)]
