"""``dynamax-lm-eval prune-profile``: how much runs of blocks rotate the hidden state, and read-outs without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import Backbone
from dynamax_lm_eval.engine.parity import check_policy
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.prune_adapters import PruneAdapters, blocks_name, save
from dynamax_lm_eval.exits.pruning import PruneProfile
from dynamax_lm_eval.exits.resolve import resolve_pruned_blocks
from dynamax_lm_eval.frozen.model import FrozenBackbone, load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import Documents, held_out, text_documents
from dynamax_lm_eval.measure.options import ProfileOptions
from dynamax_lm_eval.measure.output import check_output
from dynamax_lm_eval.measure.prune_adapters import Blocks, Fit, fit, split
from dynamax_lm_eval.progress import over

#: Texts that run together.
_AT_ONCE = 8


def command(options: ProfileOptions) -> str:
    """Measures and writes what is asked for; returns as text what that gave, and the files.

    Raises:
        UserError: as :func:`profile` does.
    """
    return profile(options)


def profile(options: ProfileOptions) -> str:
    """Measures block distances, fits the read-outs that are asked for, and writes both; returns the text for it.

    Raises:
        UserError: an option cannot be honoured, there is too little text, or a file exists.
    """
    output, plotted, adapters = options.files
    for path, what in ((plotted, "the plot goes"), (adapters, "adapters go")):
        if path == output:
            raise UserError(f"--output {output} is where {what}; choose a name that does not end in {path.suffix}")
    check_output(output, options.overwrite, plotted, *([adapters] if options.counts else []))
    frozen = FrozenOptions.of(options)
    loaded = load_backbone(frozen)
    deepest = [resolve_pruned_blocks(count, loaded.identity.num_layers) for count in options.counts]
    documents = text_documents(frozen.source, loaded.tokenizer)
    fitting, kept = list[list[int]](), list[list[int]]()
    if options.counts:  # whether the text is enough is seen before anything is measured
        asked = (options.fit_tokens, options.seq_len, options.fit_documents)
        fitting, kept = split(held_out(documents, *asked, options=("--fit_tokens", "--fit_documents")))
    measured = _save_distances(options, loaded, documents)
    text = f"{table(measured)}{output}\n"
    if not options.counts:
        return text
    sets = list(dict.fromkeys([*deepest, *(measured.blocks(count) for count in options.counts)]))
    for blocks in sets:
        check_policy(loaded.engine, ExitPolicy(loaded.identity.num_layers, pruned_blocks=blocks))
    fits = fit(loaded.engine.backbone, fitting, kept, sets, options.ridge)
    _save_fits(options, loaded, fits)
    return f"{text}{fit_table(fits)}{adapters}\n"


def _save_distances(options: ProfileOptions, loaded: FrozenBackbone, documents: Documents) -> PruneProfile:
    """Measures block distances and writes them; raises UserError where there is too little text."""
    output, plotted, _ = options.files
    rows = _rows(documents, options)
    parts = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
    states = torch.cat([last_states(loaded.engine.backbone, part) for part in over(parts, f"{_AT_ONCE} texts each")])
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


def fit_table(fits: dict[Blocks, Fit]) -> str:
    """Returns, as text, what read-outs do on text that they were not fitted on."""
    lines = ["pruned            agreement  with read-out  error   with read-out"]
    for blocks, found in fits.items():
        (before, after), (far, near) = found.agreement, found.error
        lines.append(f"{_span(blocks):16s}  {before:.4f}     {after:.4f}         {far:6.4f}  {near:.4f}")
    return "\n".join(lines) + "\n"


def _span(blocks: Blocks) -> str:
    return f"{min(blocks)}..{max(blocks)}"


def _save_fits(options: ProfileOptions, loaded: FrozenBackbone, fits: dict[Blocks, Fit]) -> None:
    identity = loaded.identity
    names = {blocks: blocks_name(blocks) for blocks in fits}
    fitted = {
        "dataset": options.dataset,
        "tokens": options.fit_tokens,
        "documents": options.fit_documents,
        "ridge": options.ridge,
        "agreement": {names[blocks]: list(found.agreement) for blocks, found in fits.items()},
        "error": {names[blocks]: list(found.error) for blocks, found in fits.items()},
    }
    parameters = {blocks: found.adapter.up.state_dict() for blocks, found in fits.items()}
    tensors = {
        names[blocks]: {part: tensor.cpu().float() for part, tensor in own.items()}
        for blocks, own in parameters.items()
    }
    content = PruneAdapters(
        identity.id, identity.fingerprint, identity.num_layers, identity.hidden_size, adapters={}, fitted=fitted
    )
    save(options.files[2], content, tensors)


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
