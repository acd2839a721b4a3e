"""Fingerprints of weight files on disk, kept while the files stay as they were.

Knows names, sizes and times of files; does not know how fingerprints are made.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from dynamax_lm_eval.files import write_text
from dynamax_lm_eval.models.aliases import cache_dir

logger = logging.getLogger(__name__)

#: A file that changed this shortly before it was looked at may change again without another time stamp.
_SETTLED_NS = 2_000_000_000


class FingerprintFile:
    """The file in the cache folder that keeps the fingerprints of some weight files."""

    def __init__(self, folder: Path, weight_files: Sequence[Path], version: int) -> None:
        """
        Args:
            folder: the model's, with its config.json.
            weight_files: those that are fingerprinted, in it.
            version: of the fingerprints; those of another version are not read.
        """
        self._version = version
        self._path = _path(folder, weight_files)
        self._file_states = _file_states([*weight_files, folder / "config.json"])
        self._looked_at = time.time_ns()

    def read(self) -> tuple[str, ...] | None:
        """Returns the current fingerprint and the former ones, if they are of files that look as these do.

        A file that cannot be read counts as none.
        """
        states = {name: list(values) for name, values in self._file_states.items()}
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            if data["format"] != self._version or data["files"] != states:
                return None
            fingerprints = (data["current"], *data["former"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return fingerprints if all(isinstance(value, str) for value in fingerprints) else None

    def write(self, current: str, former: Sequence[str]) -> None:
        """Keeps fingerprints, unless a weight file is so new that a change of it might go unnoticed."""
        if any(changed + _SETTLED_NS >= self._looked_at for _, changed in self._file_states.values()):
            return
        data = {"format": self._version, "files": self._file_states, "current": current, "former": former}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(data, indent=1) + "\n")
        except OSError as error:
            logger.debug("%s could not be written, weights will be read again: %s", self._path, error)


def _path(folder: Path, weight_files: Iterable[Path]) -> Path:
    folder = folder.resolve()
    names = "\n".join([str(folder), *(file.name for file in weight_files)])
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in folder.name)[:60]
    return cache_dir() / "fingerprints" / f"{name}-{xxhash.xxh3_64(names.encode()).hexdigest()}.json"


def _file_states(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of each of these files that is there."""
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()}
