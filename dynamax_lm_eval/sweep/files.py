"""The files that a sweep writes into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Of a finished point: what it was and which files hold its results; written last.
POINT_NAME = "point.json"
#: Of a point: its answers, as they come.
RESPONSES_NAME = "responses.jsonl"
#: Of the sweep: its options, as they were resolved.
SWEEP_NAME = "sweep.yaml"


def finished_points(folder: Path) -> list[dict[str, Any]]:
    """What ``point.json`` says of every finished point below a folder, with its place as ``folder``."""
    found = []
    for path in sorted(folder.rglob(POINT_NAME)):
        found.append({**json.loads(path.read_text(encoding="utf-8")), "folder": path.parent})
    return found
