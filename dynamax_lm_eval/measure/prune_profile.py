"""``dynamax-lm-eval prune-profile``: how much runs of blocks turn the hidden state, measured on text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynamax_lm_eval.backbones.base import Backbone
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.pruning import PruneProfile
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions, check_at_least, frozen_option, option
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import Documents, text_documents
from dynamax_lm_eval.measure.output import check_output

#: Texts that run together.
_AT_ONCE = 8


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, and where it is written."""

    backbone: str = frozen_option("backbone")
    output: str = option("prune-profile.json", "file; a plot is written beside it")
    dataset: str = frozen_option("dataset")
    dataset_config: str | None = frozen_option("dataset_config")
    dataset_split: str = frozen_option("dataset_split")
    text_column: str = frozen_option("text_column")
    texts: int = option(128, "texts to average over")
    seq_len: int = frozen_option("seq_len", "tokens of each; the last one's states are compared")
    dtype: str = frozen_option("dtype")
    device: str = frozen_option("device")
    trust_remote_code: bool = frozen_option("trust_remote_code")
    overwrite: bool = option(False, "write over an existing file")

    def __post_init__(self) -> None:
        check_at_least(self, {"texts": 1})
        FrozenOptions.of(self)  # checks the others


def command(options: ProfileOptions) -> str:
    """Measures block distances and writes them; returns which blocks they prune, and the file, as text.

    Raises:
        UserError: as :func:`profile` does.
    """
    return f"{table(profile(options))}{options.output}\n"


def profile(options: ProfileOptions) -> PruneProfile:
    """Measures block distances and writes them.

    Raises:
        UserError: an option cannot be honoured, there is too little text, or the file exists.
    """
    output = Path(options.output).expanduser()
    plotted = output.with_suffix(".png")
    if plotted == output:
        raise UserError(f"--output {output} is where the plot goes; choose a name that does not end in .png")
    check_output(output, options.overwrite, plotted)
    frozen = FrozenOptions.of(options)
    loaded = load_backbone(frozen)
    documents = text_documents(frozen.source, loaded.tokenizer)
    rows = _rows(documents, options)
    parts = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
    states = torch.cat(
        [last_states(loaded.engine.backbone, part) for part in tqdm(parts, desc="texts", unit_scale=_AT_ONCE)]
    )
    measured = PruneProfile(
        backbone=loaded.identity.id,
        fingerprint=loaded.identity.fingerprint,
        num_layers=loaded.identity.num_layers,
        distances=distances(states),
        texts=len(rows),
        tokens=options.seq_len,
        dataset=options.dataset,
    )
    measured.save(output)
    plot(measured, plotted)
    return measured


def last_states(backbone: Backbone, rows: list[list[int]]) -> Tensor:
    """Returns the states (R, L + 1, D) of each row's last token: the input of block 1, then all blocks' outputs."""
    depth = backbone.num_layers
    batch = FrozenPass(backbone, tuple(range(1, depth)), False, 1).run(rows)
    ends = torch.from_numpy(np.cumsum([len(row) for row in rows]) - 1).to(backbone.device)
    states = [batch.first, *(batch.exits[layer] for layer in range(1, depth)), batch.last]
    return torch.stack([state[ends] for state in states], 1).float()


def distances(states: Tensor) -> list[list[float]]:
    """Returns the mean distance in [0, 1] of states (R, L + 1, D) across each n blocks in a row, n = 1 .. L - 1."""
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    cosines = torch.einsum("rld,rmd->rlm", unit, unit).clamp(-1, 1)
    angles = (torch.arccos(cosines) / torch.pi).mean(0)  # (L + 1, L + 1)
    depth = states.shape[1] - 1
    return [[float(angles[i, i + n]) for i in range(depth + 1 - n)] for n in range(1, depth)]


def table(measured: PruneProfile, counts: tuple[int, ...] = (1, 2, 3, 4, 6, 8)) -> str:
    """Returns, as text, which blocks are pruned for some numbers of blocks."""
    lines = ["blocks  pruned   distance"]
    for count in counts:
        if count <= len(measured.distances):
            blocks = sorted(measured.blocks(count))
            distance = measured.distances[count - 1][blocks[0] - 1]
            lines.append(f"{count:6d}  {blocks[0]:2d}..{blocks[-1]:<2d}   {distance:.4f}")
    return "\n".join(lines) + "\n"


def plot(measured: PruneProfile, path: Path) -> None:
    """Draws the distance by first block, one line per number of blocks, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    colours: Any = plt.get_cmap("viridis")
    for count in range(1, min(len(measured.distances), 12) + 1):
        row = measured.distances[count - 1]
        colour = colours((count - 1) / 12)
        axes.plot(range(1, len(row) + 1), row, color=colour, linewidth=1.2)
        axes.annotate(
            str(count), (len(row), row[-1]), xytext=(4, 0), textcoords="offset points", color=colour, fontsize=8
        )
        best = row.index(min(row))
        axes.plot(best + 1, row[best], "o", color=colour, markersize=4)
    axes.set_xlabel("first of the blocks")
    axes.set_ylabel("angular distance")
    axes.set_title(f"{measured.backbone}: how much 1 to 12 blocks in a row turn the state", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _rows(documents: Documents, options: ProfileOptions) -> list[list[int]]:
    """Returns the first ``seq_len`` tokens of the first documents that are as long."""
    rows: list[list[int]] = []
    for tokens in documents(0, 0):
        if len(tokens) >= options.seq_len:
            rows.append(tokens[: options.seq_len])
        if len(rows) == options.texts:
            return rows
    raise UserError(
        f"only {len(rows)} documents have {options.seq_len} tokens, and --texts={options.texts} are wanted; lower one"
    )
