"""The oracle: where each token would leave if it were known which read-outs agree with the full model.

A bound on every way to decide, at no cost of deciding. Knows what read-outs agree and what layers cost; runs nothing.
T tokens that may leave, E exits, index E for none.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.backbones.base import BoolArray, IntArray
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits.policy import ExitPolicy


def exit_macs(engine: Engine, policy: ExitPolicy, positions: IntArray) -> IntArray:
    """Returns the MACs (E + 1, T) of a token that leaves at each exit of a policy, or at none, by the accounting.

    Everything that leaving there causes is in them: state recompute, adapter, final block. Deciding is not, unless
    the policy's confidence costs something.
    """
    places, index = np.unique(positions, return_inverse=True)
    macs = np.empty((len(policy.exit_layers) + 1, len(places)), dtype=np.int64)
    for i, layer in enumerate((*policy.exit_layers, policy.num_layers)):
        for j, position in enumerate(places.tolist()):
            trace = Trace(position, position + 1, 2, (layer,), generated=False)
            macs[i, j] = engine.account(trace, policy).spent_macs
    by_token: IntArray = macs[:, index]
    return by_token


def allowed_errors(agreement: float, tokens: int) -> int:
    """Returns how many of ``tokens`` may disagree so that at least this share agrees."""
    return math.floor((1 - agreement) * tokens + 1e-6)


def oracle_exits(agrees: BoolArray, macs: npt.NDArray[np.int64], errors: int) -> IntArray:
    """Returns the index (T,) of the exit at which each token leaves.

    Without errors that is the first exit whose read-out agrees. A token that may be wrong leaves where that is
    cheapest. What that saves is its own affair, so the best ``errors`` tokens to be wrong are those that save the most
    by it: exact, not an approximation, because an error is one token and its savings depend on no other's.

    Args:
        agrees: (E, T).
        macs: (E + 1, T) of leaving at each exit, or at none.
        errors: the most tokens that may leave where they do not agree.
    """
    tokens = np.arange(agrees.shape[1])
    left: IntArray = np.where(agrees.any(0), agrees.argmax(0), len(agrees)).astype(np.int64)
    cheapest = macs[:-1].argmin(0)
    saves = macs[left, tokens] - macs[cheapest, tokens]
    wrong = np.argsort(-saves, kind="stable")[:errors]
    wrong = wrong[saves[wrong] > 0]
    left[wrong] = cheapest[wrong]
    return left
