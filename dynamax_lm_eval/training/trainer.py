"""The training loop: all kinds of exits in one pass over the data, the backbone frozen.

Loss of a kind: cross-entropy of "exit" against the label, averaged over the labelled positions, summed over its
exits with weights that fall linearly with the exit's place, unless others are asked for. The kinds share nothing but
the backbone's pass: each has parameters and gradient clipping of its own, so what is trained beside a kind does not
change it. With separate parameters for each exit and Adam, which undoes scaling, the exits' weights matter only
through clipping.

N tokens of a micro-batch, n labelled positions, E exits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.frozen.passes import FrozenBatch, FrozenPass, SimulatedExits
from dynamax_lm_eval.training.batches import MicroBatches, first_to_leave, labelled
from dynamax_lm_eval.training.optimizers import make_optimizer, stepping
from dynamax_lm_eval.training.options import TrainingOptions

logger = logging.getLogger(__name__)

#: The share of the steps after which exits are simulated, and the thresholds between which rows draw theirs.
_SIMULATED_FROM = 0.3
_SIMULATED_THRESHOLDS = (0.4, 0.95)

#: Name of the adapters among the things that are trained; the others are kinds of classifiers.
ADAPTERS = "adapter"


@dataclass(frozen=True)
class Processes:
    """Which of several processes this is, and how they add up a tensor."""

    index: int = 0
    count: int = 1
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did; the sums over exits are on the device until they are asked for."""

    step: int
    tokens: int
    learning_rate: float
    losses: dict[str, list[float]]  # kind -> of each exit
    accuracies: dict[str, list[float]]  # kind -> of each exit, share of labels on the right side of 0.5
    positives: list[float]  # of each exit, share of label 1
    gradient_norms: dict[str, float]


def exit_weights(num_exits: int, order: str = "decreasing") -> list[float]:
    """Returns the weights of the exits' losses, which add up to 1.

    ``order``: decreasing, E, E-1, ..., 1 over their sum; increasing, the same from the last exit on; or equal.
    """
    total = num_exits * (num_exits + 1) / 2
    falling = [(num_exits - i) / total for i in range(num_exits)]
    return {"decreasing": falling, "increasing": falling[::-1], "equal": [1 / num_exits] * num_exits}[order]


