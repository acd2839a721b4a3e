"""The accounting of compute: what each request ran, what that costs, and sums over documents.

A :class:`~dynamax_lm_eval.compute.trace.Trace` says which tokens ran how deep; :func:`account` turns it into a
:class:`ComputeRecord`, which adds up and travels as JSON. The ratios are made from sums, at the very end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.compute.cost import BackboneCost, ExitCost
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.compute.verified import VerifiedTrace, cost_of

#: Version of the accounting rules; raise it when a number changes its meaning.
ACCOUNTING = "dynamax-macs-1"
SCHEMA_VERSION = 1


@dataclass
class ComputeRecord:
    """The tokens and MACs of one request, or the sum over several. All counts are of logical tokens."""

    responses: int = 0
    prompt_tokens: int = 0
    fed_tokens: int = 0
    eligible_tokens: int = 0
    scored_tokens: int = 0
    generations: int = 0
    generated_tokens: int = 0
    hit_limit: int = 0
    #: Generations that end in repetition.
    degenerate: int = 0
    #: Block MACs of the whole backbone for the eligible tokens: the numerator of compute_reduction.
    full_macs: int = 0
    #: Block MACs spent on the eligible tokens.
    block_macs: int = 0
    #: MACs that exits caused, by part.
    classifier_macs: int = 0
    recompute_macs: int = 0
    adapter_macs: int = 0
    lm_head_macs: int = 0
    #: Both sides with the prompt and one LM-head read per output token.
    full_total_macs: int = 0
    total_macs: int = 0
    #: The eligible tokens in the paper's unit of one block.
    paper_full: float = 0.0
    paper_spent: float = 0.0
    #: How often the full model verified drafts.
    verifications: int = 0
    #: Weights of blocks and read-outs that generations would read alone: theirs, and the full model's.
    weights_read: int = 0
    full_weights_read: int = 0
    #: Exit layer of every eligible token, one list per response.
    exit_layers: list[list[int]] = field(default_factory=list)
    #: Of each response that has any, of each eligible token that gave a generated one, the confidence at each exit that
    #: it came to (None: not asked), rounded; not part of what makes records equal.
    confidences: list[Sequence[Sequence[float | None]]] = field(default_factory=list, compare=False)
    #: Exits that drafted, one list per response that has any; and those of them whose drafts stand.
    drafts: list[list[int]] = field(default_factory=list)
    right_drafts: list[list[int]] = field(default_factory=list)

    @property
    def drafted_tokens(self) -> int:
        """How many tokens exits drafted."""
        return sum(map(len, self.drafts))

    @property
    def accepted_drafts(self) -> int:
        """How many of them stand."""
        return sum(map(len, self.right_drafts))

    @property
    def exit_macs(self) -> int:
        """The MACs of everything that exits caused."""
        return self.classifier_macs + self.recompute_macs + self.adapter_macs + self.lm_head_macs

    @property
    def spent_macs(self) -> int:
        """The denominator of compute_reduction."""
        return self.block_macs + self.exit_macs

    @property
    def compute_reduction(self) -> float:
        """The block MACs of the full backbone over the MACs spent, for eligible tokens; 1 without any."""
        # Classifiers that saw warm-up tokens alone cost something where nothing could be saved; that is no reduction.
        return _ratio(self.full_macs, self.spent_macs) if self.eligible_tokens else 1.0

    @property
    def compute_reduction_total(self) -> float:
        """The reduction with prompt tokens and LM head on both sides: what a user saves."""
        return _ratio(self.full_total_macs, self.total_macs)

    @property
    def compute_reduction_paper(self) -> float:
        """The reduction of the eligible tokens by the paper's cost table."""
        return _ratio(self.paper_full, self.paper_spent) if self.eligible_tokens else 1.0

    @property
    def mean_exit_layer(self) -> float | None:
        """The mean number of blocks that eligible tokens ran through; None without any."""
        layers = [layer for response in self.exit_layers for layer in response]
        return sum(layers) / len(layers) if layers else None

    @classmethod
    def sum(cls, records: Iterable[ComputeRecord]) -> ComputeRecord:
        """Returns the sum of records; the lists of exit layers are joined in order."""
        records = list(records)
        total = cls()
        for item in fields(cls):
            if item.name in ("exit_layers", "confidences", "drafts", "right_drafts"):
                setattr(total, item.name, [layers for record in records for layers in getattr(record, item.name)])
            else:
                setattr(total, item.name, sum(getattr(record, item.name) for record in records))
        return total

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ComputeRecord:
        return cls(**data)


