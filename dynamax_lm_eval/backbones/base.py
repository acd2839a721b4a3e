"""The interface of a backbone: embed, run one block on some tokens, let tokens exit, read out.

The interface is the same for every architecture; what a block keeps of the past (K and V, or conv and SSM
states) is the business of the backbone's :class:`States`. Nothing here knows exit policies, requests or
tokenizers. A row's ``slot`` is its place in the states; ``kv_slots`` are the places of single tokens in a K/V cache.

Shapes: N tokens of a flat batch (rows one after the other, without padding), n of them in flight,
R rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones.learned import StateMaps, StateProjection
from dynamax_lm_eval.backbones.segments import SegmentOutput, StaticSegments
from dynamax_lm_eval.compute.cost import BackboneCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models.placement import Place, moved
from dynamax_lm_eval.types import MambaKernels, StateMode

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

#: Logits held at once, in elements (tokens * V): 128 MiB in float32.
LOGITS_AT_ONCE = 2**25


#: Why blocks do not run in segments that have no form for it.
ONE_BY_ONE = "blocks of a kind that runs one by one"


def on_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Returns an array as a tensor on ``device``; nobody waits for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    # A copy from memory that is not pinned waits for all that the GPU was asked before.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def together_on_device(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Returns arrays (n,) of one dtype as tensors on ``device``; for a GPU in one copy."""
    if device.type != "cuda":
        return [on_device(values, device) for values in arrays]
    return list(on_device(np.concatenate(arrays), device).split([len(values) for values in arrays]))


@dataclass(frozen=True)
class RowLayout:
    """The rows and positions of the N tokens of a flat batch.

    Tokens of one row stand side by side, in rising order of position. ``runs_block[r, b]`` is False where
    row r has block b pruned; column 0 is unused because blocks are counted from 1. Tokens before position
    ``prunes_from[r]`` run all blocks.
    """

    slots: tuple[int, ...]  # R; the row's place in the States
    row_of: IntArray  # (N,) index into slots
    positions: IntArray  # (N,)
    state_modes: tuple[StateMode, ...]  # R
    runs_block: BoolArray  # (R, L + 1)
    exit_layers: tuple[int, ...]  # every layer at which some row may exit
    final_block: BoolArray  # (R,) rows whose tokens run block L after an exit
    prunes_from: IntArray  # (R,)
    #: (N,) how many tokens of its row before each of them may yet be taken back; None: none of any row.
    drafted: IntArray | None = None

    def runs(self, tokens: IntArray, blocks: int | slice) -> BoolArray:
        """Returns whether tokens (t,) have no pruned block there, (t,); for several blocks (t, blocks)."""
        rows = self.row_of[tokens]
        is_before = self.positions[tokens] < self.prunes_from[rows]
        runs: BoolArray = self.runs_block[rows, blocks]
        return runs | (is_before if runs.ndim == 1 else is_before[:, np.newaxis])

    def is_given_states(self, block: int, rows: IntArray) -> BoolArray:
        """Returns whether ``block`` is given the states of tokens of ``rows`` (m,) that left before it, (m,).

        It is not where it is pruned, or is a final block, which runs on them itself.
        """
        runs: BoolArray = self.runs_block[rows, block]
        return runs & ~self.final_block[rows] if block == self.runs_block.shape[1] - 1 else runs


def full_depth_layout(slots: Sequence[int | None], lengths: Sequence[int], num_layers: int) -> RowLayout:
    """Returns the layout of new rows with ``lengths`` tokens that run every block and never exit."""
    row_slots = tuple(slot for slot in slots if slot is not None)
    assert len(row_slots) == len(lengths), "the states were made for these rows"
    return RowLayout(
        slots=row_slots,
        row_of=np.repeat(np.arange(len(lengths), dtype=np.int64), lengths),
        positions=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        state_modes=tuple("recompute" for _ in lengths),
        runs_block=np.ones((len(lengths), num_layers + 1), dtype=np.bool_),
        exit_layers=(),
        final_block=np.zeros(len(lengths), dtype=np.bool_),
        prunes_from=np.zeros(len(lengths), dtype=np.int64),
    )


