"""Labels of exits against transformers' own forward."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import tiny_model
from helpers_engine import EXITS
from helpers_training import ROWS, frozen

from dynamax_lm_eval.frozen.passes import best_tokens
from dynamax_lm_eval.training.trainer import labelled_positions


class TestLabels:
    @pytest.mark.parametrize("top_k", [1, 4])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_equal_a_direct_computation(self, family: str, top_k: int) -> None:
        model = copy.deepcopy(tiny_model(family))  # asking for hidden states leaves hooks in it
        pass_ = frozen(family, top_k)
        batch = pass_.run(ROWS)
        labels = pass_.label(batch, torch.arange(sum(map(len, ROWS))))
        within, agrees = [], []
        for row in ROWS:
            with torch.no_grad():
                output = model(torch.tensor([row]), output_hidden_states=True)
                best = output.logits[0].topk(top_k).indices
                for layer in EXITS:
                    norm = next(m for m in model.children() if hasattr(m, "layers")).norm
                    found = model.lm_head(norm(output.hidden_states[layer][0])).argmax(-1)
                    within.append((found[:, None] == best).any(-1))
                    agrees.append(found == output.logits[0].argmax(-1))
        expected = [torch.cat(within[i :: len(EXITS)]) for i in range(len(EXITS))]
        assert torch.equal(labels.within_k, torch.stack(expected))
        assert torch.equal(labels.agrees, torch.stack([torch.cat(agrees[i :: len(EXITS)]) for i in range(len(EXITS))]))
        assert 0 < labels.within_k.sum() < labels.within_k.numel()

    def test_with_a_final_block_the_read_out_is_after_it(self) -> None:
        pass_ = frozen(final_block=True)
        batch = pass_.run(ROWS[:1])
        without = frozen().run(ROWS[:1])
        model = tiny_model("llama")
        with torch.no_grad():
            hidden = without.exits[3].unsqueeze(0)
            positions = torch.arange(len(ROWS[0])).unsqueeze(0)
            mask = torch.full((1, 1, len(ROWS[0]), len(ROWS[0])), -1e9).triu(1)
            rotary = model.model.rotary_emb(hidden, positions)
            expected = model.model.layers[-1](hidden, attention_mask=mask, position_embeddings=rotary)
        torch.testing.assert_close(batch.reads[3].unsqueeze(0), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.exits[3], without.exits[3])

    @pytest.mark.parametrize(("vocab", "k"), [(97, 1), (97, 5), (1024, 1), (1000, 7), (4097, 3)])
    def test_best_tokens_are_topk(self, vocab: int, k: int) -> None:
        logits = torch.randn(50, vocab)
        assert torch.equal(best_tokens(logits, k), logits.topk(k).indices)

    def test_positions_are_reproducible_and_differ_from_batch_to_batch(self) -> None:
        first = labelled_positions(3, 0, np.arange(100), 25)
        assert torch.equal(first, labelled_positions(3, 0, np.arange(100), 25))
        assert not torch.equal(first, labelled_positions(3, 1, np.arange(100), 25))
        assert len(first.unique()) == 25