def merge(rows: Iterable[ComputeRecord]) -> ComputeRecord:
    """Returns the record of one response that was made of several rows: a text that was scored in windows."""
    record = ComputeRecord.sum(rows)
    record.responses = 1
    record.exit_layers = [[layer for row in record.exit_layers for layer in row]]
    return record


def account(trace: Trace, exit_cost: ExitCost, cost: BackboneCost) -> ComputeRecord:
    """Returns what one row cost, as if it ran alone."""
    if trace.verified is not None:
        return _account_verified(trace, trace.verified, exit_cost, cost)
    depth, pruned = cost.num_layers, exit_cost.pruned_blocks
    layers = np.asarray(trace.exit_layers, dtype=np.int64)
    full_depth = np.full_like(layers, depth)
    positions = np.arange(exit_cost.first_eligible, exit_cost.first_eligible + len(layers), dtype=np.int64)
    # All other tokens run at full depth, less the pruned blocks (if these are pruned there), or leave with the prompt.
    others = np.setdiff1d(np.arange(trace.fed_tokens, dtype=np.int64), positions)
    leaving, prompt_layer = exit_cost.prompt_exit
    others_depth = np.where(others < leaving, prompt_layer, depth)

    # Every LM-head read counts but the one whose logits give the token; after a final block it is another read, and
    # one of a part of the vocabulary gives none.
    evaluations = exit_cost.evaluations(layers)
    gives_token = (positions >= trace.prompt_tokens - 1) & (not exit_cost.final_block)
    reads = int((evaluations - (gives_token & (layers < depth))).sum()) if exit_cost.reads_lm_head else 0
    partial_reads = exit_cost.classifier_total(exit_cost.partial_read_macs, evaluations)
    classifier = exit_cost.classifier_total(exit_cost.classifier_macs, evaluations)

    # A confidence made of logits corrects the state at every evaluation, any other only where a token is read out.
    adapter = 0
    if exit_cost.adapter_macs:
        if exit_cost.evaluates_logits:
            adapter = int(np.cumsum([0, *exit_cost.adapter_macs])[evaluations].sum())
        else:
            read_out = layers[gives_token & (layers < depth)]
            adapter = int(
                np.asarray(exit_cost.adapter_macs)[np.searchsorted(exit_cost.evaluated_layers, read_out)].sum()
            )

    refused_reads, refused_adapters = exit_cost.refused_macs(np.asarray(trace.refused, dtype=np.int64))
    if exit_cost.reads_to_confirm_alone:
        refused_reads += int((layers < depth).sum()) * exit_cost.confirm_read_macs
    partial_reads, adapter = partial_reads + refused_reads, adapter + refused_adapters
    # Where pruned blocks run for the prompt, its last token, which gives the first logits, is read out as it is.
    through_adapter = int((positions >= trace.prompt_tokens - 1).sum())
    adapter += through_adapter * exit_cost.prune_adapter_macs
    of_prompt = 0 if exit_cost.prunes_eligible_only else trace.num_output_tokens - through_adapter
    adapter_of_prompt = of_prompt * exit_cost.prune_adapter_macs

    runs_last = exit_cost.final_block and depth not in pruned
    recompute, recompute_units, recompute_of_others = 0, 0.0, 0
    if exit_cost.recomputes_state:
        # Block L writes its own state where it runs after the exit.
        without = pruned | {depth} if exit_cost.final_block else pruned
        added = exit_cost.state_map_macs or (0,) * depth
        per_block = [block.state_recompute + more for block, more in zip(cost.blocks, added, strict=True)]
        recompute = int(cost.skipped_sum(per_block, layers, without).sum())
        recompute_of_others = int(cost.skipped_sum(per_block, others_depth, without).sum())
        recompute_units = float(cost.skipped_sum([b.paper_recompute for b in cost.blocks], layers, without).sum())
    block_macs = int(cost.block_macs(positions, layers, pruned).sum())
    if runs_last:
        block_macs += int(cost.last_block_macs(positions[layers < depth]).sum())

    record = ComputeRecord(
        responses=1,
        generations=int(trace.generated),
        exit_layers=[list(trace.exit_layers)],
        confidences=[trace.confidences] if trace.confidences else [],
        prompt_tokens=trace.prompt_tokens,
        fed_tokens=trace.fed_tokens,
        eligible_tokens=len(layers),
        scored_tokens=0 if trace.generated else trace.num_output_tokens,
        generated_tokens=trace.num_output_tokens if trace.generated else 0,
        hit_limit=int(trace.hit_limit),
        full_macs=int(cost.block_macs(positions, full_depth, frozenset()).sum()),
        block_macs=block_macs,
        classifier_macs=classifier,
        recompute_macs=recompute,
        adapter_macs=adapter,
        lm_head_macs=reads * cost.lm_head + partial_reads,
    )
    output_reads = trace.num_output_tokens * cost.lm_head
    others_full = int(cost.block_macs(others, np.full_like(others, depth), frozenset()).sum())
    pruned_for_others = frozenset[int]() if exit_cost.prunes_eligible_only else pruned
    others_spent = int(cost.block_macs(others, others_depth, pruned_for_others).sum()) + recompute_of_others
    others_spent += adapter_of_prompt
    record.full_total_macs = record.full_macs + others_full + output_reads
    record.total_macs = record.spent_macs + others_spent + output_reads

    ran = sum(int((layers >= block).sum()) for block in range(1, depth + 1) if block not in pruned)
    ran += int((layers < depth).sum()) if runs_last else 0
    # In the paper's table a classifier costs its weights over a block's, and the linear one nothing.
    overhead = exit_cost.classifier_total(exit_cost.classifier_paper_weights, evaluations)
    overhead += record.adapter_macs + record.lm_head_macs
    record.paper_full = float(depth * len(layers))
    record.paper_spent = ran + recompute_units + overhead / cost.mean_block_weights
    if trace.generated:
        _add_weights(record, trace, exit_cost, cost, positions, layers)
        record.weights_read += adapter_of_prompt
    return record


