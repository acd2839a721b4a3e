"""How far a long piece of work is: a bar on a terminal and in a notebook, elsewhere a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

#: Seconds between two lines.
EVERY = 30.0
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


def is_watched() -> bool:
    """Says whether somebody sees a bar move: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Bar:
    """The progress of something with a known end; a context manager.

    Where nobody watches, in a file or a batch job, work of less than ``EVERY`` seconds says nothing.
    """

    def __init__(
        self,
        total: int,
        desc: str,
        *,
        unit: str = "it",
        unit_scale: bool = False,
        initial: int = 0,
        disable: bool = False,
        leave: bool = True,
    ) -> None:
        """
        Args:
            total: of what is counted.
            desc: what is done.
            unit: what is counted.
            unit_scale: writes thousands as k, millions as M.
            initial: how much was done before.
            disable: shows nothing.
            leave: the bar stays when it is done.
        """
        has_bar = is_watched()
        self._lines = not disable and not has_bar
        self._bar: tqdm[Any] = tqdm(
            total=total,
            desc=desc,
            unit=unit,
            unit_scale=unit_scale,
            initial=initial,
            disable=disable or not has_bar,
            leave=leave,
        )
        self._total, self._desc, self._unit, self._scale = total, desc, unit, unit_scale
        self._done = self._initial = initial
        self._postfix = ""
        self._began = self._told = time.monotonic()

    def show(self, postfix: str) -> None:
        """Shows a text beside the numbers from the next update on."""
        self._postfix = postfix
        self._bar.set_postfix_str(postfix, refresh=False)

    def update(self, more: int = 1) -> None:
        """Counts what was done."""
        self._done += more
        self._bar.update(more)
        if self._lines and time.monotonic() - self._told >= EVERY:
            self._tell()

    def close(self) -> None:
        """Ends the bar, or the lines where there were some."""
        self._bar.close()
        if self._lines and self._told > self._began:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        line = tqdm.format_meter(
            self._done,
            self._total,
            self._told - self._began,
            prefix=self._desc,
            unit=self._unit,
            unit_scale=self._scale,
            initial=self._initial,
            bar_format=_LINE,
            postfix=self._postfix or None,
        )
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def over(
    items: Collection[Item], desc: str, *, unit: str = "it", disable: bool = False, leave: bool = True
) -> Iterator[Item]:
    """Yields items, and shows how many are done."""
    with Bar(len(items), desc, unit=unit, disable=disable, leave=leave) as bar:
        for item in items:
            yield item
            bar.update()
