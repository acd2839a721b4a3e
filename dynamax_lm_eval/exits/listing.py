"""``dynamax-lm-eval exits``: which trained exits this machine has, and which of them a run would find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tabulate import tabulate

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.exits.checkpoint import CONFIG_NAME, ExitCheckpoint
from dynamax_lm_eval.exits.options import ExitsOptions


def command(options: ExitsOptions) -> str:
    """Lists, shows or removes exits; returns what the terminal shows.

    Raises:
        UserError: there are no such exits, or they are not the user's.
    """
    if options.remove is not None:
        return _remove(options.remove)
    if options.show is not None:
        config = lookup.open_exits(options.show).config.to_json()
        return json.dumps(config, indent=1) + "\n"
    rows = [_row(*found) for found in known_exits()]
    if not rows:
        return f"There are no exits in {lookup.exits_home()}, and none come with the package.\n"
    headers = [
        "name",
        "in",
        "backbone",
        "of weights",
        "exits",
        "kinds",
        "exit layers",
        "adapter",
        "states",
        "tokens",
        "date",
    ]
    found = f"{tabulate(rows, headers, tablefmt='github')}\n"
    return (
        f"{found}\nOf several that fit a backbone a run takes the newest in the cache ({lookup.exits_home()}), before "
        "those of the package; exits=NAME_OR_FOLDER names others. Result files say the column `exits` as "
        "exits_fingerprint.\n"
    )


def known_exits() -> Iterator[tuple[str, Path, ExitCheckpoint | UserError]]:
    """Yields all exits that runs look at: where they are (cache or package), their folder, and what is there."""
    for place, home in (("cache", lookup.exits_home()), ("package", lookup.shipped_home())):
        for file in sorted(home.glob(f"*/{CONFIG_NAME}")):
            try:
                yield place, file.parent, ExitCheckpoint.open(file.parent)
            except UserError as error:
                yield place, file.parent, error


def _row(place: str, folder: Path, found: ExitCheckpoint | UserError) -> list[Any]:
    if isinstance(found, UserError):
        return [folder.name, place, "cannot be read", *([""] * 8)]
    config = found.config
    written = datetime.fromtimestamp((folder / CONFIG_NAME).stat().st_mtime).strftime("%Y-%m-%d")
    return [
        folder.name,
        place,
        config.backbone.id,
        config.backbone.fingerprint[:12],
        _fingerprint(found),
        ",".join(config.classifiers),
        "+".join(map(str, config.exit_layers)),
        config.adapter,
        "none" if config.states is None else config.states.kind,
        config.training.get("tokens", ""),
        written if place == "cache" else "",
    ]


def _fingerprint(exits: ExitCheckpoint) -> str:
    try:
        return exits.fingerprint()[:12]
    except (OSError, SafetensorError):
        return "damaged"


def _remove(name: str) -> str:
    home = lookup.exits_home()
    folder = home / name
    if folder.parent != home or not (folder / CONFIG_NAME).is_file():
        names = ", ".join(path.name for place, path, _ in known_exits() if place == "cache") or "none"
        raise UserError(f"--remove {name!r}: there are no such exits in {home}; it has {names}")
    shutil.rmtree(folder)
    return f"removed {folder}\n"
