"""The parts that every causal LM of transformers has, whatever its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.base import Backbone, FinalParts
from dynamax_lm_eval.backbones.linear import is_plain, linear, product
from dynamax_lm_eval.models.blocks import find_blocks
from dynamax_lm_eval.models.placement import Place, execution_device, moved


class ModelBackbone(Backbone):
    """A causal LM of transformers and its list of blocks."""

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.

        Raises:
            UserError: its blocks are not found.
        """
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config: Any = self.model.config.get_text_config()
        self.name = type(self.model).__name__
        depth = getattr(self.config, "num_hidden_layers", None)
        self._layers: list[Any] = find_blocks(self.model, depth, self.name)
        self.num_layers = len(self._layers)
        self._embeddings: nn.Module = self.model.get_input_embeddings()
        self.num_embeddings = int(getattr(self._embeddings, "num_embeddings", self.config.vocab_size))
        self._lm_head: Any = self.model.get_output_embeddings()
        # Not the configuration's: added tokens may have resized the head.
        self.vocab_size = int(getattr(self._lm_head, "out_features", self.config.vocab_size))
        self.device = execution_device(self._embeddings)
        self.places = [Place(layer) for layer in self._layers]
        self.head_place = Place(self._lm_head if isinstance(self._lm_head, nn.Module) else self._layers[-1])
        self.output_device = self.head_place.device

    def by_head(self, normed: Tensor) -> Tensor:
        """Returns the logits (T, V) of normalised hidden states (T, D), by the LM head."""
        with self.head_place.weights():
            return linear(self._lm_head, moved(normed, self.output_device)).contiguous()

    def by_head_rows(self, normed: Tensor, first: int, others: Tensor) -> Tensor:
        """Returns what :meth:`by_head` does of tokens 0..first - 1 and of ``others`` (o,), (T, first + o)."""
        with self.head_place.weights():
            normed = moved(normed, self.output_device)
            weight, bias = self._lm_head.weight, self._lm_head.bias
            parts = [
                product(normed, weight[rows], None if bias is None else bias[rows])
                for rows in (slice(first), others)
                if not isinstance(rows, Tensor) or len(rows)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @property
    def has_head_rows(self) -> bool:
        """Whether rows of the head can be read: it is not quantised, split or changed, and has one for every token."""
        head = self._lm_head
        is_whole = is_plain(head) and head.weight.is_floating_point() and not hasattr(head.weight, "full_tensor")
        return is_whole and self.num_embeddings <= self.vocab_size


class DecoderBackbone(ModelBackbone):
    """A backbone of embeddings, a list of blocks, a final norm and an LM head."""

    def __init__(self, model: Any, final_norms: tuple[str, ...]) -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.
            final_norms: names that the final norm may have.

        Raises:
            UserError: parts of it are not found.
        """
        super().__init__(model)
        self.hidden_size = int(self.config.hidden_size)
        self._decoder = _holder_of(self.model, self._layers)
        self._final_norm = families.child(self._decoder, final_norms, f"final norm in {self.name}")

    def embed(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self._embeddings(ids.unsqueeze(0))
        return hidden

    @property
    def final_parts(self) -> FinalParts | None:
        return FinalParts(self._final_norm, self._lm_head)

    def check_readout_of(self) -> None:
        if not self.has_head_rows:
            super().check_readout_of()


def _holder_of(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """Returns the module that holds the list of blocks."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and list(child) == list(blocks):
                return module
    raise AssertionError("the blocks are the model's")
