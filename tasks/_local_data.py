"""Local data files for the tasks beside this module: which file it is, and the rows in it.

Knows patterns, gzip, JSON Lines and CSV; knows nothing of prompts, splits and metrics. The harness loads
a task's ``utils.py`` by its path, outside any package, so each of them loads this module by path too.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

_GZIP_MAGIC = b"\x1f\x8b"
#: In the words of JSON.
_KINDS = {str: "text", list: "a list", dict: "an object", object: "anything"}


class LocalFile(NamedTuple):
    """A data file and its age: together the key under which a loader remembers what it read."""

    path: Path
    modified_ns: int


def find(task: str, pattern: str, data_dir: Any = None) -> LocalFile | None:
    """Return the one file in ``data_dir`` that matches ``pattern``, or None without a ``data_dir`` (use the Hub).

    A relative ``data_dir`` is relative to the current directory.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
        ValueError: ``data_dir`` is empty, or several files match.
    """
    if data_dir is None:
        return None
    if not str(data_dir):
        raise ValueError(f"{task}: data_dir is empty; name a folder, or leave it out to load from the Hub")
    folder = Path(str(data_dir)).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{task}: data_dir {folder} is not a folder; looked there for {pattern}")
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise FileNotFoundError(f"{task}: no file in {folder} matches {pattern} (plain or gzip)")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{task}: several files in {folder} match {pattern}: {names}; keep one")
    return LocalFile(found[0], found[0].stat().st_mtime_ns)


def read_jsonl(
    path: Path, columns: Mapping[str, type], make: Callable[[dict[str, Any]], Any] = lambda row: row
) -> list[Any]:
    """Read a JSON Lines file, plain or gzip; every line must be an object with these ``columns`` of these types.

    Args:
        path: of the file.
        columns: name -> type of the value.
        make: gives what is returned of each row.

    Raises:
        ValueError: a line is not such an object, the file is damaged, or it holds no rows.
    """

    def rows(lines: TextIO) -> Iterator[Any]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parsed(line)
                _check(row, columns)
                made = make(row)
            except ValueError as error:
                raise ValueError(f"line {number} {error}") from error
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"line {number} has a value of the wrong shape ({error!r})") from error
            yield made

    return read(path, rows)


def parsed(line: str) -> Any:
    """What a line of JSON says. Raises ValueError where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from error


def _check(row: Any, columns: Mapping[str, type]) -> None:
    missing = [column for column in columns if not isinstance(row, dict) or column not in row]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for column, kind in columns.items():
        if not isinstance(row[column], kind):
            raise ValueError(f"has {json.dumps(row[column])[:40]} as {column}, which must be {_KINDS[kind]}")


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV file with a header line, plain or gzip, which must have these ``columns``.

    Raises:
        ValueError: a column or a cell is missing, the file is damaged, or it holds no rows.
    """

    def rows(lines: TextIO) -> Iterator[dict[str, str]]:
        reader = csv.DictReader(lines, strict=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"the header lacks {', '.join(missing)}")
        for row in reader:
            if any(row[column] is None for column in columns):
                raise ValueError(f"line {reader.line_num} has fewer cells than the header")
            yield row

    return read(path, rows)


def read(path: Path, rows: Callable[[TextIO], Iterator[Any]], newline: str | None = "") -> list[Any]:
    """Open ``path``, plain or gzip, as text, collect what ``rows`` yields from it, and name the file in every error.

    ``newline`` is that of ``open``.

    Raises:
        ValueError: the file is damaged, or it holds no rows.
    """
    with path.open("rb") as file:
        zipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    try:
        # utf-8-sig: the published CSV starts with a byte order mark.
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline=newline) as lines:
            found = list(rows(lines))
    except (ValueError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no rows")
    return found
