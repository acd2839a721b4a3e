"""``dynamax-lm-eval exit-thresholds``: records what every exit would have said of text, and searches thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tabulate import tabulate

from dynamax_lm_eval.compute.accounting import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.files import check_writable
from dynamax_lm_eval.frozen import text as data
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.observe import observe
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.measure.threshold_search import (
    Floats,
    Recorded,
    ThresholdPath,
    agreement_at,
    best_path,
    exits_at,
    outcome,
)
from dynamax_lm_eval.training.options import DEFAULT_DATASET, DEFAULT_DATASET_CONFIG, RunOptions, TrainingOptions
from dynamax_lm_eval.types import ClassifierKind, StateMode

#: Prices of compute that are tried, in agreement per fraction.
PRICES = np.geomspace(0.02, 20, 60)
#: Thresholds of the curve that uses one at all exits.
SHARED = (*(round(0.02 * i, 2) for i in range(1, 50)), 0.985, 0.99, 0.995)
#: Reductions at which both are compared.
REDUCTIONS = (1.05, 1.1, 1.15, 1.2, 1.3, 1.5)
_DRAWS = 200
#: Tokens that run through the backbone at once.
_AT_ONCE = 2048


@dataclass(frozen=True)
class SearchOptions:
    """What is recorded, and where the result is written."""

    backbone: str = field(metadata={"help": "alias (smollm2-gguf, mistral, ...), Hub id, or folder"})
    output: str = field(default="exit-thresholds.json", metadata={"help": "file of the result"})
    exits: str | None = field(default=None, metadata={"help": "folder or Hub id of exits; default: the backbone's"})
    classifier: str | None = field(
        default=None, metadata={"help": f"one of {', '.join(get_args(ClassifierKind))}; default: the exits' first"}
    )
    state_mode: str = field(default="recompute", metadata={"help": "recompute, copy or skip; decides what exits cost"})
    dataset: str = field(
        default=DEFAULT_DATASET,
        metadata={
            "help": "a Hub id (streamed), a .txt, .jsonl(.gz) or .parquet file, a folder or pattern of such files; "
            "none that the exits were trained on, nor documents to calibrate on"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": f"of a Hub data set ({DEFAULT_DATASET_CONFIG} for the default one)"}
    )
    dataset_split: str = field(default="train", metadata={"help": "of a Hub data set"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    tokens: int = field(default=50_000, metadata={"help": "tokens to record; half are searched, half measure"})
    seq_len: int = field(default=256, metadata={"help": "longest row"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    device: str = field(default="auto", metadata={"help": "cpu, or auto: a GPU where there is one"})
    seed: int = field(default=0, metadata={"help": "of the split of texts"})
    trust_remote_code: bool = field(default=False, metadata={"help": "let the backbone's folder run its own code"})
    overwrite: bool = field(default=False, metadata={"help": "write over an existing file"})

    def __post_init__(self) -> None:
        for name, least in (("tokens", 100), ("seq_len", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        for name, known in (("state_mode", get_args(StateMode)), ("classifier", get_args(ClassifierKind))):
            given = getattr(self, name)
            if given is not None and given not in known:
                raise UserError(f"--{name} must be one of {', '.join(known)}, got {given!r}")


def command(options: SearchOptions) -> str:
    """Searches, and returns what the terminal shows."""
    return f"{table(search(options))}{options.output}\n"


def search(options: SearchOptions) -> ThresholdPath:
    """Records, searches and writes.

    Raises:
        UserError: an option cannot be honoured, there are no exits, or the file exists.
    """
    output = Path(options.output).expanduser()
    if output.exists() and not options.overwrite:
        raise UserError(f"{output} exists; choose another --output, or add --overwrite True")
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
    identity = loaded.identity
    exits = (
        checkpoint.open_exits(options.exits)
        if options.exits is not None
        else checkpoint.find(options.backbone, identity.fingerprint, loaded.former)
    )
    if exits is None:
        raise UserError(f"there are no exits for {options.backbone!r}; name some by --exits, or train them")
    exits.check_fits(identity.model_type, identity.hidden_size, identity.num_layers)
    exits.check_fingerprint(identity.fingerprint, former=loaded.former)
    kind = options.classifier or exits.config.classifiers[0]
    if kind not in exits.config.classifiers:
        raise UserError(
            f"--classifier {kind} is not among these exits, which have {', '.join(exits.config.classifiers)}"
        )
    rows, _ = data.held_out(
        data.text_documents(reading, options.dataset, loaded.tokenizer), options.tokens, options.seq_len, "--tokens"
    )
    backbone = loaded.engine.backbone
    backbone.check_state_mode(options.state_mode, exits.config.exit_layers)
    classifiers = exits.load(backbone.device)
    frozen = FrozenPass(backbone, exits.config.exit_layers, exits.config.final_block, exits.config.top_k)
    policy = policy_of_exits(exits.config, kind, 0.5, state_mode=options.state_mode, exit_scope="all")
    recorded = record(frozen, Engine(backbone, classifiers), rows, policy)
    found = compared(recorded, options.seed)
    result = ThresholdPath(
        backbone=identity.id,
        fingerprint=identity.fingerprint,
        scorer=kind,
        state_mode=options.state_mode,
        exit_layers=list(exits.config.exit_layers),
        tokens=recorded.confidence.shape[1],
        dataset=options.dataset,
        **found,
    )
    result.save(output)
    return result


def record(frozen: FrozenPass, engine: Engine, rows: Sequence[Sequence[int]], policy: ExitPolicy) -> Recorded:
    """Confidences and agreement of all tokens but each row's first, which may not leave."""
    assert engine.classifiers is not None and policy.classifier is not None
    seen = observe(frozen, engine.classifiers, rows, _AT_ONCE)
    row = np.repeat(np.arange(len(rows)), seen.lengths)
    inside = np.ones(len(row), dtype=np.bool_)
    inside[np.cumsum([0, *seen.lengths[:-1]])] = False
    agrees = np.vstack([seen.agrees, np.ones((1, len(row)), dtype=np.bool_)])
    return Recorded(
        seen.confidences[policy.classifier][:, inside],
        agrees[:, inside].astype(np.float64),
        exit_costs(engine, policy, int(np.median(seen.lengths))),
        row[inside],
    )