def _add_weights(
    record: ComputeRecord,
    trace: Trace,
    exit_cost: ExitCost,
    cost: BackboneCost,
    positions: npt.NDArray[np.int64],
    layers: npt.NDArray[np.int64],
) -> None:
    """Adds the weights that a generation alone reads: for its prompt once, and for every token that it feeds after it.

    States of tokens that left are made when a later token runs the block, whose weights are read for that one.
    """
    weights = [block.weights for block in cost.blocks]
    kept = [0 if i in exit_cost.pruned_blocks else value for i, value in enumerate(weights, start=1)]
    fed = positions >= trace.prompt_tokens
    blocks = int(np.cumsum([0, *kept])[layers[fed]].sum())
    if exit_cost.final_block:
        blocks += int((layers[fed] < cost.num_layers).sum()) * kept[-1]
    prompt = sum(weights) if exit_cost.prunes_eligible_only else sum(kept)
    evaluations = exit_cost.evaluations(layers[fed])
    classifiers = int(np.cumsum([0, *exit_cost.classifier_macs])[evaluations].sum())
    output_reads = trace.num_output_tokens * cost.lm_head
    record.weights_read = prompt + blocks + output_reads + classifiers + record.adapter_macs + record.lm_head_macs
    record.full_weights_read = (1 + trace.fed_tokens - trace.prompt_tokens) * sum(weights) + output_reads


