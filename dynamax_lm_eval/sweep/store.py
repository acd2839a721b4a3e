"""Responses of one point, kept line by line as they are finished, so that a kill loses none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_lm_eval.compute.ledger import ComputeRecord
from dynamax_lm_eval.config import UserError, changed_settings
from dynamax_lm_eval.files import write_text
from dynamax_lm_eval.harness import identity_of_answers


@dataclass(frozen=True)
class Response:
    """What was answered: a text, or (log-likelihood, is_greedy), or a log-likelihood; and what it took.

    ``pieces``: the texts of the generated tokens, one by one, for display.
    """

    answer: Any
    record: ComputeRecord
    pieces: list[str] | None = None


class ResponseStore:
    """The responses of one point: a JSON Lines file whose first line says whose they are."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens or begins the file.

        Raises:
            UserError: it holds responses of another identity.
        """
        self._responses: dict[str, Response] = {}
        identity = identity_of_answers(identity)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"identity": identity}) + "\n")
        else:
            if changed := changed_settings(json.loads(lines[0])["identity"], identity):
                raise UserError(f"{path} holds responses of a sweep that differs in {changed}; choose another --output")
            for line in lines[1:-1]:  # what follows the last line break was cut short by a kill
                data = json.loads(line)
                record = ComputeRecord.from_json(data["record"])
                self._responses[data["key"]] = Response(data["answer"], record, data.get("pieces"))
            if lines[-1]:
                write_text(path, "\n".join(lines[:-1]) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._responses

    def __getitem__(self, key: str) -> Response:
        return self._responses[key]

    def add(self, key: str, response: Response) -> None:
        """Keeps a response, on disk before this returns."""
        self._responses[key] = response
        data = {"key": key, "answer": response.answer, "record": response.record.to_json()}
        if response.pieces is not None:
            data["pieces"] = response.pieces
        self._file.write(json.dumps(data, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
