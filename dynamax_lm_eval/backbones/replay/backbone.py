"""Any decoder of transformers that calls its blocks one after the other.

Blocks run as their family wrote them, over the tokens of all rows side by side: the model makes their arguments
(``model``), a registered attention function reads the rows' K and V (``transformer.attention``) under the model's own
mask rule, and modules that keep states of another kind are run by ``mixers``. What each block needs is found by
watching it at load (``probing``, ``setup``); nothing here knows a family.

N tokens of a flat batch, n in flight, m that left, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones.base import FinalParts, RowLayout, States, full_depth_layout
from dynamax_lm_eval.backbones.decoder import ModelBackbone
from dynamax_lm_eval.backbones.forwards import replaced_forwards
from dynamax_lm_eval.backbones.replay import costs, setup
from dynamax_lm_eval.backbones.replay.arguments import Call
from dynamax_lm_eval.backbones.replay.caches import FlatCache
from dynamax_lm_eval.backbones.replay.forward_pass import ReplayPass, WrittenStates
from dynamax_lm_eval.backbones.replay.mixers import FlatMixer
from dynamax_lm_eval.backbones.replay.model import ReplayModel, in_form
from dynamax_lm_eval.backbones.replay.states import ReplayStates
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.masks import MaskRule, Visibility
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models.placement import moved
from dynamax_lm_eval.types import MambaKernels, StateMode


class ReplayBackbone(ModelBackbone):
    """A causal LM of transformers whose blocks are called with the model's own arguments."""

    def __init__(
        self,
        model: Any,
        max_length: int | None = None,
        mamba_kernels: MambaKernels = "auto",
        attention_by_row: bool = False,
    ) -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.
            max_length: longest row that will be run.
            mamba_kernels: ``auto`` runs Mamba mixers by mamba-ssm and causal-conv1d on a GPU where they are installed.
            attention_by_row: run attention row by row, by the family's own code, too.

        Raises:
            UserError: its blocks cannot be found.
            Exception: whatever goes wrong where a family does otherwise than is assumed here.
        """
        super().__init__(model)
        self.mamba_kernels = mamba_kernels
        self.replay = ReplayModel(self.model, self._layers)
        self.cache = FlatCache(self.model.config)
        self.mixers: list[FlatMixer] = []
        self._is_running = False
        self._now: ReplayPass | None = None
        self.cache.writer = self._write
        self._direct_readout: Any = None
        found = setup.describe(self, max_length, mamba_kernels, attention_by_row)
        self.blocks, self.hidden_shape, self._bytes = found.blocks, found.hidden_shape, found.bytes
        self.hidden_size = self.hidden_shape.size
        self.mixers = [mixer for block in self.blocks for mixer in block.mixers]
        #: Whether some block takes tokens in order, so that nothing is deferred.
        self.takes_tokens_in_order = bool(self.mixers)
        self.rung = "row modules" if attention_by_row else "mixed" if self.mixers else "flat"
        self._mixer_arities: dict[FlatMixer, int | None] = found.mixer_arities
        self._direct_readout = setup.direct_readout(self)
        by_themselves = setup.takes_nothing_from_other_blocks(self)
        self.resumes = not self.takes_tokens_in_order and by_themselves
        # States that grow with a row, in caches of the family's own, are not cut.
        self.takes_back = by_themselves and all(mixer.is_recurrent for mixer in self.mixers)
        if self.device.type == "meta":
            return  # policies are checked, nothing is run
        setup.find_stops(self)
        self.takes_tokens_in_order |= any(block.is_sequential for block in self.blocks)
        self.resumes &= not self.takes_tokens_in_order
        self.cost = costs.measure(self, self.hidden_size * self.vocab_size)

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> ReplayStates:
        kv_layers = [block.kv_layers for block in self.blocks]
        return ReplayStates(self.num_layers, kv_layers, self.mixers, capacity, prefix_capacity, row_stride)

    def start_pass(self, states: States, layout: RowLayout, materialize_all: bool = False) -> ReplayPass:
        assert isinstance(states, ReplayStates)
        return ReplayPass(self, states, layout, materialize_all)

    def embed(self, ids: Tensor) -> Tensor:
        positions = torch.arange(len(ids), device=self.device)
        with self.running():
            return self.hidden_shape.flat(self.replay.capture(ids, positions, self.cache)[0].hidden)

    def readout(self, hidden: Tensor) -> Tensor:
        if self._direct_readout is not None:
            direct: Tensor = self._direct_readout(hidden)
            return direct
        logits = self.replay.readout(self.hidden_shape.of_model(hidden.unsqueeze(0)), len(hidden))
        return moved(logits.contiguous(), self.output_device)

    def readout_of(self, hidden: Tensor, first: int, others: Tensor) -> Tensor:
        assert self._direct_readout is not None
        readout: FinalReadout = self._direct_readout
        return readout.with_head(lambda normed: self.by_head_rows(normed, first, others))(hidden)

    @property
    def final_parts(self) -> FinalParts | None:
        found: FinalReadout | None = self._direct_readout
        return None if found is None else FinalParts(found.norm, self._lm_head, found.softcap)

    def check_readout_of(self) -> None:
        is_direct = self._direct_readout is not None or self.device.type == "meta"  # where that is not known yet
        if not is_direct or not self.has_head_rows:
            super().check_readout_of()

    def check_state_mode(self, mode: StateMode, exit_layers: tuple[int, ...]) -> None:
        if mode == "recompute" or not exit_layers:
            return
        if mode == "skip":
            if not all(mixer.is_recurrent for mixer in self.mixers):
                raise UserError(
                    f"state_mode=skip is not possible on {self.name}: its attention finds places in its cache by "
                    "counting tokens, so none can be left out; use recompute"
                )
            return
        if mode == "learned":
            # Without weights it cannot be seen what the states of some blocks follow from (mixtures of experts).
            is_judged = self.device.type != "meta"
            follow = not is_judged or any(block.projections for block in self.blocks)
            if self.takes_tokens_in_order or not follow:
                raise UserError(
                    f"state_mode=learned is not possible on {self.name}: its blocks keep states that do not follow "
                    "from projections of their input alone; use recompute or skip"
                )
            return
        if self.mixers:
            kinds = ", ".join(sorted({type(mixer.module).__name__ for mixer in self.mixers}))
            raise UserError(
                f"state_mode={mode} is not possible on {self.name}: the states of its blocks ({kinds}) sum up the "
                "past, so there is nothing of a single token to copy; use recompute or skip"
            )
        if mode == "copy_previous":
            raise UserError(
                f"state_mode=copy_previous is not possible on {self.name}: how the K of its blocks depends on "
                "positions is known of Llama's kind alone (Llama, Mistral, Qwen2, Qwen3); use recompute, copy or skip"
            )
        if (reason := setup.why_blocks_differ(self, min(exit_layers))) is not None:
            raise UserError(
                f"state_mode=copy is not possible on {self.name}: its blocks {min(exit_layers)}..{self.num_layers} "
                f"differ in {reason}, so the K and V of one mean nothing to another; use recompute or skip"
            )

    def row_bytes(self, num_tokens: int) -> int:
        per_token, per_row = self._bytes
        return per_token * num_tokens + per_row

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._is_running:
            yield
            return
        self._is_running = True
        try:
            replaced = [(mixer.module, self._forward_of(mixer)) for mixer in self.mixers]
            with self.replay.attention(attention.NAME), replaced_forwards(replaced):
                yield
        finally:
            self._is_running = False

    @contextmanager
    def passing(self, run: ReplayPass) -> Iterator[None]:
        """Lets what blocks write go to a pass."""
        self._now = run
        try:
            yield
        finally:
            self._now = None

    @torch.inference_mode()
    def write_only(self, block: int, ids: Sequence[int], placeholder: float = 0.0) -> WrittenStates:
        """Gives one block the states of the first tokens of a row, as if they had left before it.

        ``placeholder``: stands for what mixers return.
        """
        num_tokens = len(ids)
        states = self.new_states(num_tokens)
        slot = states.allocate_row(num_tokens)
        with self.running():
            run = self.start_pass(states, full_depth_layout([slot], [num_tokens], self.num_layers))
            run.placeholder = placeholder
            hidden = run.embed(torch.as_tensor(ids, device=self.device))
            return run.write_only(block, hidden)

    def visibility(self, block: int, call: Call) -> Visibility:
        """Returns what the attention of ``block`` sees when it is called so."""
        visibility = self.blocks[block - 1].visibility
        if isinstance(visibility, MaskRule):
            return next((v for v in (*call.args, *call.kwargs.values()) if isinstance(v, MaskRule)), None)
        return visibility

    def shaped(self, mixer: FlatMixer, output: Tensor) -> Any:
        """Returns a mixer's output in the form in which its module returns it."""
        return in_form(output, self._mixer_arities[mixer])

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._now is None:
            raise TypeError("a block writes K and V outside a pass")
        return self._now.write(layer, key, value)

    def _forward_of(self, mixer: FlatMixer) -> Any:
        self.replay.remember_forward(mixer.module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._now is not None, "blocks run in a pass"
            return self._now.mix(mixer, Call(args, kwargs))

        return forward


@dataclass(frozen=True)
class FinalReadout:
    """A read-out of hidden states (T, D) as logits (T, V) by a norm, a head and a soft-cap."""

    norm: nn.Module
    head: Callable[[Tensor], Tensor]
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.head(self.norm(hidden))
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def with_head(self, head: Callable[[Tensor], Tensor]) -> FinalReadout:
        """Returns the same with another head."""
        return replace(self, head=head)
