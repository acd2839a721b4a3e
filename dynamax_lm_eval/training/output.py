"""The folder that a training writes to: held by one training at a time, and never taken from anything else."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.locks import LOCK_NAME, locked
from dynamax_lm_eval.training import state
from dynamax_lm_eval.training.log import LOG_NAME, TRACKED, is_own_log
from dynamax_lm_eval.training.options import RunOptions

#: Folder of the states to go on from.
STATE_NAME = "state"
#: Folder of PEFT with what ``--lora`` trained.
LORA_NAME = "lora"


def take_output(folder: Path, run: RunOptions, held: ExitStack) -> tuple[Path, state.Progress] | None:
    """Holds the folder until ``held`` closes and looks at it; returns the state to go on from, if any.

    The processes of one launcher share the lock of the first.

    Raises:
        UserError: the folder holds something else, or another process writes there.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        held.enter_context(locked(folder))
    _check_output(folder, run)
    return state.latest(folder / STATE_NAME) if run.resume else None


def _check_output(folder: Path, run: RunOptions) -> None:
    """Refuses to write over what somebody trained, or over files that no training wrote."""
    finished = (folder / checkpoint.CONFIG_NAME).exists()
    begun = state.is_begun(folder / STATE_NAME)
    if folder.exists() and not _is_own(folder):
        names = sorted(_foreign_names(folder))[:3] if folder.is_dir() else []
        raise UserError(
            f"--output {folder} is no folder of a training, and holds other files ({', '.join(names)}, ...); choose "
            "another one"
            if names
            else f"--output {folder} is a file; choose a folder"
        )
    if run.overwrite:
        return
    if finished:
        raise UserError(f"{folder} already holds trained exits; choose another --output, or add --overwrite")
    if begun and not run.resume:
        raise UserError(f"{folder} holds a training that was not finished; add --resume to go on, or --overwrite")


def _is_own(folder: Path) -> bool:
    """Returns whether all that is written over in a folder is a training's.

    It is where the folder is empty, or a training began there.
    """
    if not folder.is_dir():
        return False
    names = {name for name in _foreign_names(folder) if not name.startswith(".") and name != TRACKED}
    log = folder / LOG_NAME
    # Before the first step a training leaves an empty log, which tells nothing where there is more.
    begun = names <= {LOG_NAME, STATE_NAME} if log.is_file() and not log.stat().st_size else not names
    if begun or state.is_begun(folder / STATE_NAME) or (log.is_file() and is_own_log(log)):
        return True
    try:
        checkpoint.FORMAT.read(folder / checkpoint.CONFIG_NAME)
    except UserError:
        return False
    return True


def _foreign_names(folder: Path) -> list[str]:
    """Returns the names in a folder, without the lock that is held there by now."""
    return [path.name for path in folder.iterdir() if path.name != LOCK_NAME]


def clear(folder: Path) -> None:
    """Removes what an earlier training left, once everything else was found to be in order."""
    shutil.rmtree(folder / STATE_NAME, ignore_errors=True)
    if (folder / LORA_NAME / LOG_NAME).is_file():
        shutil.rmtree(folder / LORA_NAME, ignore_errors=True)
    (folder / checkpoint.CONFIG_NAME).unlink(missing_ok=True)
