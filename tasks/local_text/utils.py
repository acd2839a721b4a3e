"""Documents of the ``local_text`` task: any text of the user's, cut into pieces of bounded length."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets

_SPEC = importlib.util.spec_from_file_location("_local_data", Path(__file__).resolve().parent.parent / "_local_data.py")
assert _SPEC and _SPEC.loader
local_data = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(local_data)

TASK = "local_text"

#: A document ends with the line that brings it to so many characters.
CHARACTERS = 8000


def load(file: Any = None, characters: Any = CHARACTERS, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the split ``test`` with one column, ``text``.

    Args:
        file: a .txt or .jsonl file, plain or gzip; lines of the latter are objects with ``text``.
        characters: length of a document; lines are never cut, and texts of a .jsonl file never joined.

    Raises:
        FileNotFoundError, ValueError: no file is named, or it holds no text.
    """
    if not file:
        raise ValueError(f"{TASK}: name a text file with --metadata file=PATH (.txt or .jsonl, plain or .gz)")
    path = Path(str(file)).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{TASK}: there is no file {path}")
    if path.name.removesuffix(".gz").endswith(".json"):
        raise ValueError(f"{TASK}: {path} would be scored as it stands; write .jsonl, lines of objects with text")
    size = int(characters)
    if size < 1:
        raise ValueError(f"{TASK}: characters must be at least 1, got {characters}")
    texts = [text for whole in _texts(path) for text in _documents(whole, size) if text.strip()]
    if not texts:
        raise ValueError(f"{TASK}: {path} holds no text")
    return {"test": datasets.Dataset.from_dict({"text": texts})}


def _texts(path: Path) -> list[str]:
    def whole(lines: TextIO) -> Iterator[str]:
        yield lines.read()

    def rows(lines: TextIO) -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            try:
                row = local_data.parsed(line) if line.strip() else {"text": ""}
            except ValueError as error:
                raise ValueError(f"line {number} {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"line {number} of it has no text")
            yield row["text"]

    found: list[str] = local_data.read(path, rows if ".jsonl" in path.suffixes else whole, newline=None)
    return found


def _documents(text: str, size: int) -> Iterator[str]:
    part, length = [], 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        length += len(line)
        if length >= size:
            yield "".join(part)
            part, length = [], 0
    yield "".join(part)