class FinalParts(NamedTuple):
    """What a read-out of hidden states consists of, where it is these and nothing else."""

    norm: nn.Module
    head: nn.Module
    #: c of c * tanh(logits / c); None: logits as they are.
    softcap: float | None = None


class States(ABC):
    """The states that blocks keep of the tokens seen so far, for several rows."""

    #: What runs several blocks in one call on these states; None: nothing does.
    segments: StaticSegments | None = None

    def use_segments(self, segments: StaticSegments) -> None:
        """Lets passes run several blocks in one call; before any row is allocated."""
        self.segments = segments

    @abstractmethod
    def allocate_row(self, capacity: int) -> int | None:
        """Allocates a row of up to ``capacity`` tokens and returns its slot; None where there is no memory now."""

    @abstractmethod
    def free_row(self, slot: int) -> None:
        """Frees the memory of a row."""

    @abstractmethod
    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        """Gives a new row the states of another, which has seen ``num_tokens`` tokens."""

    @abstractmethod
    def keep(self, slot: int, num_tokens: int) -> bool:
        """Keeps the states of a row, which has seen ``num_tokens`` tokens, for later rows that begin with them.

        All that is kept at a time are prefixes of one another, identified by their lengths.

        Returns:
            False where there is no memory for it; rows lose none.
        """

    @abstractmethod
    def give(self, num_tokens: int, slot: int) -> None:
        """Gives a new row the states that are kept of a prefix of ``num_tokens`` tokens."""

    @abstractmethod
    def forget(self, num_tokens: int) -> None:
        """Drops the states that are kept of a prefix of ``num_tokens`` tokens."""

    def settle(self, slot: int, kept: int | None) -> None:  # noqa: B027 (what is addressed by position is overwritten)
        """Takes a row back to after the first ``kept`` of its drafted tokens, or keeps all; none are drafts then.

        All of them have run every block. Only where ``Backbone.takes_back``.

        Args:
            slot: of the row.
            kept: at least 1; None: all.
        """


class KeptInRows(States):
    """States that keep a prefix in a row of its own."""

    def __init__(self) -> None:
        self._kept: dict[int, int] = {}  # tokens of a kept prefix -> slot

    def keep(self, slot: int, num_tokens: int) -> bool:
        kept = self.allocate_row(num_tokens)
        if kept is None:
            return False
        self.copy_row(slot, kept, num_tokens)
        self._kept[num_tokens] = kept
        return True

    def give(self, num_tokens: int, slot: int) -> None:
        self.copy_row(self._kept[num_tokens], slot, num_tokens)

    def forget(self, num_tokens: int) -> None:
        self.free_row(self._kept.pop(num_tokens))


class ForwardPass(ABC):
    """One pass of a flat batch through the blocks, in order.

    A pass with ``materialize_all`` defers nothing: every block has the states of all its tokens at the end. Others may
    defer the states of tokens that left until a later token of their row needs them.
    """

    _backbone: Backbone
    #: What predicts the states of tokens that left, of rows whose state mode is ``learned``; set by who trained it.
    state_maps: StateMaps = MappingProxyType({})

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Returns the hidden states (1, N, D) of the batch's token ids (N,); called once, before any block."""

    def run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        """Runs one block on the tokens in flight, after giving it the states of those that have left.

        Args:
            block: 1-based.
            tokens: (n,) indices into the flat batch, rising; may be empty.
            hidden: (1, n, D) their hidden states, on any device.

        Returns:
            (1, n, D) on the block's device.
        """
        place = self._backbone.places[block - 1]
        with place.weights():
            return self._run_block(block, tokens, moved(hidden, place.device))

    @abstractmethod
    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        """Runs a block whose weights are on the device of ``hidden``; see :meth:`run_block`."""

    def state_projection(self, block: int, hidden: Tensor) -> StateProjection:
        """Returns how a block makes the states of all tokens of the batch, had they left with ``hidden`` (1, N, D).

        Only where ``state_mode=learned`` can be had.
        """
        raise NotImplementedError

    def run_segment(self, first: int, last: int, tokens: IntArray, hidden: Tensor) -> SegmentOutput | str:
        """Runs the blocks from ``first`` to ``last`` on the tokens in flight, each of which is alone in its row.

        Rows that prune a block do not run it. Only where the states have segments and some are not deferred.

        Returns:
            what :meth:`run_block` would make of the tokens; or why this pass cannot, in a few words, in which case
            nothing was done.
        """
        return ONE_BY_ONE

    @abstractmethod
    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        """Lets tokens exit after ``layer`` blocks; their rows' state modes say what the later blocks get.

        Rows with a final block run block L on them afterwards, so that block is given nothing.

        Args:
            tokens: (m,) indices into the flat batch.
            hidden: (1, m, D) their hidden states at the exit.
            layer: the number of blocks that have run.
        """

    @property
    @abstractmethod
    def has_pending_states(self) -> bool:
        """Whether later blocks have to be given states of tokens that left, before the pass ends."""