def exit_costs(engine: Engine, policy: ExitPolicy, length: int) -> Floats:
    """Fraction of compute (E + 1,) of a token that leaves at each exit, or at none, averaged over a row."""
    fractions = []
    for layer in (*policy.exit_layers, policy.num_layers):
        trace = Trace(1, length, length, (layer,) * (length - 1), generated=False)
        fractions.append(1 / engine.account(trace, policy).compute_reduction)
    return np.asarray(fractions)


def compared(recorded: Recorded, seed: int) -> dict[str, Any]:
    """Path, curve of shared thresholds and gains, as :class:`ThresholdPath` has them."""
    texts = int(recorded.row.max()) + 1
    searched = np.zeros(texts, dtype=np.bool_)
    searched[np.random.default_rng(seed).permutation(texts)[: texts // 2]] = True
    train, test = recorded.of_rows(searched), recorded.of_rows(~searched)
    path = best_path(train, PRICES)
    count = len(recorded.confidence)
    shared = [(threshold,) * count for threshold in sorted(SHARED, reverse=True)]
    both = {name: [_point(test, chosen) for chosen in found] for name, found in (("path", path), ("shared", shared))}
    return {**both, "gains": _gains(test, path, shared, seed)}


def _point(recorded: Recorded, thresholds: Sequence[float]) -> dict[str, Any]:
    agreement, fraction = outcome(recorded, np.asarray(thresholds))
    return {"thresholds": list(thresholds), "agreement": agreement, "compute_reduction": 1 / fraction}


def _gains(recorded: Recorded, path: Any, shared: Any, seed: int) -> list[dict[str, float]]:
    """Agreement of both curves at fixed reductions, with a standard error of the difference over texts."""
    sums = [np.stack([_by_text(recorded, np.asarray(chosen)) for chosen in curve]) for curve in (path, shared)]
    texts = sums[0].shape[2]
    generator = np.random.default_rng(seed)
    draws = [np.ones(texts), *generator.multinomial(texts, np.full(texts, 1 / texts), size=_DRAWS)]
    rows = []
    found = np.empty((len(draws), 2, len(REDUCTIONS)))
    for i, weights in enumerate(draws):
        for j, curve in enumerate(sums):
            tokens, right, cost = np.moveaxis(curve @ weights, 1, 0)  # (C,) each
            points = list(zip((right / tokens).tolist(), (cost / tokens).tolist(), strict=True))
            found[i, j] = [agreement_at(points, 1 / reduction) for reduction in REDUCTIONS]
    for k, reduction in enumerate(REDUCTIONS):
        per_exit, one = found[:, 0, k], found[:, 1, k]
        if np.isfinite(per_exit[0] - one[0]):
            rows.append(
                {
                    "compute_reduction": reduction,
                    "per_exit": float(per_exit[0]),
                    "shared": float(one[0]),
                    "gain": float(per_exit[0] - one[0]),
                    "gain_stderr": float(np.nanstd((per_exit - one)[1:], ddof=1)),
                }
            )
    return rows


def _by_text(recorded: Recorded, thresholds: Floats) -> Floats:
    """(3, texts): tokens, how many agree, and their compute, of every text."""
    left = exits_at(recorded, thresholds)
    right = recorded.agrees[left, np.arange(len(left))]
    parts = (np.ones(len(left)), right, recorded.cost[left])
    return np.stack([np.bincount(recorded.row, weights=part) for part in parts])


def table(found: ThresholdPath) -> str:
    """What thresholds per exit gain over one for all, on texts that were not searched."""
    headers = ["compute_reduction", "agreement, per exit", "agreement, shared", "gain", "standard error"]
    rows = [list(gain.values()) for gain in found.gains]
    text = tabulate(rows, headers, tablefmt="github", floatfmt=("g", ".4f", ".4f", ".4f", ".4f"))
    return f"{text}\n"
