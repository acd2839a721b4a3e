"""The compute records of responses, found again by what was asked."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import closing
from pathlib import Path
from typing import Any

from lm_eval.api.model import hash_args

from dynamax_lm_eval.compute.accounting import (
    ACCOUNTING,
    SCHEMA_VERSION,
    ComputeRecord,
    ExecutedCompute,
)
from dynamax_lm_eval.errors import UserError, changed_settings
from dynamax_lm_eval.files import checksum

logger = logging.getLogger(__name__)

#: Keys of ours in the harness's response cache; its own are sha256 digests.
_IDENTITY_KEY = "dynamax:identity"


_RECORD_PREFIX = "dynamax:compute:"


class ResponseLedger:
    """Compute records of responses, found again by what was asked.

    A request is known by the harness's own hash of its kind and arguments. The same request may come
    several times (repeats, equal documents); its records are kept in order. With ``--use_cache`` they are
    also stored beside the responses, so that a run answered from the cache reports the same numbers.
    """

    def __init__(self) -> None:
        self._records: dict[str, list[ComputeRecord]] = defaultdict(list)
        self._database: MutableMapping[str, Any] | None = None
        #: Checksums of all answers to a request that were given since the cache was attached.
        self._answers: defaultdict[str, list[str]] = defaultdict(list)
        #: Wall-clock seconds spent answering, by kind of request, and the tokens that ran in them.
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.fed_tokens = 0
        self.executed = ExecutedCompute()
        #: An evaluation is under way that will read the records.
        self.is_followed = False

    def start_run(self) -> None:
        """Forgets the records of an earlier evaluation."""
        self._records.clear()
        self.seconds.clear()
        self.fed_tokens = 0
        self.executed = ExecutedCompute()

    def use_database(self, database: MutableMapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Stores records in the harness's cache from now on. Responses that are damaged are removed with a warning.

        Raises:
            UserError: the cache holds responses of a run with another identity, or of unknown origin, or is damaged.
        """
        called = f"the file of --use_cache ({getattr(database, 'filename', 'in memory')})"
        identity = identity_of_answers(identity)
        if len(database) == 0:
            database[_IDENTITY_KEY] = json.dumps(identity)
        elif _IDENTITY_KEY not in database:
            raise UserError(
                f"{called} holds responses of another model (it has no identity record of dynamax); choose another file"
            )
        stored = _identity(database)
        if stored is None:
            raise UserError(f"{called} is damaged: its identity cannot be read; remove it to have all answers anew")
        if changed := changed_settings(stored, identity):
            raise UserError(f"{called} holds responses of a run that differs in {changed}; choose another file")
        keys = set(database)
        foreign = [key for key in keys if not key.startswith("dynamax:") and _RECORD_PREFIX + key not in keys]
        if foreign:
            raise UserError(
                f"{called} holds {len(foreign)} responses that another model wrote into it; choose another file"
            )
        damaged = [key for key in keys if not key.startswith("dynamax:") and not _is_whole(database, key)]
        for key in damaged:
            del database[key], database[_RECORD_PREFIX + key]
        if damaged:
            logger.warning("%s: %d responses are damaged and are asked for again", called, len(damaged))
        self._database = database
        self._answers.clear()

    def leave_database(self) -> None:
        """Stores nothing in the harness's cache from now on."""
        self._database = None

    def store(self, kind: str, args: Iterable[Any], record: ComputeRecord, answer: Any) -> None:
        """Puts the record of one response, ``answer``, beside the cached one. Call it before that is cached."""
        self.fed_tokens += record.fed_tokens
        if self._database is not None:
            key = hash_args(kind, args)
            # Which of several answers to a request stays in the cache is the harness's business.
            self._answers[key].append(checksum(answer, key))
            data = {"record": record.to_json(), "answers": self._answers[key]}
            self._database[_RECORD_PREFIX + key] = json.dumps({**data, "checksum": checksum(data, key)})

    def keep(self, kind: str, answered: Iterable[tuple[Iterable[Any], ComputeRecord]]) -> None:
        """Keeps (arguments, record) of all responses of a call, in the order of its requests.

        Not in the order in which they were finished: samples of the same request differ in compute.
        """
        for args, record in answered:
            self._records[hash_args(kind, args)].append(record)

    def find(self, kind: str, args: Iterable[Any], occurrence: int) -> ComputeRecord:
        """The record of the ``occurrence``-th response (from 0) to this request."""
        key = hash_args(kind, args)
        records = self._records.get(key, [])
        if occurrence < len(records):
            return records[occurrence]
        if self._database is not None and _RECORD_PREFIX + key in self._database:
            return ComputeRecord.from_json(json.loads(self._database[_RECORD_PREFIX + key])["record"])
        raise RuntimeError(f"no compute record for a {kind} request; was it answered by another model?")


def identity_of_answers(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What answers that are kept for later belong to, as it will be when read back.

    ``identity``: of the model (``DynamaxLM.identity``). The rules of counting belong to it, because the compute of
    answers is kept beside them.
    """
    counting = {"accounting": ACCOUNTING, "schema_version": SCHEMA_VERSION}
    return dict(json.loads(json.dumps({**identity, **counting}, sort_keys=True, default=str)))


def _identity(database: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whose responses a cache holds; None where that is damaged."""
    try:
        found = json.loads(database[_IDENTITY_KEY])
    except Exception:  # what is damaged can be anything
        return None
    return found if isinstance(found, dict) else None


def _is_whole(database: Mapping[str, Any], key: str) -> bool:
    """Whether a response is as it was given, and so is its record."""
    try:
        data = json.loads(database[_RECORD_PREFIX + key])
        return data.pop("checksum") == checksum(data, key) and checksum(database[key], key) in data["answers"]
    except Exception:  # what is damaged can be anything
        return False


def check_database(path: Path) -> None:
    """Raises UserError where a file of ``--use_cache`` is no database, or a damaged one."""
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        with closing(sqlite3.connect(path)) as connection:
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            connection.execute("SELECT key, value FROM unnamed LIMIT 1").fetchone()
    except sqlite3.DatabaseError as error:
        found = str(error)
        if "locked" in found:
            raise UserError(f"the file of --use_cache ({path}) is in use by another run; choose another") from error
    if found != "ok":
        raise UserError(
            f"the file of --use_cache ({path}) is damaged, or no such cache ({' '.join(found.split())}); remove it to "
            "have all answers anew, or choose another file"
        )
