"""The files that a sweep writes into its folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from dynamax_lm_eval.errors import FaultError, UserError
from dynamax_lm_eval.files import JsonFormat, checksum, file_checksum, naming, short_name, write_text
from dynamax_lm_eval.harness.results import document_totals

logger = logging.getLogger(__name__)

#: Of the full model's point.
FULL_NAME = "full"
#: Of a finished point: what it was and which files hold its results; written last.
POINT_NAME = "point.json"
#: Of a point: its answers, as they come.
RESPONSES_NAME = "responses.jsonl"
#: Of the sweep: its options, as they were resolved.
SWEEP_NAME = "sweep.yaml"

#: How a sweep's point.json is read and written.
POINT = JsonFormat(
    name="dynamax-sweep-point",
    version=1,
    what="a finished point of a sweep",
    remedy="start the sweep again, which rewrites it from the stored answers",
)
#: Of the sweep: the names of its points, finished or not.
GRID_NAME = "grid.json"
GRID = JsonFormat(
    name="dynamax-sweep-grid",
    version=1,
    what="the list of a sweep's points",
    remedy="start the sweep again, which rewrites it",
)
_CHECKSUM = "# checksum "


def point_folder(folder: Path, name: str) -> Path:
    """Returns where a sweep in ``folder`` keeps the point of this name."""
    return folder / "points" / short_name(name)


def finished_points(folder: Path) -> list[dict[str, Any]]:
    """Returns what ``point.json`` says of all finished points below a folder, with their places as ``folder``.

    Points that are not finished are left out, with a warning.

    Raises:
        UserError: one of them is damaged.
    """
    if missing := missing_points(folder):
        logger.warning("%s: %d points are not finished and left out: %s", folder, len(missing), ", ".join(missing))
    return [{**POINT.read(path), "folder": path.parent} for path in sorted(folder.rglob(POINT_NAME))]


def missing_points(folder: Path) -> list[str]:
    """Returns the names of the points that the sweeps in or below a folder have not finished yet.

    Sweeps of earlier releases have no list of their points; of these, those that have begun to answer.

    Raises:
        UserError: a list of points is damaged.
    """
    missing = []
    for path in sorted(folder.rglob(GRID_NAME)):
        names = GRID.read(path)["points"]
        missing += [name for name in names if not (point_folder(path.parent, name) / POINT_NAME).is_file()]
    if not missing:
        begun = (path.parent for path in folder.rglob(RESPONSES_NAME))
        missing = sorted(path.name for path in begun if not (path / POINT_NAME).is_file())
    return missing


def full_totals(folder: Path) -> dict[str, dict[tuple[int, str], int]] | None:
    """Returns the MACs of each document of each task in the full model's run; None where that is not finished.

    Raises:
        UserError: a file is damaged.
    """
    directory = point_folder(folder, FULL_NAME)
    if not (directory / POINT_NAME).is_file():
        return None
    point = POINT.read(directory / POINT_NAME)
    check_results(directory, point["checksums"])
    return {task: document_totals(json_lines(directory / file)) for task, file in point["samples"].items()}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines."""
    # str.splitlines also breaks at separators that texts may hold, U+2028 among them.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def check_results(directory: Path, checksums: dict[str, str]) -> None:
    """Compares the files of a finished point with what was written.

    Args:
        directory: the point's folder.
        checksums: of the files, by path below it.

    Raises:
        UserError: a file is missing, or is another.
    """
    for name, expected in checksums.items():
        try:
            current = file_checksum(directory / name)
        except OSError as error:
            raise FaultError(
                f"{directory / name} cannot be read ({error.strerror or error}); {POINT.remedy}"
            ) from error
        if current != expected:
            raise FaultError(f"{directory / name} is damaged, or was changed after it was written; {POINT.remedy}")


def write_options(path: Path, options: dict[str, Any]) -> None:
    """Writes the options of a sweep, with their checksum as a comment."""
    with naming(path):
        write_text(path, f"{yaml.safe_dump(options, sort_keys=False)}{_CHECKSUM}{checksum(options)}\n")


def read_options(path: Path) -> dict[str, Any] | None:
    """Returns the options of a sweep; None where there are none, or with a warning where they are damaged.

    Raises:
        UserError: the file is no sweep's.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8")
        options = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        text, options = "", None
    stored = text.rstrip("\n").rpartition(_CHECKSUM)[2]
    if isinstance(options, dict) and stored == checksum(options):
        return options
    if not (path.parent / "points").is_dir():
        raise UserError(f"{path} was not written by a sweep, and would be written over; choose another --output")
    logger.warning("%s is damaged, or was changed by hand: it is rewritten", path)
    return None
