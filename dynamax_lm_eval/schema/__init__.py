"""JSON Schemas of all that this package adds to the harness's files, and the tables of them in the documentation.

``results.json`` for ``results_*.json``, ``samples.json`` for a line of ``samples_*.jsonl`` (draft 2020-12). What the
harness writes itself is left open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAMES = ("results", "samples")


def load(name: str) -> dict[str, Any]:
    """Returns a schema, one of :data:`NAMES`."""
    schema: dict[str, Any] = json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
    return schema


def field_table(name: str) -> str:
    """Returns the fields of a schema as a table in Markdown, as docs/result_files.md has it."""
    schema = load(name)
    rows = [f"| `{place}` | {text} |" for place, text in _fields(schema, schema.get("$defs", {}), "")]
    return "\n".join(["| place | what |", "| --- | --- |", *rows]) + "\n"


def _fields(schema: Mapping[str, Any], shared: Mapping[str, Any], place: str) -> Iterator[tuple[str, str]]:
    """Yields every described field with its place; what several places share is told at the first one."""
    for part in schema.get("allOf", ()):
        if "$ref" not in part:
            yield from _fields(part, shared, place)
    entries = dict(schema.get("properties", {}))
    entries |= {
        name.strip("^$").replace(",.+", ",FILTER"): own for name, own in schema.get("patternProperties", {}).items()
    }
    for name, own in entries.items():
        here = f"{place}.{name}" if place else name
        if "description" in own:
            yield here, own["description"]
        yield from _fields(own, shared, here)
        if isinstance(more := own.get("additionalProperties"), Mapping):
            known = shared.get(str(more.get("$ref", "")).rpartition("/")[2], more)
            yield from _fields(known, shared, f"{here}[..]")
