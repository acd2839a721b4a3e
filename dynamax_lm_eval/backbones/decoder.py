"""What every causal LM of transformers has, whatever its blocks; and tokens that left, which both kinds of pass keep.

m tokens that left, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.base import Backbone, IntArray, RowLayout


class DecoderBackbone(Backbone):
    """Embeddings, a list of blocks, a final norm and an LM head."""

    def __init__(self, model: Any, final_norms: tuple[str, ...]) -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.
            final_norms: names that the final norm may have.

        Raises:
            UserError: parts of it are not found.
        """
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config: Any = self.model.config.get_text_config()
        self.name = type(self.model).__name__
        path, self._layers = families.find_layers(self.model, self.config.num_hidden_layers, self.name)
        self._decoder: nn.Module = self.model.get_submodule(path)
        self.num_layers = len(self._layers)
        self.hidden_size = int(self.config.hidden_size)
        self._embeddings: nn.Module = self.model.get_input_embeddings()
        self.num_embeddings = int(getattr(self._embeddings, "num_embeddings", self.config.vocab_size))
        self._lm_head: Any = self.model.get_output_embeddings()
        self._final_norm = families.child(self._decoder, final_norms, f"a final norm in {self.name}")
        # Not the configuration's: added tokens may have resized the head.
        self.vocab_size = int(getattr(self._lm_head, "out_features", self.config.vocab_size))
        self.device = next(self._layers[0].parameters()).device

    def embed(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self._embeddings(ids.unsqueeze(0))
        return hidden


@dataclass(frozen=True)
class LeftTokens:
    """Tokens that left and whose states later blocks recompute."""

    tokens: IntArray  # (m,)
    hidden: Tensor | None  # (1, m, D); None: there are none

    @classmethod
    def none(cls) -> LeftTokens:
        return cls(np.empty(0, dtype=np.int64), None)

    def joined(self, tokens: IntArray, hidden: Tensor, layout: RowLayout) -> LeftTokens:
        """With those of the tokens (t,), hidden states (1, t, D), whose rows recompute states."""
        modes = np.asarray(layout.state_modes)[layout.row_of[tokens]]
        more = LeftTokens(tokens, hidden)._chosen(modes == "recompute")
        if self.hidden is None or more.hidden is None:
            return more if self.hidden is None else self
        return LeftTokens(np.concatenate([self.tokens, more.tokens]), torch.cat([self.hidden, more.hidden], dim=1))

    def at(self, block: int, layout: RowLayout) -> LeftTokens:
        """Those that a block (1-based) gets states of: not where it is pruned, or is a final block that runs."""
        if self.hidden is None:
            return self
        rows = layout.row_of[self.tokens]
        runs = layout.runs_block[rows, block]
        if block == layout.runs_block.shape[1] - 1:
            runs = runs & ~layout.final_block[rows]
        return self._chosen(runs)

    def _chosen(self, mask: Any) -> LeftTokens:
        if mask.all():
            return self
        places = np.flatnonzero(mask)
        if self.hidden is None or len(places) == 0:
            return LeftTokens.none()
        chosen = torch.from_numpy(places).to(self.hidden.device)
        return LeftTokens(self.tokens[places], self.hidden.index_select(1, chosen))
