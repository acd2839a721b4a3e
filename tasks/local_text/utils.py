"""Documents of the ``local_text`` task: any text of the user's, cut into pieces of bounded length."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

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
    size = int(characters)
    if size < 1:
        raise ValueError(f"{TASK}: characters must be at least 1, got {characters}")
    texts = [text for whole in _texts(path) for text in _documents(whole, size) if text.strip()]
    if not texts:
        raise ValueError(f"{TASK}: {path} holds no text")
    return {"test": datasets.Dataset.from_dict({"text": texts})}


def _texts(path: Path) -> Iterator[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
        if ".jsonl" not in path.suffixes:
            yield lines.read()
            return
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else {"text": ""}
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{TASK}: line {number} of {path} has no text")
            yield row["text"]


def _documents(text: str, size: int) -> Iterator[str]:
    part, length = [], 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        length += len(line)
        if length >= size:
            yield "".join(part)
            part, length = [], 0
    yield "".join(part)
