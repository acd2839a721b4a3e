"""What exits are compared with in a sweep: models without some blocks, and exits at which every token leaves.

Knows arguments; knows no options of the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.types import PruneScope, StateMode

#: The families of points that baselines are.
PRUNING, STATIC = "pruning", "static"


class Baseline(NamedTuple):
    """A point of a sweep without its tasks; fields as those of ``options.Point``."""

    name: str
    kind: str
    series: str
    x: float
    args: DynamaxArgs


def static_exits(
    full: DynamaxArgs, layers: Sequence[int], modes: Sequence[StateMode], exits: str | None
) -> Iterator[Baseline]:
    """Yields points in which every token leaves after ``layers``, by state mode.

    Args:
        full: the arguments of the full model.
        layers: numbers of blocks.
        modes: what tokens that left leave behind.
        exits: the trained exits whose adapters and state maps are used; None: none are.
    """
    for mode in dict.fromkeys(modes):
        for layer in sorted(set(layers)):
            # A confidence that costs nothing; every one reaches 0.
            args = replace(
                full, exit_layers=(layer,), threshold=(0.0,), confidence="state", state_mode=mode, exits=exits
            )
            yield Baseline(f"static-{mode}-{layer}", STATIC, f"static exit, {mode}", layer, args)


def pruned_models(
    full: DynamaxArgs, counts: Sequence[int], scope: PruneScope, profile: str | None, adapters: str | None
) -> Iterator[Baseline]:
    """Yields pruned models by choice of blocks, and each choice again with fitted read-outs.

    Args:
        full: the arguments of the full model.
        counts: how many blocks are pruned; 0 is passed over.
        scope: which tokens do without them.
        profile: the file that chooses blocks by angular distance; None: the deepest go alone.
        adapters: the file of read-outs; None: there are none.
    """
    strategies: dict[str, dict[str, Any]] = {"pruning, deepest": {}}
    if profile is not None:
        strategies["pruning, angular"] = {"prune_strategy": "angular", "prune_profile": profile}
    if adapters is not None:
        strategies |= {
            f"{strategy}, healed": {**changed, "prune_adapter": adapters} for strategy, changed in strategies.items()
        }
    for strategy, changed in strategies.items():
        series = strategy if scope == "all" else f"{strategy}, {scope}"
        for count in sorted(set(counts) - {0}):
            args = replace(full, prune_layers=count, prune_scope=scope, **changed)
            yield Baseline(f"{series.replace(', ', '-')}-{count}", PRUNING, series, count, args)
