"""Responses of one point, kept line by line as they are finished, so that a kill loses none of them.

The first line says whose they are. Every line ends with a checksum that depends on that too, so a line that was
damaged, or belongs to another point, is known for what it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.errors import FaultError, UserError, changed_settings
from dynamax_lm_eval.files import checksum, naming, write_text
from dynamax_lm_eval.harness.cache import identity_of_answers

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "dynamax-responses", 1


@dataclass(frozen=True)
class Response:
    """An answer (a text, (log-likelihood, is_greedy), or a log-likelihood) and its compute.

    ``pieces``: the texts of the generated tokens, one by one, for display.
    """

    answer: Any
    record: ComputeRecord
    pieces: list[str] | None = None


class ResponseStore:
    """The responses of one point: a JSON Lines file whose first line says whose they are."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens or begins the file; lines that are damaged are dropped with a warning.

        Raises:
            UserError: it holds responses of another identity, or something else.
        """
        self._path = path
        identity = identity_of_answers(identity)
        self._salt = checksum(identity)
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": identity}
        first = _line(header)
        content = _read(path)
        self._responses, damaged = _responses(content.lines, self._salt)
        if content.identity is not None:
            if changed := changed_settings(content.identity, identity):
                raise UserError(f"{path} holds responses of a sweep that differs in {changed}; choose another --output")
        elif not self._responses and content.lines:
            raise FaultError(
                f"{path} holds no answers of this sweep, or its first line is damaged; remove it to have them asked "
                "again, or choose another --output"
            )
        #: Whether something that was kept here is lost.
        self.damaged = bool(damaged) or (content.exists and content.identity is None)
        if self.damaged:
            logger.warning(
                "%s: %s damaged; what they held is asked again",
                path,
                f"{damaged} of {len(content.lines)} answers are" if damaged else "the first line is",
            )
        if self.damaged or content.cut or not content.exists:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [first, *(_line(_to_json(key, response), self._salt) for key, response in self._responses.items())]
            with naming(path):
                write_text(path, "".join(lines))
        self._file = path.open("a", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._responses

    def __getitem__(self, key: str) -> Response:
        return self._responses[key]

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, key: str, response: Response) -> None:
        """Keeps a response, on disk before this returns."""
        self._responses[key] = response
        with naming(self._path):
            self._file.write(_line(_to_json(key, response), self._salt))
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def stored_responses(path: Path, count: int) -> dict[str, Response]:
    """Reads all responses in a file, whosever they are; there must be ``count`` at least.

    Raises:
        UserError: it is missing or damaged.
    """
    content = _read(path)
    responses, damaged = _responses(content.lines, checksum(content.identity))
    if content.identity is None or damaged or len(responses) < count:
        raise FaultError(f"{path} is missing or damaged; start the sweep again, which asks for what is lost")
    return responses


@dataclass(frozen=True)
class _Content:
    """The content of a file: its identity (None where the first line is missing or damaged), and the lines after it."""

    exists: bool
    identity: dict[str, Any] | None
    lines: list[bytes]
    #: Something follows the last line break: a line that a kill cut short.
    cut: bool


def _read(path: Path) -> _Content:
    """Reads a file of responses, whatever is damaged of it."""
    if not path.is_file():
        return _Content(False, None, [], False)
    first, *lines = path.read_bytes().split(b"\n")
    cut = lines.pop() if lines else first
    data = _checked(first)
    identity = data.get("identity") if data is not None and data.get("format") == FORMAT else None
    if data is None or data.get("format_version") != FORMAT_VERSION or not isinstance(identity, dict):
        identity = None
    if not lines and identity is None and not first.startswith(_BEGINNING[: len(first)]):
        lines = [first]
    return _Content(True, identity, lines, bool(cut))


#: The beginning of every file of responses.
_BEGINNING = json.dumps({"format": FORMAT}).removesuffix("}").encode()


def _responses(lines: list[bytes], salt: str) -> tuple[dict[str, Response], int]:
    """Returns the responses of whole lines (of a key that comes twice, the last), and how many lines are damaged."""
    responses: dict[str, Response] = {}
    damaged = 0
    for line in lines:
        try:
            data = _checked(line, salt) or {}
            record = ComputeRecord.from_json(data["record"])
            if data["answer"] is None:
                raise TypeError("no answer")
            responses[data["key"]] = Response(data["answer"], record, data.get("pieces"))
        except (KeyError, TypeError):  # also of another version
            damaged += 1
    return responses, damaged


def _to_json(key: str, response: Response) -> dict[str, Any]:
    data = {"key": key, "answer": response.answer, "record": response.record.to_json()}
    return data if response.pieces is None else {**data, "pieces": response.pieces}


def _line(data: Mapping[str, Any], salt: str = "") -> str:
    return json.dumps({**data, "checksum": checksum(data, salt)}, ensure_ascii=False) + "\n"


def _checked(line: bytes, salt: str = "") -> dict[str, Any] | None:
    """Returns the data of a line; None where it is damaged, or made for another salt."""
    try:
        data = json.loads(line.decode("utf-8"))
        stored = data.pop("checksum")
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return None
    return data if stored == checksum(data, salt) else None
