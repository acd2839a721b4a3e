"""What a step of decoding asks of a GPU: operations of a block, copies there, and values read back.

Counted on a device that computes on the CPU (``cudalike``), in bfloat16. What a block takes is what 8 blocks take more
than 4 do, per block; the numbers are those of ``docs/performance.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from cudalike import CudaTensor, counting, cuda_like, on_cuda
from helpers import random_ids, tiny_config
from helpers_engine import FULL, run_score
from helpers_segments import ReplayedGraphs
from kernel_stand_ins import COUNTED_STAND_INS
from transformers import AutoModelForCausalLM

from dynamax_lm_eval.backbones import make_backbone, segments
from dynamax_lm_eval.backbones.transformer import varlen
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.exits.confidences.base import ExitInputs
from dynamax_lm_eval.exits.confidences.state import StateConfidence
from dynamax_lm_eval.exits.policy import ExitPolicy

#: Most operations of a block; Qwen3 normalises queries and keys too.
OF_A_BLOCK = {"llama": 18, "mistral": 18, "qwen2": 18, "qwen3": 21}
OF_A_BLOCK_OF_MAMBA = 8
PROMPT, NEW_TOKENS = 7, 10
#: The steps that are counted: two, because rows that leave in one stay in the next; graphs were captured before them.
STEPS = (6, 7)


@dataclass(frozen=True)
class Step:
    """What one step asked, as the mean of two."""

    launches: float
    uploads: float
    blocking_uploads: float
    read_backs: float


class Decoding:
    """Rows of equal length that decode together, and what each of their steps asked."""

    def __init__(
        self, family: str, num_layers: int, num_rows: int, exits: str, leave: bool, static: bool = False
    ) -> None:
        """
        Args:
            family: of the model.
            num_layers: its depth.
            num_rows: rows in flight.
            exits: a confidence or a kind of classifier at L / 2 and L - 1; or "none".
            leave: every second row leaves at the first exit, the others in the next step.
            static: blocks run in segments, and what graphs replay is not counted.
        """
        self._leave = leave
        self._first_exit = num_layers // 2
        #: At the end of each step, what had been asked: numbers by kind, and operations.
        self._steps: list[tuple[dict[str, int], int]] = []
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, num_layers)).eval().to(torch.bfloat16)
        layers = (num_layers // 2, num_layers - 1)
        policy, classifiers = ExitPolicy(num_layers), None
        if exits in ("state", "softmax", "entropy"):
            threshold = 0.5 if leave else 0.9999
            policy = ExitPolicy(num_layers, layers, (threshold,) * 2, confidence=exits)  # type: ignore[arg-type]
        elif exits != "none":
            policy = ExitPolicy(num_layers, layers, (0.9999,) * 2, confidence="classifier", classifier=exits)  # type: ignore[arg-type]
            classifiers = ExitClassifiers((exits,), layers, 32, "silu", ClassifierOptions())
        with cuda_like(), pytest.MonkeyPatch.context() as patch:
            if exits == "state":
                patch.setattr(StateConfidence, "score", lambda _, inputs: self._score(inputs))
            varlen.is_available.cache_clear()
            on_device = None if classifiers is None else on_cuda(classifiers)
            if on_device is not None:
                on_device.narrow(torch.bfloat16)
            backbone: Any = make_backbone(on_cuda(model), max_length=64)
            if family == "mamba2":
                for block in backbone.blocks:
                    block.mixer.kernels = COUNTED_STAND_INS
            engine = Engine(backbone, on_device)
            if static:
                patch.setattr(segments, "Graphs", ReplayedGraphs)
                engine.use_segments(None)
            with counting() as self._counts:
                requests = [
                    GenerationRequest(random_ids(PROMPT, i), NEW_TOKENS, policy, Sampler(), self._noting(i == 0))
                    for i in range(num_rows)
                ]
                generate_all(engine, requests, num_rows)
            self.passes = Counter[str]() if engine.segments is None else engine.segments.passes
        varlen.is_available.cache_clear()

    def _noting(self, notes: bool) -> Callable[[list[int]], bool]:
        """Returns a stop that never stops; one of them marks where steps end."""

        def is_finished(_: list[int]) -> bool:
            if notes:
                totals = {part.name: getattr(self._counts, part.name).total() for part in fields(Step)}
                self._steps.append((totals, len(self._counts.shapes)))
            return False

        return is_finished

    def _score(self, inputs: ExitInputs) -> torch.Tensor:
        rows = torch.from_numpy(inputs.slots) // (PROMPT + NEW_TOKENS)
        leaves = self._leave and inputs.layer == self._first_exit
        return CudaTensor(((rows + len(self._steps)) % 2 == 0).float() * leaves)

    @property
    def step(self) -> Step:
        before, after = self._steps[STEPS[0]], self._steps[STEPS[-1] + 1]

        return Step(**{name: (total - before[0][name]) / len(STEPS) for name, total in after[0].items()})

    def operations(self, step: int) -> list[str]:
        """The operations of a step with the shapes of their tensors, in order."""
        return self._counts.shapes[self._steps[step][1] : self._steps[step + 1][1]]


CASES = [
    ("mamba", 16, False),
    ("softmax", 16, False),
    ("state", 16, True),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            ("none", 16, False),
            ("calm", 16, False),
            ("none", 1, False),
            ("state", 16, False),
            ("ffn", 16, False),
            ("entropy", 16, False),
            ("state", 1, True),
        )
    ),
]
#: Most operations of a step besides those of its blocks, and most copies to the device, of which none blocks.
BESIDES = {
    ("none", 1, False): (8, 3),
    ("none", 16, False): (8, 3),
    ("state", 16, False): (8, 3),
    ("calm", 16, False): (18, 3),
    ("ffn", 16, False): (26, 3),
    ("mamba", 16, False): (58, 3),
    ("softmax", 16, False): (26, 3),
    ("entropy", 16, False): (30, 3),
    ("state", 1, True): (13.5, 4.5),
    ("state", 16, True): (31, 13),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "family",
    ["mistral", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "qwen2", "qwen3"))],
)
def test_a_step_asks_no_more_than_this(family: str, case: tuple[str, int, bool]) -> None:
    exits, num_rows, leave = case
    few, many = (Decoding(family, depth, num_rows, exits, leave).step for depth in (4, 8))
    of_a_block = (many.launches - few.launches) / 4
    assert of_a_block <= OF_A_BLOCK[family]
    most_besides, most_uploads = BESIDES[case]
    assert few.launches - 4 * of_a_block <= most_besides
    # Neither grows with depth.
    assert few.uploads == many.uploads <= most_uploads
    assert few.blocking_uploads == many.blocking_uploads == 0
    assert few.read_backs == many.read_backs <= (1 if exits == "none" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", [("state", 16, True), ("none", 16, False), ("none", 1, False), ("state", 1, True)])
def test_a_block_of_mamba_asks_no_more_than_this(case: tuple[str, int, bool]) -> None:
    """Where mamba-ssm and causal-conv1d have kernels for it: its convolution, its state and its norm are one each."""
    exits, num_rows, leave = case
    few, many = (Decoding("mamba2", depth, num_rows, exits, leave).step for depth in (4, 8))
    assert (many.launches - few.launches) / 4 <= OF_A_BLOCK_OF_MAMBA
    assert few.uploads == many.uploads
    assert few.blocking_uploads == many.blocking_uploads == 0
    assert few.read_backs == many.read_backs


#: Most operations of a step, most copies to the device, and most values read back, where graphs replay the blocks.
OUTSIDE = {
    ("none", 1, False): (9, 2, 1),
    ("none", 16, False): (9, 2, 1),
    ("state", 16, False): (13, 2, 3),
    ("calm", 16, False): (23, 2, 3),
    ("ffn", 16, False): (31, 2, 3),
    ("mamba", 16, False): (63, 2, 3),
    ("softmax", 16, False): (31, 2, 3),
    ("entropy", 16, False): (35, 2, 3),
    ("state", 1, True): (12.5, 3, 2.5),
    ("state", 16, True): (25, 9, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_no_more_than_this_outside_of_its_graphs(case: tuple[str, int, bool]) -> None:
    """Besides one replay for each run of blocks between two exits."""
    exits, num_rows, leave = case
    few, many = (Decoding("mistral", depth, num_rows, exits, leave, static=True) for depth in (4, 8))
    assert set(few.passes) == set(many.passes) == {"static"}
    step = many.step
    assert few.step == step  # whatever the depth
    most_launches, most_uploads, most_read_backs = OUTSIDE[case]
    assert step.launches <= most_launches
    assert step.uploads <= most_uploads
    assert step.read_backs <= most_read_backs
    assert step.blocking_uploads == 0


@pytest.mark.parametrize("exits", ["none", "calm"])
def test_steps_in_which_nobody_leaves_ask_the_same(exits: str) -> None:
    """The same operations on the same shapes, step after step: what a recorded graph of them would need."""
    decoding = Decoding("mistral", 4, 5, exits, leave=False)
    first, *others = (decoding.operations(step) for step in range(NEW_TOKENS - 1))
    assert first
    for operations in others:
        assert operations == first


def test_scoring_more_rows_asks_no_more_operations() -> None:
    """New rows, and rows with a past: one call of attention for all."""
    model = AutoModelForCausalLM.from_config(tiny_config("mistral")).eval().to(torch.bfloat16)
    prefix = random_ids(70, 99)
    asked = []
    with cuda_like():
        varlen.is_available.cache_clear()
        engine = Engine(make_backbone(on_cuda(model), max_length=128))
        for num_rows in (3, 12):
            pairs = [([*prefix, *random_ids(5 + i, i)], random_ids(4, 50 + i)) for i in range(num_rows)]
            run_score(engine, FULL, pairs, num_rows)
            with counting() as counts:
                run_score(engine, FULL, pairs, num_rows)
            asked.append((counts.launches["_varlen_attn"], counts.launches["mm"], counts.blocking_uploads.total()))
    varlen.is_available.cache_clear()
    assert asked[0] == asked[1]
    assert asked[0][2] == 0
