"""Where a model of transformers keeps its blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynamax_lm_eval.errors import UserError

#: Parts of paths to lists that are none of text blocks.
_OTHER_LISTS = ("vision", "visual", "audio", "expert")


def find_blocks(model: Any, depth: int | None, name: str) -> list[nn.Module]:
    """Returns the blocks of the text decoder, in order.

    Args:
        model: a causal LM.
        depth: how many its configuration names; lists of that length come first, and of those the decoder's own.
        name: what messages call it.

    Raises:
        UserError: it has no list of blocks.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    roots = [decoder, model] if isinstance(decoder, nn.Module) else [model]
    lists: list[nn.ModuleList] = [
        module
        for root in roots
        for path, module in root.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and all(any(part.children()) for part in module)
        and not any(word in path for word in _OTHER_LISTS)
    ]
    for module in lists:
        if len(module) == depth:
            return list(module)
    named = [module for module in lists if type(module[0]).__name__.endswith(("Layer", "Block"))]
    if not named:
        raise UserError(f"{name} has no list of {depth or 'its'} blocks; its architecture is not supported")
    return max((list(blocks) for blocks in named), key=len)
