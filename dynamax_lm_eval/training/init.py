"""Training that goes on from other exits: which of their weights fit, and what is refused."""

from __future__ import annotations

import torch

from dynamax_lm_eval.errors import UserError, changed_settings
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint, ExitConfig
from dynamax_lm_eval.exits.classifiers import ExitClassifiers

#: Settings of exits that weights have to agree on.
_SHARED = ("exit_layers", "activation", "options", "final_block", "top_k", "label", "label_final_block")


def start_from(earlier: ExitCheckpoint, config: ExitConfig, classifiers: ExitClassifiers) -> None:
    """Gives classifiers and adapters the weights of earlier exits; an MLP that these lack begins as it was made.

    Args:
        earlier: the exits to go on from.
        config: of the exits that are trained.
        classifiers: these, freshly made; changed in place.

    Raises:
        UserError: the earlier exits are of another backbone, or of other kinds or sizes.
    """
    called = f"--init {str(earlier.path)!r}"
    theirs = earlier.config
    earlier.check_fingerprint(config.backbone.fingerprint)
    then, now = ({name: getattr(of, name) for name in _SHARED} for of in (theirs, config))
    if different := changed_settings(then, now):
        raise UserError(
            f"{called}: these exits differ from those that are asked for: {different}; give the same options"
        )
    if missing := sorted(set(config.classifiers) - set(theirs.classifiers)):
        raise UserError(
            f"{called}: there is no {', '.join(missing)} there; name kinds of {', '.join(theirs.classifiers)}"
        )
    grows = theirs.adapter == "affine" and config.adapter.startswith("swiglu:")
    if theirs.adapter != config.adapter and not grows:
        raise UserError(f"{called}: its adapters are {theirs.adapter}, and --adapter is {config.adapter}")
    known = earlier.load().state_dict()
    own = classifiers.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            if name in known and not name.startswith("state_maps."):
                tensor.copy_(known[name])
