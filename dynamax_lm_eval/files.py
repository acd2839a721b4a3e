"""Files written so that a reader, or a restart after a kill, never sees half of one, and read so that damage shows.

Knows texts, JSON, checksums and locks of folders; knows nothing of what the files say.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dynamax_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

#: Of a folder that a command writes into: which process that is.
LOCK_NAME = ".dynamax.lock"
#: Characters of a name that stays as it is; with an ending and a date it still fits the 255 bytes of a file name.
_LONGEST_NAME = 120
#: Seconds by which two readings of a process's start may differ.
_CLOCK_ERROR = 2.0


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step: it is either the old one or the new one.

    A new file gets the permissions that the umask leaves, an existing one keeps its own, and where ``path`` is a
    symbolic link, the file that it points to is written.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if target.exists():
                # Before anything is written: what only its owner may read is never open to others.
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def checksum(data: Any, salt: str = "") -> str:
    """16 hex digits over the content of JSON data, however it is laid out.

    Args:
        data: what ``json`` can write; NaN is allowed.
        salt: what the data belong to; with another one the checksum is another.
    """
    text = json.dumps(json.loads(json.dumps(data)), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(f"{salt}\n{text}".encode(), digest_size=8).hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # folders of some file systems cannot be synced
            raise
    finally:
        os.close(handle)


def file_checksum(path: Path) -> str:
    """16 hex digits over the bytes of a file. Raises OSError where it cannot be read."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class JsonFormat:
    """One kind of JSON file of ours: an object that names its format and ends with a checksum of its content.

    Attributes:
        name: what its ``format`` says.
        version: what its ``format_version`` says; a file that says nothing is of version 1.
        what: the file in words, after "is not".
        remedy: what to do about a file that cannot be used.
        by_hand: a file without a checksum, written by hand or by an earlier version, is read unchecked.
        outdated: earlier versions, with the reason why their files may not be used.
    """

    name: str
    version: int
    what: str
    remedy: str
    by_hand: bool = False
    outdated: Mapping[int, str] = field(default_factory=dict)

    def write(self, path: Path, data: Mapping[str, Any]) -> None:
        """Writes a file in one step. Raises OSError, with the path, where that is not possible."""
        content = {"format": self.name, "format_version": self.version, **data}
        with naming(path):
            write_text(path, json.dumps({**content, "checksum": checksum(content)}, indent=2) + "\n")

    def read(self, path: Path, called: str | None = None) -> dict[str, Any]:
        """The data of a file, without format, version and checksum.

        Args:
            path: of the file.
            called: how the user knows the file; None: by its path.

        Raises:
            UserError: it is missing or damaged, is none of these files, or is of a later version.
        """
        called = str(path) if called is None else called
        try:
            data = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise UserError(f"{called} cannot be read ({error.strerror or error}); {self.remedy}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{called} cannot be used: it is damaged ({error}); {self.remedy}") from error
        if not isinstance(data, dict) or data.get("format") != self.name:
            raise UserError(f"{called} cannot be used: it is not {self.what} (no format {self.name!r}); {self.remedy}")
        version = data.get("format_version", 1)
        if version in self.outdated:
            raise UserError(
                f"{called} cannot be used: it is of an earlier version ({version}) that is no longer valid, since "
                f"{self.outdated[version]}; {self.remedy}"
            )
        if version != self.version:
            raise UserError(
                f"{called} cannot be used: its format_version is {version!r} and this version of dynamax reads "
                f"{self.version}; {self.remedy}, or update dynamax-lm-eval"
            )
        stored = data.pop("checksum", None)
        if stored != checksum(data) and not (stored is None and self.by_hand):
            raise UserError(
                f"{called} cannot be used: it is damaged, or was changed after it was written (its checksum is not "
                f"that of its content); {self.remedy}"
            )
        return {name: value for name, value in data.items() if name not in ("format", "format_version")}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of writing that name no file, as that of a full disk, this one's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def short_name(name: str) -> str:
    """A name that can be a file's: as it is where it can, else with a hash in place of what cannot stay."""
    safe = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
    if safe == name and len(name.encode()) <= _LONGEST_NAME and not name.startswith("."):
        return name
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=5).hexdigest()
    kept = safe.encode()[:_LONGEST_NAME].decode(errors="ignore").lstrip(".")
    return f"{kept}-{digest}"


def check_writable(folder: Path, called: str, remedy: str) -> None:
    """Makes a folder and a file in it, which it removes again; what it had to make of folders it leaves.

    Raises:
        UserError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{called} {folder} cannot be written ({error.strerror or error}); {remedy}") from error


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
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_NAME
    content = json.dumps(_owner()).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, content, option)
    except OSError as error:
        raise UserError(
            f"{option} {folder} cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_bytes() == content:  # nobody was told to remove it and has it now
                path.unlink()
        with suppress(OSError):  # folders that hold something stay
            for empty in made:
                empty.rmdir()


def _take(path: Path, content: bytes, option: str) -> None:
    """Makes the file of a lock. Raises UserError where another process has it."""
    for attempt in range(10):
        try:
            return _create(path, content)
        except FileExistsError:
            pass
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            continue  # released in between
        owner = _parsed(found)
        if owner is None and not attempt:
            time.sleep(0.2)  # it may be in the making, where files cannot be made with their content
            continue
        if owner is not None and not _is_gone(owner):
            raise UserError(
                f"{option} {path.parent} is in use by process {owner['pid']} on {owner['host']}; wait for it, choose "
                f"another folder, or remove {path} if that process is gone"
            )
        logger.warning("Taking over %s, which a process that is gone left", path)
        _remove(path, found)
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


def _remove(path: Path, content: bytes) -> None:
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
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _parsed(content: bytes) -> dict[str, Any] | None:
    """What a lock says of its owner; None where it is damaged."""
    try:
        owner = json.loads(content.decode("utf-8"))
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "started": float(owner["started"])}
    except (ValueError, TypeError, KeyError):
        return None


def _is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the owner of a lock ran on this host and runs no more. Its number may be another process's by now."""
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
