"""Files written so that a reader, or a restart after a kill, never sees half of one."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


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
