"""Locks of folders: one process at a time writes into a folder.

A lock is a file in the folder with the host, the process and its start, so that one whose process is gone is known.
Knows processes; knows nothing of what is written.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dynamax_lm_eval.errors import FaultError, UserError

logger = logging.getLogger(__name__)

#: The file of a lock, in the folder that a command writes into.
LOCK_NAME = ".dynamax.lock"
#: Seconds by which two readings of a process's start may differ.
_CLOCK_ERROR = 2.0


@contextmanager
def locked(folder: Path, option: str = "--output") -> Iterator[None]:
    """Holds a folder for this process, which must be the only one that writes there; makes it where it is missing.

    The lock is a file with the host, the process and its start. One that a killed process of this host left is
    taken over.

    Args:
        folder: to be written into.
        option: that named it.

    Raises:
        UserError: another process holds the folder, or it cannot be written.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_NAME
    content = json.dumps(_owner()).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(path, content, option)
    except OSError as error:
        raise FaultError(
            f"{option} {folder} cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_bytes() == content:  # nobody was told to remove it and has it now
                path.unlink()
        with suppress(OSError):  # folders that hold something stay
            for new_folder in new_folders:
                new_folder.rmdir()


def _acquire(path: Path, content: bytes, option: str) -> None:
    """Makes the file of a lock, unless another process has it.

    Raises:
        UserError: another process has it.
    """
    for attempt in range(10):
        try:
            return _create(path, content)
        except FileExistsError:
            pass
        try:
            current = path.read_bytes()
        except FileNotFoundError:
            continue  # released in between
        owner = _parsed(current)
        if owner is None and not attempt:
            time.sleep(0.2)  # it may be in the making, where files cannot be made with their content
            continue
        if owner is not None and not _is_gone(owner):
            raise UserError(
                f"{option} {path.parent} is in use by process {owner['pid']} on {owner['host']}; wait for it, choose "
                f"another folder, or remove {path} if that process is gone"
            )
        logger.warning("Taking over %s, which a process that is gone left", path)
        _remove_stale(path, current)
    raise UserError(f"{option} {path.parent} is in use by other processes; try again, or remove {path}")


def _create(path: Path, content: bytes) -> None:
    """Makes a file that did not exist, with its content in one step where the file system can."""
    handle, partial = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            with path.open("xb") as file:
                file.write(content)
    finally:
        Path(partial).unlink()


def _remove_stale(path: Path, content: bytes) -> None:
    """Removes a stale lock, but not one that another process put in its place meanwhile."""
    aside = f"{path}-{os.getpid()}-stale"
    try:
        os.rename(path, aside)  # noqa: PTH104 - of several processes one succeeds
    except FileNotFoundError:
        return
    if Path(aside).read_bytes() != content:
        with suppress(OSError):
            os.link(aside, path)
    Path(aside).unlink()


def _owner() -> dict[str, Any]:
    """This process, as a lock names it."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _parsed(content: bytes) -> dict[str, Any] | None:
    """Reads the owner of a lock from its content; None where that is damaged."""
    try:
        owner = json.loads(content.decode("utf-8"))
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "started": float(owner["started"])}
    except (ValueError, TypeError, KeyError):
        return None


def _is_gone(owner: Mapping[str, Any]) -> bool:
    """Says whether the owner of a lock ran on this host and is gone; its number may be another process's by now."""
    import psutil

    if owner["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(owner["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - owner["started"]) > _CLOCK_ERROR
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False