def learning_rate(step: int, steps: int, peak: float, warmup_share: float) -> float:
    """Returns the rate of a step, which counts from 0: a linear rise, then a cosine to 0."""
    warmup = round(warmup_share * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def labelled_positions(seed: int, micro_batch: int, candidates: IntArray, count: int) -> Tensor:
    """Returns ``count`` of the candidates, positions in micro-batch number ``micro_batch``, or all, rising."""
    count = min(count, len(candidates))
    positions = np.random.default_rng([seed, micro_batch]).choice(candidates, size=count, replace=False)
    return torch.from_numpy(np.sort(positions))


def labelled_batches(
    batches: MicroBatches, step: int, options: TrainingOptions, processes: Processes
) -> Iterator[tuple[int, list[list[int]], Tensor]]:
    """Yields the micro-batches of an optimiser step that are this process's: number, rows, labelled positions (n,)."""
    for i in range(options.micro_batches):
        rows = next(batches)
        number = step * options.micro_batches + i
        if i % processes.count != processes.index:
            continue
        candidates = np.flatnonzero(labelled(rows))
        if len(candidates) == 0:  # prompts whose answers are in other micro-batches
            candidates = np.arange(options.micro_batch_tokens)
        yield number, rows, labelled_positions(options.seed, number, candidates, options.labels_per_micro_batch)


def update(
    optimizer: torch.optim.Optimizer,
    groups: Mapping[str, list[nn.Parameter]],
    rate: float | None,
    clip: float,
    processes: Processes,
    failure: str,
) -> dict[str, float]:
    """Adds up gradients over processes, clips them group by group, and steps; returns their norms.

    Raises:
        UserError: a gradient is not finite; ``failure`` is said with the names of its groups.

    ``rate``: of this step; None: the optimiser's own.
    """
    if processes.count > 1:
        parameters = [parameter for group in groups.values() for parameter in group]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        parts = processes.add_up(flat).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
    norms = {name: float(torch.nn.utils.clip_grad_norm_(group, clip)) for name, group in groups.items()}
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        raise UserError(failure.format(names=", ".join(broken)))
    for group in optimizer.param_groups if rate is not None else ():
        group["lr"] = rate
    optimizer.step()
    return norms


class Trainer:
    """Trains the classifiers of all kinds; one call of :meth:`step` per optimiser step."""

    def __init__(
        self,
        frozen: FrozenPass,
        classifiers: ExitClassifiers,
        options: TrainingOptions,
        processes: Processes | None = None,
    ) -> None:
        self.frozen = frozen
        self.classifiers = classifiers
        self.options = options
        self.processes = processes or Processes()
        #: Not in order of preference: states keep what the optimiser knows by place, and preferences change.
        self._kinds = sorted(classifiers.kinds, reverse=True)
        self.groups = {kind: list(classifiers.by_kind[kind].parameters()) for kind in self._kinds}
        if len(classifiers.adapters):
            self.groups[ADAPTERS] = list(classifiers.adapters.parameters())
        self.optimizer = make_optimizer(
            options.optimizer,
            list(self.groups.values()),
            options.learning_rate,
            options.weight_decay,
            round(options.warmup_share * options.steps),
        )
        self._device = frozen.backbone.device
        #: Matrix products of the classifiers run in bfloat16 where the backbone does.
        self._autocast = frozen.dtype == torch.bfloat16

    def step(self, step: int, batches: MicroBatches) -> StepReport:
        """Optimiser step number ``step`` (from 0) on the next micro-batches.

        Raises:
            UserError: a loss or gradient is not finite; the weights are as before the step.
        """
        with stepping(self.optimizer):
            return self._step(step, batches)

    def _step(self, step: int, batches: MicroBatches) -> StepReport:
        options, mine = self.options, self.processes
        self.optimizer.zero_grad(set_to_none=True)
        active = self.active_groups(step)
        sums = torch.zeros(len(active) * 2 + 1, len(self.frozen.exit_layers), device=self._device)
        for number, rows, positions in labelled_batches(batches, step, options, mine):
            batch = self.frozen.run(rows, self._simulated(step, number, rows))
            sums += self._accumulate(batch, positions.to(self._device), active)
        sums = mine.add_up(sums) / options.micro_batches
        rate = self._learning_rate(step)
        norms = self._update(step, None if options.optimizer == "schedulefree" else rate, active)
        values = sums.tolist()
        return StepReport(
            step=step + 1,
            tokens=(step + 1) * options.batch_tokens,
            learning_rate=rate,
            losses=dict(zip(active, values[0:-1:2], strict=True)),
            accuracies=dict(zip(active, values[1:-1:2], strict=True)),
            positives=values[-1],
            gradient_norms=norms,
        )

    def _simulated(self, step: int, number: int, rows: Sequence[Sequence[int]]) -> SimulatedExits | None:
        """Returns the exits at which tokens of a micro-batch leave; None where all run at full depth.

        Every other micro-batch, once classifiers know something, from a threshold on that each row draws.
        """
        options = self.options
        if not options.simulate_exits or number % 2 or step < _SIMULATED_FROM * options.steps:
            return None
        drawn = np.random.default_rng([options.seed, number, 1])
        return SimulatedExits(
            self.classifiers,
            kind=self._kinds[number // 2 % len(self._kinds)],
            thresholds=drawn.uniform(*_SIMULATED_THRESHOLDS, size=len(rows)),
            first=first_to_leave(rows),
            state_mode="recompute" if self.classifiers.states is None else "learned",
        )

    def active_groups(self, step: int) -> dict[str, list[nn.Parameter]]:
        """Returns what is trained in a step: everything, or adapters first and the classifiers after them."""
        if not self.options.adapter_steps:
            return self.groups
        alone = step < self.options.adapter_steps
        return {name: group for name, group in self.groups.items() if (name == ADAPTERS) == alone}

    def _learning_rate(self, step: int) -> float:
        options = self.options
        if options.optimizer == "schedulefree":
            return options.learning_rate * min(1.0, (step + 1) / max(1, round(options.warmup_share * options.steps)))
        first = options.adapter_steps
        begin, end = (0, first) if step < first else (first, options.steps)
        return learning_rate(step - begin, end - begin, options.learning_rate, options.warmup_share)

    def _accumulate(self, batch: FrozenBatch, positions: Tensor, active: Iterable[str]) -> Tensor:
        """Adds the gradients of a micro-batch; returns losses, accuracies and label shares by exit.

        For the adapters these are KL divergences, and shares of tokens read out as by the full model.
        """
        layers, options = self.frozen.exit_layers, self.options
        share = exit_weights(len(layers), options.exit_weights)
        weights = torch.tensor(share, device=self._device)
        learn = [weight / self.options.micro_batches for weight in share] if ADAPTERS in active else None
        targets = self.frozen.label(batch, positions, self.classifiers, learn)
        labels = targets.within_k  # (E, n)
        reached = torch.stack([batch.reaching(layer, positions) for layer in layers])  # (E, n)
        counts = reached.sum(1).clamp(min=1)
        lines: list[Tensor] = []
        for kind in active:
            if kind == ADAPTERS:
                assert targets.divergence is not None
                lines += [targets.divergence, targets.agrees.float().sum(1) / counts]
                continue
            logits = torch.stack([self._logits(kind, layer, batch, positions) for layer in layers])  # (E, n, 2)
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), reduction="none")
            by_exit = (losses.view(labels.shape) * reached).sum(1) / len(positions)  # (E,)
            ((by_exit * weights).sum() / self.options.micro_batches).backward()
            right = (logits[..., 1] > logits[..., 0]) == labels
            lines += [by_exit.detach() * len(positions) / counts, (right & reached).float().sum(1) / counts]
        return torch.stack([*lines, labels.float().sum(1) / counts])

    def _logits(self, kind: str, layer: int, batch: FrozenBatch, positions: Tensor) -> Tensor:
        """Returns logits (n, 2) at the labelled positions."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            logits = batch.classified(self.classifiers.at(kind, layer), layer, positions)
        return logits.float()

    def _update(self, step: int, rate: float | None, active: Mapping[str, list[nn.Parameter]]) -> dict[str, float]:
        failure = (
            f"step {step + 1}: the gradient of {{names}} is not finite; the last saved state is good. "
            "Use --dtype float32 or a lower --learning_rate"
        )
        return update(self.optimizer, active, rate, self.options.clip, self.processes, failure)


class Throughput:
    """Tokens per second of this run, without what was done before a resume."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._tokens = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, tokens: int) -> float:
        """Counts tokens; returns tokens per second so far."""
        self._tokens += tokens
        return self._tokens / max(self.seconds, 1e-9)
