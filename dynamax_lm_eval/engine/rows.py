"""The rows of a generation that is in flight: what each feeds next, and what becomes of the tokens that are chosen.

A plain row feeds the token that was chosen last. A verified one feeds tokens that its exits have drafted, until the
full model has chosen for each of them, in one pass; what it chose itself stays (speculative decoding, with the exits as
the drafting model).

L blocks, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from dynamax_lm_eval.compute.trace import Trace, by_exit, if_any
from dynamax_lm_eval.compute.verified import FedToken, VerifiedTrace
from dynamax_lm_eval.engine.batch import RowInput
from dynamax_lm_eval.engine.prefixes import SharedPrefix
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest
from dynamax_lm_eval.engine.sampling import RowToChoose
from dynamax_lm_eval.exits.vocabulary import RowVocabulary


@dataclass
class Row:
    """A row whose generation is in flight."""

    index: int
    request: GenerationRequest
    slot: int
    shared_prefix: SharedPrefix
    began: float
    generated: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    #: Of each token that may exit and gives one of the answer: exit layer -> confidence, where it was asked for.
    confidences: list[dict[int, float]] = field(default_factory=list)
    #: Of the token that waits at an exit, as far as it has run.
    refused_so_far: int = 0
    confidences_so_far: dict[int, float] = field(default_factory=dict)
    first_token: float = 0.0

    @cached_property
    def vocabulary(self) -> RowVocabulary | None:
        """The tokens that its confidence looks at."""
        return self.request.policy.row_vocabulary(self.request.prompt)

    @property
    def is_over(self) -> bool:
        """Whether its last token ends it."""
        return len(self.generated) >= self.request.max_new_tokens or self.request.is_finished(self.generated)

    @property
    def resumed(self) -> Sequence[Tensor]:
        """The hidden states (1, 1, D) of the tokens at the beginning of its input that have run some blocks."""
        return ()

    def next_input(self) -> RowInput:
        """Returns what it feeds."""
        shared = self.shared_prefix.tokens
        if self.generated:
            return self._input(self.generated[-1:], len(self.request.prompt) + len(self.generated) - 1)
        return self._input(self.request.prompt[shared:], shared)

    def _input(
        self, ids: Sequence[int], first_position: int, resumed: Sequence[int] = (), may_exit: bool = True
    ) -> RowInput:
        return RowInput(
            ids=ids,
            first_position=first_position,
            slot=self.slot,
            prompt_length=len(self.request.prompt),
            max_steps=self.request.max_new_tokens,
            policy=self.request.policy,
            vocabulary=self.vocabulary,
            resumed=resumed,
            may_exit=may_exit,
        )

    def to_choose(self, number: int) -> RowToChoose:
        """Returns what the token behind token ``number`` of its input is chosen with."""
        return RowToChoose(self.request.sampler, self.request.prompt, self.generated)

    def wait(self, refused: int, confidences: Mapping[int, float]) -> None:
        """Notes what was decided of its token, which waits at an exit, since it waited last."""
        self.refused_so_far |= refused
        self.confidences_so_far.update(confidences)

    def note(self, layers: Sequence[int], refused: Sequence[int], confidences: Sequence[dict[int, float]]) -> None:
        """Notes how tokens of its input ran that may exit, as :class:`Trace` has it.

        ``confidences``: of those that give tokens of the answer, by exit layer.
        """
        self.layers += layers
        if refused:
            self.refused += [*refused[:-1], refused[-1] | self.refused_so_far]
        if confidences:
            self.confidences += [*confidences[:-1], self.confidences_so_far | confidences[-1]]
        self.refused_so_far, self.confidences_so_far = 0, {}

    def stop(self, stopped: Mapping[int, tuple[int, Tensor]], refused: Sequence[int]) -> None:
        """Notes the tokens of its input that stopped, with the blocks that they ran and hidden states (1, 1, D).

        ``refused``: of the tokens that may exit, as :class:`Trace` has it.
        """
        assert not stopped, "plain rows do not draft"

    def take(self, chosen: Mapping[int, int]) -> tuple[list[int], int | None]:
        """Takes what was chosen behind tokens of its input.

        Returns:
            the tokens that stand; and how many of those that were fed do, where some do not and states go back.
        """
        return list(chosen.values()), None

    def result(self, now: float) -> Generation:
        """Returns its generation, whose last token is known now."""
        request = self.request
        trace = Trace(
            prompt_tokens=len(request.prompt),
            fed_tokens=len(request.prompt) + len(self.generated) - 1,
            num_output_tokens=len(self.generated),
            exit_layers=(*self.shared_prefix.layers, *self.layers),
            generated=True,
            hit_limit=len(self.generated) >= request.max_new_tokens and not request.is_finished(self.generated),
            refused=if_any((*self.shared_prefix.refused, *self.refused)),
            confidences=by_exit(self.confidences, request.policy.active_exits),
            verified=self._verified,
        )
        times = self.began, self.first_token, now
        return Generation(self.generated, trace, self.shared_prefix.tokens, times)

    @property
    def _verified(self) -> VerifiedTrace | None:
        return None


@dataclass
class _Draft:
    """A token that was fed and left."""

    first_layer: int  # at which it left
    layer: int  # blocks that it has run since
    hidden: Tensor  # (1, 1, D) after them
    refused: int  # exits at which it was refused before
    proposal: int | None = None  # what it says comes next


@dataclass
class VerifiedRow(Row):
    """A row whose early exits are drafts, of which the full model's own tokens stand.

    Its input is all that it has fed and not verified, and behind that a new token: none where what is drafted ends it.
    """

    drafts: list[_Draft] = field(default_factory=list)
    is_drafted_to_end: bool = False
    #: One number of the request's random stream for each token, drafted or not: the full model's choice is the one that
    #: it makes without drafts.
    draws: list[float] = field(default_factory=list)
    fed: list[FedToken] = field(default_factory=list)
    passes: list[tuple[int, int]] = field(default_factory=list)
    verifications: int = 0
    refused_of_new: int = 0

    @property
    def resumed(self) -> Sequence[Tensor]:
        return [draft.hidden for draft in self.drafts]

    @property
    def _proposals(self) -> list[int]:
        return [draft.proposal for draft in self.drafts if draft.proposal is not None]

    @property
    def _may_exit(self) -> bool:
        most = self.request.policy.verify_tokens
        assert most is not None, "the row is verified"
        return len(self.drafts) < most

    @property
    def _num_fed(self) -> int:
        return len(self.drafts) + (not self.is_drafted_to_end)

    def next_input(self) -> RowInput:
        if not self.generated:
            return super().next_input()
        ids = [self.generated[-1], *self._proposals][: self._num_fed]
        position = len(self.request.prompt) + len(self.generated) - 1
        return self._input(ids, position, [draft.layer for draft in self.drafts], self._may_exit)

    def to_choose(self, number: int) -> RowToChoose:
        if not self.generated:
            number = 0  # the last token of the prompt
        context = [*self.generated, *self._proposals[:number]]
        sampler = self.request.sampler
        while sampler.do_sample and len(self.draws) <= len(context):
            self.draws.append(sampler.draw())
        draw = self.draws[len(context)] if sampler.do_sample else None
        return RowToChoose(sampler, self.request.prompt, context, draw, has_grown=False)

    def stop(self, stopped: Mapping[int, tuple[int, Tensor]], refused: Sequence[int]) -> None:
        if not self.generated:
            return
        new = len(self.drafts)
        self.refused_of_new = 0 if self.is_drafted_to_end else refused[-1]
        first = min((draft.layer for draft in self.drafts), default=0) if self.is_drafted_to_end else 0
        last = stopped[new][0] if new in stopped else self.request.policy.num_layers
        self.passes.append((first, last))
        for number, (layer, hidden) in sorted(stopped.items()):
            if number < new:
                self.drafts[number].layer, self.drafts[number].hidden = layer, hidden
            else:
                self.drafts.append(_Draft(layer, layer, hidden, self.refused_of_new))

    def take(self, chosen: Mapping[int, int]) -> tuple[list[int], int | None]:
        if not self.generated:
            return list(chosen.values()), None
        if self.drafts and self.drafts[-1].proposal is None:
            (self.drafts[-1].proposal,) = chosen.values()
            drafted = [*self.generated, *self._proposals]
            self.is_drafted_to_end = len(drafted) >= self.request.max_new_tokens or self.request.is_finished(drafted)
            return [], None
        return self._verify([chosen[number] for number in range(self._num_fed)])

    def _verify(self, own: Sequence[int]) -> tuple[list[int], int | None]:
        """Compares what was drafted with what the full model chose behind each token that was fed."""
        proposals, num_fed = self._proposals, self._num_fed
        pairs = enumerate(zip(own, proposals, strict=False))
        accepted = next((i for i, (token, proposal) in pairs if token != proposal), len(proposals))
        # Behind the last draft that stands comes the full model's own token, unless nothing was fed there.
        tokens = list(own[: accepted + 1])
        kept = min(accepted + 1, num_fed)
        position = len(self.request.prompt) + len(self.generated) - 1
        depth, may_exit = self.request.policy.num_layers, self._may_exit
        for number in range(num_fed):
            is_draft = number < len(self.drafts)
            left = self.drafts[number].first_layer if is_draft else None
            refused = self.drafts[number].refused if is_draft else self.refused_of_new
            evaluated = left is not None or may_exit
            self.fed.append(FedToken(position + number, left, evaluated, number < kept, number < accepted, refused))
            if number < kept:
                self.layers.append(depth if left is None else left)
        self.verifications += bool(proposals)
        self.drafts, self.is_drafted_to_end = [], False
        return tokens, kept if kept < num_fed else None

    @property
    def _verified(self) -> VerifiedTrace:
        return VerifiedTrace(tuple(self.fed), tuple(self.passes), self.verifications)


def new_row(index: int, request: GenerationRequest, slot: int, shared_prefix: SharedPrefix, now: float) -> Row:
    """Returns the row of a request that begins now."""
    kind = VerifiedRow if request.policy.drafts else Row
    return kind(index, request, slot, shared_prefix, now)
