"""What torch calls at the end of ``import torch``: the bridge of ``dynamax_lm_eval``, where that is there.

torch does not import at all where an entry point of its group cannot be imported. So this module stands beside the
package and not in it: an installation copies it, also an editable one, and when the checkout has been moved or
deleted, only ``--model dynamax`` is gone.
"""


def register() -> None:
    """Registers the model; does nothing where the package cannot be imported. Never raises."""
    try:
        from dynamax_lm_eval import _autoload
    except Exception:  # a checkout may also be broken while it is edited
        return
    _autoload.register()