def _account_verified(trace: Trace, verified: VerifiedTrace, exit_cost: ExitCost, cost: BackboneCost) -> ComputeRecord:
    """Returns what a row cost whose exits are drafts: the full model's row, with what was spent on its tokens."""
    depth = cost.num_layers
    nothing = ExitCost((), (), False, False, frozenset(), exit_cost.first_eligible)
    full = replace(trace, exit_layers=(depth,) * len(trace.exit_layers), refused=(), verified=None)
    record, spent = account(full, nothing, cost), cost_of(verified, exit_cost, cost)
    record.exit_layers = [list(trace.exit_layers)]
    record.block_macs, record.classifier_macs = spent.block_macs, spent.classifier_macs
    record.adapter_macs, record.lm_head_macs = spent.adapter_macs, spent.lm_head_macs
    record.total_macs += record.spent_macs - record.full_macs
    overhead = spent.paper_weights + record.adapter_macs + record.lm_head_macs
    record.paper_spent = depth * len(verified.fed) + overhead / cost.mean_block_weights
    record.verifications = verified.verifications
    if verified.drafts:
        record.drafts, record.right_drafts = [list(verified.drafts)], [list(verified.right_drafts)]
    prompt = sum(block.weights for block in cost.blocks) + cost.lm_head
    record.weights_read = prompt + spent.weights_read
    return record


@dataclass
class ExecutedCompute:
    """The compute that was really executed.

    A prefix that requests share runs once; counts of logical tokens have it in each of them.
    """

    fed_tokens: int = 0
    macs: int = 0

    def add_row(self, record: ComputeRecord) -> None:
        """Adds a row as if all of it ran."""
        self.fed_tokens += record.fed_tokens
        self.macs += record.total_macs

    def add_prefix(self, record: ComputeRecord, uses: int) -> None:
        """Adds a prefix that ran once, in place of the ``uses`` times that rows and longer prefixes count it."""
        self.fed_tokens += (1 - uses) * record.fed_tokens
        self.macs += (1 - uses) * record.total_macs

    @classmethod
    def sum(cls, parts: Iterable[ExecutedCompute]) -> ExecutedCompute:
        parts = list(parts)
        return cls(sum(part.fed_tokens for part in parts), sum(part.macs for part in parts))

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def reduction_stderr(tasks: Iterable[Sequence[ComputeRecord]]) -> float | None:
    """Returns the standard error of compute_reduction over documents; ``tasks``: the documents' records, by task.

    As :func:`ratio_stderr` says; None too where nothing was eligible.
    """
    return ratio_stderr([[(record.full_macs, record.spent_macs) for record in records] for records in tasks])


def total_reduction_stderr(tasks: Iterable[Sequence[ComputeRecord]]) -> float | None:
    """Returns the standard error of compute_reduction_total, as :func:`reduction_stderr`."""
    return ratio_stderr([[(record.full_total_macs, record.total_macs) for record in records] for records in tasks])


def ratio_stderr(tasks: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """Returns the standard error of a ratio of sums over documents, by the delta method, with tasks as strata.

    With a and b the numerator and denominator of a document, R = sum a / sum b and d = a - R b it is
    sqrt(sum over tasks of n / (n - 1) * sum (d - mean of the task's d)^2) / sum b (Cochran, Sampling Techniques,
    section 6.11, the combined ratio estimate, without finite-population correction): a group always has the same
    tasks, so how these differ is no chance. For one task the mean of d is 0. None where a task has fewer than two
    documents, or the denominator is 0.

    Args:
        tasks: (a, b) of each document, by task.
    """
    tasks = [pairs for pairs in tasks if pairs]
    denominator = sum(b for pairs in tasks for _, b in pairs)
    if denominator == 0 or any(len(pairs) < 2 for pairs in tasks):
        return None
    ratio = sum(a for pairs in tasks for a, _ in pairs) / denominator
    variance = 0.0
    for pairs in tasks:
        residuals = [a - ratio * b for a, b in pairs]
        mean = math.fsum(residuals) / len(residuals)
        variance += len(pairs) / (len(pairs) - 1) * math.fsum((residual - mean) ** 2 for residual in residuals)
    return math.sqrt(variance) / denominator


def exit_histogram(record: ComputeRecord) -> dict[str, int]:
    """Returns the number of eligible tokens by the layer at which they left, in order of layer."""
    counts = Counter(layer for response in record.exit_layers for layer in response)
    return {str(layer): counts[layer] for layer in sorted(counts)}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 1.0