class Backbone(ABC):
    """A frozen causal language model of ``num_layers`` blocks."""

    #: The name of the model's class.
    name: str
    #: How the blocks are run: a key of ``backbones.rungs``, or ``mixed`` for what is ``flat`` with recurrent modules.
    rung: str
    #: Whether a pass may begin at any block with the hidden states of tokens that have run through those before it.
    resumes = False
    #: Whether tokens that left may go on in a later pass, in which their row may be taken back to before some of them.
    takes_back = False
    #: The model of transformers, without adapters around it.
    model: Any
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_embeddings: int
    cost: BackboneCost
    #: Where the embeddings are, and where token ids go.
    device: torch.device
    #: Where each block computes; its states are there too.
    places: Sequence[Place]
    #: Where the LM head is, and where logits are.
    output_device: torch.device
    #: What runs the scans of Mamba mixers, those of exit classifiers too.
    mamba_kernels: MambaKernels = "auto"
    #: The packages whose scans run its Mamba mixers; None: it has none that are run here.
    scans_by: str | None = None

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises UserError where there are token ids without an embedding."""
        largest = max(ids, default=0)
        if largest >= self.num_embeddings:
            raise UserError(
                f"the tokenizer makes token ids up to {largest}, but the backbone has only {self.num_embeddings} "
                "embeddings; give the tokenizer that belongs to it (evaluations take tokenizer=)"
            )

    @abstractmethod
    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> States:
        """Makes states for rows of ``capacity`` tokens in all, and for kept prefixes of ``prefix_capacity`` more.

        ``row_stride``: every row gets so many KV slots, so that rows that decode together can be addressed as one.
        """

    @abstractmethod
    def start_pass(self, states: States, layout: RowLayout, materialize_all: bool = False) -> ForwardPass:
        """Prepares a pass; the rows' earlier tokens must be in ``states``."""

    def running(self) -> AbstractContextManager[None]:
        """Returns the context in which blocks run; outside it the model behaves as its authors wrote it."""
        return nullcontext()

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Returns the hidden states (1, N, D) of token ids (N,) that stand alone."""

    @abstractmethod
    def readout(self, hidden: Tensor) -> Tensor:
        """Returns the logits (T, V) of hidden states (T, D), by final norm and LM head."""

    def readout_of(self, hidden: Tensor, first: int, others: Tensor) -> Tensor:
        """Returns the logits (T, first + o) of tokens 0..first - 1 and of ``others`` (o,), for hidden states (T, D).

        Only where :meth:`check_readout_of` raises nothing.
        """
        raise NotImplementedError

    @property
    def final_parts(self) -> FinalParts | None:
        """What :meth:`readout` consists of; None where that is not known."""
        return None

    def check_readout_of(self) -> None:
        """Raises UserError where logits of some tokens cannot be had without those of all."""
        raise UserError(
            f"vocab_subset is not possible on {self.name}: its read-out is not a norm and a linear LM head whose rows "
            "can be read one by one; leave it out"
        )

    @abstractmethod
    def check_state_mode(self, mode: StateMode, exit_layers: tuple[int, ...]) -> None:
        """Raises UserError where the mode cannot be had with these exits, with the reason."""

    @abstractmethod
    def row_bytes(self, num_tokens: int) -> int:
        """Returns the bytes of what all blocks keep of a row of ``num_tokens`` tokens."""
