"""What a frozen backbone says about a batch: hidden states at the exits, and which exits would have been right.

Runs the backbone block by block as the engine does, without gradients, on every token at full depth.
N tokens of a flat batch, n labelled positions, E exits, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.base import (
    LOGITS_AT_ONCE,
    Backbone,
    BoolArray,
    ForwardPass,
    IntArray,
    RowLayout,
    full_depth_layout,
    on_device,
)
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.exits.classifiers import Classifier, ExitClassifiers, exit_probability
from dynamax_lm_eval.exits.confirmers import best_two
from dynamax_lm_eval.frozen.read_out import Float32ReadOut
from dynamax_lm_eval.types import LabelKind, StateMode

FloatArray = npt.NDArray[np.float64]

#: Tokens of the vocabulary whose maximum is looked for first.
_BLOCK = 128
#: Logits held at once on a CPU, in elements: few enough for its caches, which halves the time.
_AT_ONCE_ON_CPU = 2**23


@dataclass(frozen=True)
class FrozenBatch:
    """The hidden states of a batch."""

    rows: RaggedRows
    row_of: IntArray  # (N,)
    first: Tensor  # (N, D) what block 1 is given
    exits: dict[int, Tensor]  # exit layer -> (N, D), what its classifier sees
    reads: dict[int, Tensor]  # exit layer -> (N, D), what its read-out sees: after the final block, if any
    last: Tensor  # (N, D) after block L
    #: Exit layer -> (N,) bool, the tokens that reach it, whose hidden states are those there; None: all do.
    reached: dict[int, Tensor] | None = None

    def reaching(self, layer: int, positions: Tensor) -> Tensor:
        """Returns which of positions (n,) reach an exit, (n,) bool."""
        if self.reached is None:
            return torch.ones(len(positions), dtype=torch.bool, device=positions.device)
        return self.reached[layer][positions]

    def classified(self, classifier: Classifier, layer: int, positions: Tensor) -> Tensor:
        """Returns the logits (n, 2) of a classifier at positions (n,); of no meaning where they do not reach it.

        A recurrent one runs over every token that reaches it.
        """
        hidden = self.exits[layer]
        if not classifier.recurrent:
            logits: Tensor = classifier(hidden[positions].float())[0]
            return logits
        if self.reached is None:
            whole: Tensor = classifier(hidden.float(), self.rows)[0]
            return whole[positions]
        tokens = self.reached[layer].nonzero()[:, 0]
        lengths = np.unique(self.row_of[tokens.cpu().numpy()], return_counts=True)[1]
        if len(lengths) == 0:
            return hidden.new_zeros(len(positions), 2, dtype=torch.float32)
        made: Tensor = classifier(hidden[tokens].float(), RaggedRows(lengths.tolist(), hidden.device))[0]
        spread = made.new_zeros(len(hidden), 2).index_copy(0, tokens, made)
        return spread[positions]


@dataclass(frozen=True)
class SimulatedExits:
    """Exits at which tokens leave while text is read, as in a run under one of several thresholds.

    What is seen at exits is then what a run sees: of the tokens that get there, with the states that others left.
    """

    classifiers: ExitClassifiers
    kind: str
    thresholds: FloatArray  # (R,)
    first: IntArray  # (R,) the first token of each row that may leave
    state_mode: StateMode

    def leaving(self, layer: int, hidden: Tensor, row_of: IntArray, places: IntArray) -> BoolArray:
        """Returns which tokens leave, of hidden states (n, D), rows (n,) and places in their rows (n,)."""
        lengths = np.unique(row_of, return_counts=True)[1].tolist()
        logits, _ = self.classifiers.at(self.kind, layer)(hidden.float(), RaggedRows(lengths, hidden.device))
        confidence = exit_probability(logits).cpu().numpy()
        leaves: BoolArray = (confidence >= self.thresholds[row_of]) & (places >= self.first[row_of])
        return leaves


@dataclass(frozen=True)
class Labels:
    """Whether the best token of each of E exits is right at n positions."""

    within_k: Tensor  # (E, n) bool, the label
    agrees: Tensor  # (E, n) bool, the exit's best token is the full model's
    divergence: Tensor | None = None  # (E,) mean KL of the full model's distribution to the exit's, if adapters learn
    two_best: Tensor | None = None  # (E, n, 2) probabilities of the exit's two best tokens, where they are wanted


def begin(backbone: Backbone, rows: Sequence[Sequence[int]], **changes: Any) -> tuple[ForwardPass, RowLayout, Tensor]:
    """Begins a pass of new rows at full depth; returns it, its layout, and the ids (N,) that it is to embed.

    ``changes``: fields of the layout that are otherwise.
    """
    lengths = [len(row) for row in rows]
    states = backbone.new_states(sum(lengths))
    slots = [states.allocate_row(length) for length in lengths]
    layout = replace(full_depth_layout(slots, lengths, backbone.num_layers), **changes)
    ids = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
    return backbone.start_pass(states, layout), layout, ids.to(backbone.device)


class FrozenPass:
    """Runs batches through the backbone and labels positions."""

    def __init__(
        self,
        backbone: Backbone,
        exit_layers: tuple[int, ...],
        final_block: bool,
        top_k: int,
        label: LabelKind = "exit_in_full",
        label_final_block: bool = True,
    ) -> None:
        """
        Args:
            backbone: the frozen model.
            exit_layers: where tokens may leave.
            final_block: block L runs before read-outs at exits.
            top_k: k of the label.
            label: which tokens are looked for among which.
            label_final_block: labels are made of these read-outs; else, with a final block, of the state at the exit.
        """
        self.backbone = backbone
        self.read_out = Float32ReadOut(backbone)
        self.dtype = backbone.embed(torch.zeros(1, dtype=torch.int64, device=backbone.device)).dtype
        self.exit_layers = exit_layers
        self.final_block = final_block
        self.top_k = top_k
        self._label_kind = label
        self._labels_at_exit = final_block and not label_final_block

    @property
    def read_at_once(self) -> int:
        """The number of tokens whose logits are held at once."""
        elements = _AT_ONCE_ON_CPU if self.backbone.device.type == "cpu" else LOGITS_AT_ONCE
        return max(1, elements // self.backbone.vocab_size)

    @torch.no_grad()
    def run(self, rows: Sequence[Sequence[int]], simulated: SimulatedExits | None = None) -> FrozenBatch:
        """Returns hidden states of rows of token ids.

        Args:
            rows: the token ids.
            simulated: exits at which tokens leave; None: all run at full depth. ``last`` is of full depth in any case.
                Without a final block only.

        With ``final_block`` the read-outs are those of a text in which every token leaves at the same exit.

        Raises:
            UserError: the backbone does not know an id.
        """
        for row in rows:
            self.backbone.check_ids(row)
        batch = self._run(rows, None)
        return batch if simulated is None else replace(self._run(rows, simulated), last=batch.last)

    def _run(self, rows: Sequence[Sequence[int]], simulated: SimulatedExits | None) -> FrozenBatch:
        backbone = self.backbone
        changes: dict[str, Any] = {}
        if simulated is not None:
            changes = {"state_modes": (simulated.state_mode,) * len(rows), "exit_layers": tuple(self.exit_layers)}
        run, layout, ids = begin(backbone, rows, **changes)
        total = len(ids)
        tokens, reached = np.arange(total), dict[int, Tensor]()
        if simulated is not None:
            run.state_maps = simulated.classifiers.maps_by_exit_and_block()
        with backbone.running():
            first = hidden = run.embed(ids)
            exits = {}
            for block in range(1, backbone.num_layers + 1):
                hidden = run.run_block(block, tokens, hidden)
                if block not in self.exit_layers:
                    continue
                if simulated is None:
                    exits[block] = hidden[0]
                    continue
                here = on_device(tokens, hidden.device)
                exits[block] = hidden.new_zeros(total, hidden.shape[-1]).index_copy_(0, here, hidden[0])
                reached[block] = torch.zeros(total, dtype=torch.bool, device=hidden.device).index_fill_(0, here, True)
                if len(tokens):
                    leaves = simulated.leaving(block, hidden[0], layout.row_of[tokens], layout.positions[tokens])
                    left, kept = np.flatnonzero(leaves), np.flatnonzero(~leaves)
                    run.exit_tokens(tokens[left], hidden[:, on_device(left, hidden.device)], block)
                    tokens, hidden = tokens[kept], hidden[:, on_device(kept, hidden.device)]
            reads = dict(exits)
            if self.final_block:
                for layer, state in exits.items():
                    reads[layer] = run.run_block(backbone.num_layers, tokens, state.unsqueeze(0))[0]
        return FrozenBatch(
            RaggedRows([len(row) for row in rows], backbone.device),
            layout.row_of,
            first[0],
            exits,
            reads,
            hidden[0],
            reached or None,
        )

    @torch.no_grad()
    def label(
        self,
        batch: FrozenBatch,
        positions: Tensor,
        exits: ExitClassifiers | None = None,
        learn: Sequence[float] | None = None,
        two_best: bool = False,
    ) -> Labels:
        """Returns labels at ``positions`` (n,), of read-outs in float32; False at exits that a position does not reach.

        Args:
            batch: what the backbone computed.
            positions: (n,)
            exits: their adapters, if any, correct the read-outs.
            learn: weights (E,) of the exits' KL divergences; their gradients are added to the adapters'. None: the
                adapters stay as they are.
            two_best: give the probabilities of the read-outs' two best tokens, too.
        """
        k_of_full, k_of_exit = (self.top_k, 1) if self._label_kind == "exit_in_full" else (1, self.top_k)
        within, agrees = [], []
        surest = torch.zeros(len(self.exit_layers), len(positions), 2, device=positions.device) if two_best else None
        divergence = torch.zeros(len(self.exit_layers), device=positions.device)
        begins = 0
        for part in positions.split(self.read_at_once):
            full = self.read_out(batch.last[part])  # (t, V)
            best = best_tokens(full, k_of_full)  # (t, k)
            target = Target.of(full) if learn is not None else None
            right = torch.zeros(len(self.exit_layers), len(part), dtype=torch.bool, device=part.device)
            same = torch.zeros_like(right)
            for i, layer in enumerate(self.exit_layers):
                reached = batch.reaching(layer, part)
                chosen = part if batch.reached is None else part[reached]
                hidden = batch.reads[layer][chosen]
                adapter = None if exits is None else exits.adapter(layer)
                if len(chosen) == 0:
                    continue
                if adapter is None or target is None or learn is None:
                    logits = self.read_out(hidden, adapter)
                else:
                    with torch.enable_grad():
                        logits = self.read_out(hidden, adapter)
                    own = target if batch.reached is None else Target.of(full[reached])
                    divergence[i] += descend(logits, own, learn[i] / len(positions)) / len(positions)
                own_best = best[reached]
                found = best_tokens(logits.detach(), k_of_exit)  # of those that reach it, (.., k)
                same[i, reached] = found[:, 0] == own_best[:, 0]
                if surest is not None:
                    surest[i, begins : begins + len(part)][reached] = best_two(logits.detach())
                if self._labels_at_exit:
                    found = best_tokens(self.read_out(batch.exits[layer][chosen]), k_of_exit)
                # One of the two has a single token.
                right[i, reached] = (found == own_best).any(-1)
            agrees.append(same)
            within.append(right)
            begins += len(part)
        learned = divergence if learn is not None else None
        return Labels(torch.cat(within, dim=1), torch.cat(agrees, dim=1), learned, surest)


@dataclass(frozen=True)
class Target:
    """The full model's distribution at t positions, which read-outs are drawn to."""

    probabilities: Tensor  # (t, V) float32
    negative_entropy: Tensor  # (), summed over positions

    @classmethod
    def of(cls, logits: Tensor) -> Target:
        logits = logits.float()
        probabilities = logits.softmax(-1)
        return cls(probabilities, _expected_log_probability(probabilities, logits))


