"""Exit classifiers by themselves: their two forms agree, their sizes and MACs are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from helpers_engine import CLASSIFIERS, EXITS, HIDDEN, KINDS
from reference import RECURRENT

from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape, causal_conv, selective_scan
from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifiers import CLASSIFIERS as TABLE
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers, make_classifier
from dynamax_lm_eval.exits.confidences import CONFIDENCES, resolve_confidence
from dynamax_lm_eval.types import ClassifierKind, ConfidenceName


@pytest.mark.parametrize("lengths", [[1, 7, 16, 3, 9], [4, 8], [1, 1, 1], [2], [23]])
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_and_convolution_equal_the_recurrence(lengths: Sequence[int], with_state: bool) -> None:
    """Chunks shorter and longer than rows, rows shorter than the convolution's window, several groups."""
    torch.manual_seed(1)
    shape = MixerShape(heads=6, head_dim=5, groups=3, state=4, kernel=4)
    rows = RaggedRows(lengths, chunk=4)
    total = sum(lengths)
    inputs, dt, decay = torch.randn(total, shape.channels), torch.rand(total, 6), -3 * torch.rand(6)
    weight, bias = torch.randn(shape.channels, 4), torch.randn(shape.channels)
    state = torch.randn(len(lengths), 6, 5, 4) if with_state else None
    window = torch.randn(len(lengths), 3, shape.channels) if with_state else None
    scanned, after = selective_scan(inputs, dt, decay, shape, rows, None if state is None else state.clone())
    convolved, last = causal_conv(inputs, weight, bias, rows, window)
    assert after is not None
    start = 0
    for row, length in enumerate(lengths):
        current = torch.zeros(6, 5, 4) if state is None else state[row]
        seen = list(torch.zeros(3, shape.channels) if window is None else window[row])
        for t in range(start, start + length):
            x, b, c = (part.squeeze(0) for part in shape.split(inputs[t : t + 1]))
            b, c = b.repeat_interleave(2, 0), c.repeat_interleave(2, 0)
            current = (dt[t] * decay).exp()[:, None, None] * current + (dt[t][:, None] * x)[..., None] * b[:, None]
            torch.testing.assert_close(scanned[t], (current * c[:, None]).sum(-1), rtol=1e-4, atol=1e-5)
            seen.append(inputs[t])
            expected = sum(seen[len(seen) - 4 + k] * weight[:, k] for k in range(4)) + bias
            torch.testing.assert_close(convolved[t], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[row], current, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last[row], torch.stack(seen[-3:]))
        start += length


def test_the_scan_that_is_differentiated_equals_the_other() -> None:
    torch.manual_seed(2)
    shape = MixerShape(4, 3, 2, 5, 4)
    rows = RaggedRows([9, 1, 14], chunk=4)
    inputs, dt, decay = torch.randn(24, shape.channels), torch.rand(24, 4), -torch.rand(4)
    with torch.no_grad():
        plain, _ = selective_scan(inputs, dt, decay, shape, rows, None)
    differentiated, after = selective_scan(inputs.requires_grad_(), dt, decay, shape, rows, None)
    assert after is None
    torch.testing.assert_close(differentiated, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_equals_recurrent(kind: str) -> None:
    """A classifier over whole rows, in two parts, and token by token."""
    classifier = CLASSIFIERS.at(kind, 3)
    hidden = torch.randn(11, HIDDEN)
    whole, _ = classifier(hidden, RaggedRows([7, 4]), None)
    for sizes in ([1] * 7, [2, 4, 1], [6, 1]):
        state, parts, start = None, [], 0
        for size in sizes:
            logits, state = classifier(hidden[start : start + size], RaggedRows([size]), state)
            parts.append(logits)
            start += size
        torch.testing.assert_close(torch.cat(parts), whole[:7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "macs"), [("calm", 64), ("ffn", 32 * 128 + 128 * 2)])
def test_macs_of_stateless_classifiers_are_their_weights(kind: str, macs: int) -> None:
    assert CLASSIFIERS.at(kind, 2).macs == macs


def test_macs_of_a_mamba_classifier_by_hand() -> None:
    # D=32, inner 24, N=5, K=3, one head of 24: in_proj, conv, recurrence, out_proj.
    assert CLASSIFIERS.at("mamba", 2).macs == 32 * (24 + 24 + 10 + 1) + 34 * 3 + 3 * 24 * 5 + 24 * 2


def test_macs_of_a_hybrid_classifier_by_hand() -> None:
    # The mixer as above; then inner and D beside each other to 0.5 D = 16, and 16 to 2.
    mixer, decision = 32 * (24 + 24 + 10 + 1) + 34 * 3 + 3 * 24 * 5, (24 + 32) * 16 + 16 * 2
    assert CLASSIFIERS.at("hybrid", 2).macs == mixer + decision
    assert CLASSIFIERS.at("hybrid", 2).cost.paper_weights == 32 * (24 + 24 + 10 + 1) + decision


def test_in_the_papers_table_a_linear_classifier_is_free() -> None:
    assert CLASSIFIERS.at("calm", 2).cost == EvaluationCost(64, 0)
    assert CLASSIFIERS.at("ffn", 2).cost.paper_weights == CLASSIFIERS.at("ffn", 2).macs
    assert CLASSIFIERS.at("mamba", 2).cost.paper_weights == 32 * (24 + 24 + 10 + 1) + 24 * 2


def test_every_kind_and_every_confidence_is_in_its_table() -> None:
    assert set(TABLE) == set(get_args(ClassifierKind))
    assert set(CONFIDENCES) == set(get_args(ConfidenceName))
    assert {kind for kind, classifier in TABLE.items() if classifier.recurrent} == set(RECURRENT)
    sizes = {name for classifier in TABLE.values() for name in classifier.sizes}
    assert sizes | {"normalize"} == set(ClassifierOptions.__dataclass_fields__), "every kind can do without a norm"
    named = resolve_confidence("classifier", "hybrid")
    assert named is resolve_confidence("classifier", "hybrid"), "policies share it"
    assert (named.name, named.recurrent, named.reads_lm_head) == ("hybrid", True, False)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_do_not_depend_on_the_other_kinds(kind: str) -> None:
    alone = ExitClassifiers((kind,), EXITS, HIDDEN, "silu", ClassifierOptions(), seed=5)
    together = ExitClassifiers(KINDS, EXITS, HIDDEN, "silu", ClassifierOptions(), seed=5)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(together.state_dict()[name], tensor)


def test_classifier_sizes_follow_the_options() -> None:
    small = make_classifier("mamba", 576, "silu", ClassifierOptions())
    large = make_classifier("mamba", 576, "silu", ClassifierOptions(mamba_state=128, mamba_expand=2))
    assert small.macs == 193_952  # a twentieth of a block of SmolLM2
    assert large.macs > 9 * small.macs
    hybrid = make_classifier("hybrid", 576, "silu", ClassifierOptions())
    assert hybrid.macs == small.macs - 144 * 2 + (144 + 576) * 144 + 144 * 2
    with pytest.raises(UserError, match="mamba_state must be at least 1, got 0"):
        ClassifierOptions(mamba_state=0)
    with pytest.raises(UserError, match="hybrid_expand must be a finite number above 0, got 0"):
        ClassifierOptions(hybrid_expand=0)
