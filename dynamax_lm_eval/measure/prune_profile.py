"""``dynamax-lm-eval prune-profile``: how much runs of blocks turn the hidden state, measured on text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynamax_lm_eval.backbones.base import Backbone
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.pruning import PruneProfile
from dynamax_lm_eval.files import check_writable
from dynamax_lm_eval.frozen import text as data
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.training.options import DEFAULT_DATASET, DEFAULT_DATASET_CONFIG, RunOptions, TrainingOptions

#: Texts that run together.
_AT_ONCE = 8


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, and where it is written."""

    backbone: str = field(metadata={"help": "alias (smollm2-gguf, mistral, ...), Hub id, or folder"})
    output: str = field(default="prune-profile.json", metadata={"help": "file; a plot is written beside it"})
    dataset: str = field(
        default=DEFAULT_DATASET,
        metadata={
            "help": "a Hub id (streamed), a .txt, .jsonl(.gz) or .parquet file, a folder or pattern of such files"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": f"of a Hub data set ({DEFAULT_DATASET_CONFIG} for the default one)"}
    )
    dataset_split: str = field(default="train", metadata={"help": "of a Hub data set"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    texts: int = field(default=128, metadata={"help": "texts to average over"})
    seq_len: int = field(default=256, metadata={"help": "tokens of each; the last one's states are compared"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    device: str = field(default="auto", metadata={"help": "cpu, or auto: a GPU where there is one"})
    trust_remote_code: bool = field(default=False, metadata={"help": "let the backbone's folder run its own code"})
    overwrite: bool = field(default=False, metadata={"help": "write over an existing file"})

    def __post_init__(self) -> None:
        for name, least in (("texts", 1), ("seq_len", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def command(options: ProfileOptions) -> str:
    """Measures, and returns what the terminal shows."""
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
    for path in (output, plotted):
        if path.exists() and not options.overwrite:
            raise UserError(f"{path} exists; choose another --output, or add --overwrite True")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}; make it, or choose another --output")
    check_writable(output.parent, "--output: the folder", "choose another")
    reading = TrainingOptions(
        backbone=options.backbone,
        dataset=options.dataset,
        dataset_config=options.dataset_config,
        dataset_split=options.dataset_split,
        text_column=options.text_column,
        seq_len=options.seq_len,
        micro_batch_tokens=options.seq_len,
        batch_tokens=options.seq_len,
        dtype=options.dtype,
    )
    loaded = load_backbone(reading, RunOptions(device=options.device, trust_remote_code=options.trust_remote_code))
    documents = data.text_documents(reading, options.dataset, loaded.tokenizer)
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
    """Hidden states (R, L + 1, D) of each row's last token: what block 1 is given, then what every block gives."""
    depth = backbone.num_layers
    batch = FrozenPass(backbone, tuple(range(1, depth)), False, 1).run(rows)
    ends = torch.from_numpy(np.cumsum([len(row) for row in rows]) - 1).to(backbone.device)
    with torch.no_grad():
        first = backbone.embed(torch.tensor([row[-1] for row in rows], device=backbone.device))[0]
        return torch.stack(
            [first, *(batch.exits[layer][ends] for layer in range(1, depth)), batch.last[ends]], 1
        ).float()


def distances(states: Tensor) -> list[list[float]]:
    """Of states (R, L + 1, D), for n = 1 .. L - 1: the mean distance, in [0, 1], across each n blocks in a row."""
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    cosines = torch.einsum("rld,rmd->rlm", unit, unit).clamp(-1, 1)
    angles = (torch.arccos(cosines) / torch.pi).mean(0)  # (L + 1, L + 1)
    depth = states.shape[1] - 1
    return [[float(angles[i, i + n]) for i in range(depth + 1 - n)] for n in range(1, depth)]


def table(measured: PruneProfile, counts: tuple[int, ...] = (1, 2, 3, 4, 6, 8)) -> str:
    """Which blocks go for some numbers of blocks, as text."""
    lines = ["blocks  pruned   distance"]
    for count in counts:
        if count <= len(measured.distances):
            blocks = sorted(measured.blocks(count))
            distance = measured.distances[count - 1][blocks[0] - 1]
            lines.append(f"{count:6d}  {blocks[0]:2d}..{blocks[-1]:<2d}   {distance:.4f}")
    return "\n".join(lines) + "\n"


def plot(measured: PruneProfile, path: Path) -> None:
    """Distance by first block, one line per number of blocks, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    shown: Any = plt.get_cmap("viridis")
    for count in range(1, min(len(measured.distances), 12) + 1):
        row = measured.distances[count - 1]
        colour = shown((count - 1) / 12)
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


def _rows(documents: data.Documents, options: ProfileOptions) -> list[list[int]]:
    """The first ``seq_len`` tokens of the first documents that are as long."""
    rows = []
    for tokens in documents(0, 0):
        if len(tokens) >= options.seq_len:
            rows.append(tokens[: options.seq_len])
        if len(rows) == options.texts:
            return rows
    raise UserError(
        f"only {len(rows)} documents have {options.seq_len} tokens, and --texts={options.texts} are wanted; lower one"
    )