def descend(logits: Tensor, target: Target, weight: float) -> Tensor:
    """Adds the gradient of ``weight`` * sum of KL(target || softmax(logits)) to what made the logits (t, V).

    That gradient is softmax(logits) - target, so nothing of size V needs to be kept for it. Returns the sum.
    """
    own = logits.detach().float()
    gradient = own.softmax(-1).sub_(target.probabilities).mul_(weight)
    logits.backward(gradient.to(logits.dtype))
    return target.negative_entropy - _expected_log_probability(target.probabilities, own)


def _expected_log_probability(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Returns the sum over positions and vocabulary of p log softmax(logits), without a tensor of log-probabilities."""
    return torch.dot(probabilities.flatten(), logits.flatten()) - logits.logsumexp(-1).sum()


def best_tokens(logits: Tensor, k: int) -> Tensor:
    """Returns the k most probable tokens (t, k), best first, of logits (t, V).

    It takes two steps, block maxima and then the best blocks: on a CPU several times as fast as ``topk`` over V.
    """
    size = logits.shape[-1]
    if k >= size // _BLOCK:
        return logits.topk(min(k, size), dim=-1).indices
    if size % _BLOCK:
        logits = F.pad(logits, (0, -size % _BLOCK), value=-torch.inf)
    blocks: Tensor = logits.unflatten(-1, (-1, _BLOCK))  # (t, b, _BLOCK)
    # The k best tokens lie in the k blocks with the largest maxima.
    best_blocks = blocks.amax(-1).topk(k, dim=-1).indices  # (t, k)
    inside = blocks.gather(1, best_blocks.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)  # (t, k * _BLOCK)
    places = inside.topk(k, dim=-1).indices
    return best_blocks.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK
