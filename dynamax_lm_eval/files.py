"""Files written so that a reader, or a restart after a kill, never sees half of one, and read so that damage shows.

Knows texts, JSON, tensors, checksums and names; knows nothing of what the files say.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dynamax_lm_eval.errors import FaultError, UserError

if TYPE_CHECKING:
    import torch

#: Characters of a name that stays as it is; with an ending and a date it still fits the 255 bytes of a file name.
_LONGEST_NAME = 120


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step: it is either the old one or the new one.

    A new file gets the permissions that the umask leaves, an existing one keeps its own, and where ``path`` is a
    symbolic link, the file that it points to is written.
    """
    target = Path(os.path.realpath(path))
    with replacing(target) as partial:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if target.exists():
                # Before anything is written: what only its owner may read is never open to others.
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new path beside ``path`` to write to; in the end that becomes it, or is removed after an error."""
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, on disk before this returns; not in one step, so that callers rename it.

    It gets the permissions that the umask leaves, where the library's own make it its writer's alone.
    """
    from safetensors.torch import save_file  # takes torch, which not all who write files need

    with naming(path):
        path.touch()
        permissions = stat.S_IMODE(path.stat().st_mode)
        save_file(dict(tensors), path, metadata=metadata)
        path.chmod(permissions)
    sync(path)


def checksum(data: Any, salt: str = "") -> str:
    """Returns 16 hex digits over the content of JSON data, however it is laid out.

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
    """Returns 16 hex digits over the bytes of a file; raises OSError where it cannot be read."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class JsonFormat:
    """One kind of JSON file: it holds an object that names its format and ends with a checksum of its content.

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
        """Writes a file in one step; raises OSError, with the path, where that is not possible."""
        content = {"format": self.name, "format_version": self.version, **data}
        with naming(path):
            write_text(path, json.dumps({**content, "checksum": checksum(content)}, indent=2) + "\n")

    def read(self, path: Path, called: str | None = None) -> dict[str, Any]:
        """Returns the data of a file, without format, version and checksum.

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
            raise FaultError(f"{called} cannot be used: it is damaged ({error}); {self.remedy}") from error
        if not isinstance(data, dict) or data.get("format") != self.name:
            raise UserError(f"{called} cannot be used: it is not {self.what} (no format {self.name!r}); {self.remedy}")
        version = data.get("format_version", 1)
        if isinstance(version, int) and version in self.outdated:
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
            raise FaultError(
                f"{called} cannot be used: it is damaged, or was changed after it was written (its checksum is not "
                f"that of its content); {self.remedy}"
            )
        return {name: value for name, value in data.items() if name not in ("format", "format_version")}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the name of the file into errors of writing that name none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def clean_name(name: str, kept: str = "-_.") -> str:
    """Replaces what is no letter, digit or one of ``kept`` by an underscore; two names may become one."""
    return "".join(c if c.isalnum() or c in kept else "_" for c in name)


def short_name(name: str) -> str:
    """Returns the name itself where it can be a file's, else a cleaned one with a hash that tells it from others."""
    safe = clean_name(name, kept="-_.+")
    if safe == name and len(name.encode()) <= _LONGEST_NAME and not name.startswith("."):
        return name
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=5).hexdigest()
    beginning = safe.encode()[:_LONGEST_NAME].decode(errors="ignore").lstrip(".")
    return f"{beginning}-{digest}"


def check_output_path(given: str) -> None:
    """Refuses a ``--output_path`` that cannot be written: the harness notices at the end, and goes on without files.

    ``given``: a folder, or the name of a .json file in one, as the harness reads it.

    Raises:
        FaultError: it cannot.
    """
    path = Path(given)
    check_writable(path.parent if path.suffix == ".json" else path, "--output_path: the folder", "choose another")


def check_writable(folder: Path, called: str, remedy: str) -> None:
    """Makes a folder, and a file in it to see that it can; the file is removed again, the folder stays.

    Raises:
        UserError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FaultError(f"{called} {folder} cannot be written ({error.strerror or error}); {remedy}") from error
