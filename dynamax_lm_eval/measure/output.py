"""The files that a measurement writes are looked at before anything is measured."""

from __future__ import annotations

from pathlib import Path

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import check_writable


def check_output(output: Path, overwrite: bool, *besides: Path) -> None:
    """Checks that ``output``, and ``besides`` in the same folder, can be written.

    Raises:
        UserError: a file exists and may not be written over, or the folder is missing or cannot be written to.
    """
    for path in (output, *besides):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another --output, or add --overwrite True")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}; make it, or choose another --output")
    check_writable(output.parent, "--output: the folder", "choose another")
