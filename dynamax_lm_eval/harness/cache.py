"""The file of ``--use_cache``: whose responses it holds, and whether they and their compute records are undamaged.

The harness stores responses under digests of requests; beside them stand here the identity of the model that gave
them, and each response's compute record with checksums. Knows keys, JSON and checksums; knows nothing of models.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from contextlib import closing
from pathlib import Path
from typing import Any

from dynamax_lm_eval.compute.accounting import ACCOUNTING, SCHEMA_VERSION, ComputeRecord
from dynamax_lm_eval.errors import FaultError, UserError, changed_settings
from dynamax_lm_eval.files import checksum

logger = logging.getLogger(__name__)

#: Keys of ours in the harness's response cache; its own are sha256 digests.
_OWN_PREFIX = "dynamax:"
_IDENTITY_KEY = f"{_OWN_PREFIX}identity"
_RECORD_PREFIX = f"{_OWN_PREFIX}compute:"


class RecordCache:
    """Compute records in the harness's response cache, beside the responses that they belong to."""

    def __init__(self, database: MutableMapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Opens a cache, or begins one; responses in it that are damaged are removed with a warning.

        Args:
            database: the harness's cache.
            identity: of the model (``DynamaxLM.identity``).

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
        stored = _stored_identity(database)
        if stored is None:
            raise FaultError(
                f"{called} is damaged: its identity cannot be read; remove it to compute all answers again"
            )
        if changed := changed_settings(stored, identity):
            raise UserError(f"{called} holds responses of a run that differs in {changed}; choose another file")
        keys = set(database)
        digests = [key for key in keys if not key.startswith(_OWN_PREFIX)]
        foreign = [digest for digest in digests if _RECORD_PREFIX + digest not in keys]
        if foreign:
            raise UserError(
                f"{called} holds {len(foreign)} responses that another model wrote into it; choose another file"
            )
        damaged = [digest for digest in digests if not _is_whole(database, digest)]
        for digest in damaged:
            del database[digest], database[_RECORD_PREFIX + digest]
        if damaged:
            logger.warning("%s: %d responses are damaged and are asked for again", called, len(damaged))
        self._database = database
        #: Checksums of all answers to a request that were given since the cache was attached.
        self._answers: defaultdict[str, list[str]] = defaultdict(list)

    def store(self, digest: str, record: ComputeRecord, answer: Any) -> None:
        """Puts the record of one response, ``answer``, beside the cached one; call it before that is cached."""
        # Which of several answers to a request stays in the cache is the harness's business.
        self._answers[digest].append(checksum(answer, digest))
        data = {"record": record.to_json(), "answers": self._answers[digest]}
        self._database[_RECORD_PREFIX + digest] = json.dumps({**data, "checksum": checksum(data, digest)})

    def find(self, digest: str) -> ComputeRecord | None:
        """Returns the record of the cached response to a request; None where there is none."""
        if _RECORD_PREFIX + digest not in self._database:
            return None
        return ComputeRecord.from_json(json.loads(self._database[_RECORD_PREFIX + digest])["record"])


def identity_of_answers(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what answers that are kept for later belong to, in the form that it has when read back.

    ``identity``: of the model (``DynamaxLM.identity``). The rules of counting belong to it, because the compute of
    answers is kept beside them.
    """
    counting = {"accounting": ACCOUNTING, "schema_version": SCHEMA_VERSION}
    return dict(json.loads(json.dumps({**identity, **counting}, sort_keys=True, default=str)))


def check_database(path: Path) -> None:
    """Refuses a file of ``--use_cache`` that the harness could not open.

    Raises:
        UserError: it is no database, a damaged one, or in use.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        with closing(sqlite3.connect(path)) as connection:
            (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            connection.execute("SELECT key, value FROM unnamed LIMIT 1").fetchone()
    except sqlite3.DatabaseError as error:
        state = str(error)
        if "locked" in state:
            raise UserError(f"the file of --use_cache ({path}) is in use by another run; choose another") from error
    if state != "ok":
        raise FaultError(
            f"the file of --use_cache ({path}) is damaged, or no such cache ({' '.join(state.split())}); remove it to "
            "compute all answers again, or choose another file"
        )


def _stored_identity(database: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads whose responses a cache holds; None where that is damaged."""
    try:
        identity = json.loads(database[_IDENTITY_KEY])
    except Exception:  # what is damaged can be anything
        return None
    return identity if isinstance(identity, dict) else None


def _is_whole(database: Mapping[str, Any], digest: str) -> bool:
    """Says whether a response is as it was given, and so is its record."""
    try:
        data = json.loads(database[_RECORD_PREFIX + digest])
        return data.pop("checksum") == checksum(data, digest) and checksum(database[digest], digest) in data["answers"]
    except Exception:  # what is damaged can be anything
        return False
