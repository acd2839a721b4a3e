"""The file of block distances that ``prune_strategy=angular`` reads, and which blocks it says to disable.

Gromov et al. 2024 (arXiv 2403.17887): the angular distance between the input of block l and that of block l + n,
arccos(x_l . x_{l+n} / |x_l| |x_{l+n}|) / pi, at the last token of a text and averaged over texts, says how much blocks
l .. l + n - 1 do; those of the least distance are disabled. Knows files and numbers; runs nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.prune_adapters import check_adapters
from dynamax_lm_eval.files import JsonFormat
from dynamax_lm_eval.models.fingerprint import Fingerprints

FORMAT = JsonFormat(
    name="dynamax-prune-profile",
    version=1,
    what="a file of dynamax-lm-eval prune-profile",
    remedy="make it: dynamax-lm-eval prune-profile --backbone ...",
    by_hand=True,
)


@dataclass(frozen=True)
class PruneProfile:
    """The distances between the blocks of one backbone.

    Attributes:
        backbone: as the user named it.
        fingerprint: that of its weights.
        num_layers: L.
        distances: distances[n - 1][l - 1] is that of blocks l .. l + n - 1, for n = 1 .. L - 1; in [0, 1].
        texts: how many texts were averaged over.
        tokens: the tokens of each text.
        dataset: where the texts are from.
    """

    backbone: str
    fingerprint: str
    num_layers: int
    distances: list[list[float]]
    texts: int
    tokens: int
    dataset: str

    def blocks(self, count: int) -> frozenset[int]:
        """Returns the ``count`` blocks in a row (1-based) with the least distance; the first of equals."""
        if not 1 <= count <= len(self.distances):
            raise UserError(
                f"prune_layers={count} must be at most {len(self.distances)} for this backbone of {self.num_layers} "
                "blocks"
            )
        row = self.distances[count - 1]
        first = row.index(min(row)) + 1
        return frozenset(range(first, first + count))

    def save(self, path: Path) -> None:
        FORMAT.write(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> PruneProfile:
        """Reads a profile; raises UserError where the file is missing or is no such profile."""
        called = f"prune_profile={str(path)!r}"
        try:
            profile = cls(**FORMAT.read(path, called))
            profile._check()
        except (TypeError, ValueError) as error:
            raise UserError(f"{called} is damaged ({error}); {FORMAT.remedy}") from error
        return profile

    def _check(self) -> None:
        """Refuses, with TypeError or ValueError, what only an edited file says; ``json`` reads NaN as a number."""
        if not isinstance(self.fingerprint, str):
            raise TypeError("its fingerprint must be a text")
        lengths = [len(row) for row in self.distances]
        if lengths != list(range(self.num_layers, 1, -1)):
            raise ValueError(f"distances must have {self.num_layers} to 2 entries, row by row, and have {lengths}")
        if not all(isinstance(d, int | float) and math.isfinite(d) for row in self.distances for d in row):
            raise ValueError("distances must be finite numbers")


def check_files(profile: str | None, adapters: str | None, fingerprints: Fingerprints | None) -> None:
    """Raises UserError where one of the files that a run prunes by is of other weights; None: none, or not known."""
    check_profile(profile, fingerprints)
    check_adapters(adapters, fingerprints)


def check_profile(path: str | None, fingerprints: Fingerprints | None) -> None:
    """Raises UserError where a profile was measured on other weights than these; either may be None, not known."""
    if path is None or fingerprints is None:
        return
    profile = PruneProfile.load(Path(path).expanduser())
    remedy = (
        "make one for this backbone: dynamax-lm-eval prune-profile --backbone ..., or name the blocks: "
        "prune_layers=[...]"
    )
    fingerprints.check(profile.backbone, profile.fingerprint, f"prune_profile={path!r} was measured on", remedy)
