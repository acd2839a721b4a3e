"""All that is trained for one backbone: classifiers of one or more kinds at its exit layers, adapters, state maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.exits.adapters import Adapter, make_adapters
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.base import Classifier
from dynamax_lm_eval.exits.classifiers.kinds import make_classifier
from dynamax_lm_eval.exits.confirmers import Confirmer, make_confirmers
from dynamax_lm_eval.exits.state_maps import StateMap, StateMapOptions, by_exit_and_block, make_state_maps


class ExitClassifiers(nn.Module):
    """Classifiers of one or more kinds at the exit layers of one backbone, and the adapters of its read-outs."""

    def __init__(
        self,
        kinds: tuple[str, ...],
        exit_layers: tuple[int, ...],
        hidden_size: int,
        activation: str,
        options: ClassifierOptions,
        seed: int = 0,
        adapter: str = "none",
        states: StateMapOptions | None = None,
        confirms: bool = False,
    ) -> None:
        """The ``seed`` decides the initial weights of each kind and of adapters, whichever others there are.

        ``confirms``: there is a confirmer beside each classifier.
        """
        super().__init__()
        self.exit_layers = exit_layers
        self.kinds = kinds
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapters = make_adapters(adapter, exit_layers, hidden_size)
        self.states = states
        self.state_maps = make_state_maps(states, exit_layers)
        self.confirmers = make_confirmers(kinds if confirms else (), exit_layers)
        self.by_kind = nn.ModuleDict()
        for kind in kinds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.by_kind[kind] = nn.ModuleDict(
                    {str(layer): make_classifier(kind, hidden_size, activation, options) for layer in exit_layers}
                )

    def at(self, kind: str, layer: int) -> Classifier:
        """The classifier of a kind at an exit layer."""
        classifiers: Any = self.by_kind[kind]
        classifier: Classifier = classifiers[str(layer)]
        return classifier

    def confirmer(self, kind: str, layer: int) -> Confirmer:
        """What confirms the proposals of a classifier; only where these exits have that."""
        confirmers: Any = self.confirmers[kind]
        confirmer: Confirmer = confirmers[str(layer)]
        return confirmer

    def narrow(self, dtype: torch.dtype) -> None:
        """Makes classifiers on a GPU read no more bits of their weights than a backbone of ``dtype`` reads of its own.

        Their confidences change by no more than rounding to it does. On a CPU all remain in float32. State maps compute
        in that dtype everywhere, as the projections do in whose place they stand.
        """
        self.state_maps.to(dtype)
        for kind in self.kinds:
            for layer in self.exit_layers:
                classifier = self.at(kind, layer)
                if next(classifier.parameters()).device.type == "cuda":
                    for name in classifier.narrowed:
                        part = classifier.get_submodule(name)
                        for parameter, value in list(part.named_parameters()):
                            setattr(part, parameter, nn.Parameter(value.to(dtype), requires_grad=False))

    def place(self, devices: Sequence[torch.device]) -> None:
        """Puts what belongs to each exit on the device of the block before it; ``devices``: of all blocks, in order."""
        at_exits: Any
        for at_exits in (*self.by_kind.values(), self.adapters):
            for layer, module in at_exits.items():
                module.to(devices[int(layer) - 1])
        # Logits are where the model ends.
        self.confirmers.to(devices[-1])
        for (_, block), state_map in self.maps_by_exit_and_block().items():
            state_map.to(devices[block - 1])

    def maps_by_exit_and_block(self) -> dict[tuple[int, int], StateMap]:
        """The maps that predict states of tokens that left; none where these exits have none."""
        return by_exit_and_block(self.state_maps)

    def adapter(self, layer: int) -> Adapter | None:
        """The adapter at an exit layer, if these exits have any."""
        adapters: Any = self.adapters
        return adapters[str(layer)] if len(adapters) else None

    def adapter_macs(self) -> dict[int, int]:
        """MACs of one read-out's correction at each exit layer; empty without adapters."""
        adapters = {layer: self.adapter(layer) for layer in self.exit_layers}
        return {layer: adapter.macs for layer, adapter in adapters.items() if adapter is not None}

    def state_map_macs(self) -> tuple[int, ...]:
        """MACs that a learned state costs beyond a recomputed one, by block; empty without maps."""
        return () if self.states is None else self.states.macs()

    def costs(self, kind: str) -> dict[int, EvaluationCost]:
        """Cost of one evaluation at each exit layer."""
        return {layer: self.at(kind, layer).cost for layer in self.exit_layers}
