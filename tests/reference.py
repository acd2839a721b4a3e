"""Early exit written a second time, slowly: one row, one token at a time, dense attention.

Independent of the engine: it calls the family's own blocks with transformers' eager attention and a plain
cache of lists, so that agreement with the engine means something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dynamax_lm_eval.exits.policy import ExitPolicy

#: Kinds of classifiers that see one token after the other.
RECURRENT = ("mamba", "hybrid")
#: What the states of the families' blocks are made of, in the order in which maps give them.
STATE_PROJECTIONS = ("self_attn.k_proj", "self_attn.v_proj", "attention.query_key_value", "mixer.in_proj")


@dataclass
class Row:
    """What a row of the reference has seen and decided."""

    layers: list[int] = field(default_factory=list)  # of every token
    logits: list[Tensor] = field(default_factory=list)  # of every token
    confidences: list[float] = field(default_factory=list)  # all that were compared, less their threshold
    block_calls: int = 0
    refused: list[int] = field(default_factory=list)  # exits at which a read did not confirm
    asked: dict[int, dict[int, float]] = field(default_factory=dict)  # confidences of each token, by exit


class _ListCache:
    """K, V and positions of one block, in order of writing."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: list[int] = []
        self.pending: int = 0

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(key)
        self.values.append(value)
        self.positions.append(self.pending)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


class Decisions:
    """What a row of a reference has seen, and whether its tokens leave; how blocks run is the reference's own."""

    def __init__(
        self, model: Any, policy: ExitPolicy, prompt_length: int, max_steps: int, classifiers: Any = None
    ) -> None:
        self.model = model
        self.classifiers = classifiers
        self.seen: dict[int, list[Tensor]] = {}  # exit layer -> hidden states that its classifier saw
        self.policy = policy
        self.prompt_length = prompt_length
        self.max_steps = max_steps
        self.prompt: list[int] = []  # all of it, before it is fed; only what looks at a part of the vocabulary needs it
        self.row = Row()

    def feed(self, token: int) -> Tensor:
        """Runs one token, keeps its states, returns its logits (V,)."""
        raise NotImplementedError

    def _prunes(self, block: int, position: int) -> bool:
        is_spared = self.policy.prune_scope == "generated" and position < self.prompt_length
        return block in self.policy.pruned_blocks and not is_spared

    def _readout(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def _exits(self, block: int, before: Tensor, after: Tensor, step: int) -> bool:
        policy = self.policy
        if block not in policy.exit_layers:
            return False
        threshold = policy.thresholds[policy.exit_layers.index(block)]
        if threshold >= 1:
            return False
        if policy.threshold_decay is not None:
            threshold = 0.9 * threshold + 0.1 * math.exp(-policy.threshold_decay * step / self.max_steps)
            threshold = min(max(threshold, 0.0), 1.0)
        if policy.confidence in ("classifier", "cascade"):
            seen = self.seen[block] if policy.classifier in RECURRENT else [after.flatten()]
            confidence = float(slow_classifier(self.classifiers.at(policy.classifier, block), seen).softmax(-1)[1])
            if policy.propose is not None:
                self.row.confidences.append(confidence - policy.propose)
                if confidence < policy.propose:
                    return False
                p = self._looked_at(self._readout(self._adapted(after, block))).softmax(-1)
                confidence = self._confirmed(confidence, p, block)
                self.row.refused += [block] if confidence < threshold else []
        elif policy.confidence == "state":
            a, b = before.flatten(), after.flatten()
            confidence = max(0.0, float(a @ b / (a.norm() * b.norm())))
        else:
            p = self._looked_at(self._readout(self._adapted(after, block))).softmax(-1)
            if policy.confidence == "softmax":
                first, second = p.sort(descending=True).values[:2].tolist()
                confidence = first - second
            else:
                confidence = 1 - float(-(p * p.log()).sum()) / math.log(len(p))
        assert math.isfinite(confidence)
        self.row.asked.setdefault(len(self.row.layers), {})[block] = confidence
        self.row.confidences.append(confidence - threshold)
        return confidence > threshold if policy.above_threshold else confidence >= threshold

    def _confirmed(self, proposed: float, p: Tensor, block: int) -> float:
        first, second = p.sort(descending=True).values[:2].tolist()
        if self.policy.confirm == "read_out":
            return first
        confirmer = self.classifiers.confirmer(self.policy.classifier, block)
        known = [math.log(proposed / (1 - proposed)), math.log(first / (1 - first)), first - second]
        z = sum(w * x for w, x in zip(confirmer.weight.tolist(), known, strict=True)) + float(confirmer.bias)
        return 1 / (1 + math.exp(-z))

    def _looked_at(self, logits: Tensor) -> Tensor:
        size = self.policy.vocab_subset
        if size is None:
            return logits
        tokens: list[int] = []
        for token in [*self.prompt[::-1], *range(len(logits))]:
            if token not in tokens and len(tokens) < size:
                tokens.append(token)
        return logits[torch.tensor(tokens)]

    def _adapted(self, hidden: Tensor, layer: int) -> Tensor:
        if self.policy.adapter == "none":
            return hidden
        parts = dict(self.classifiers.adapter(layer).named_parameters())
        matrix = parts["up.weight"] if "down.weight" not in parts else parts["up.weight"] @ parts["down.weight"]
        corrected = hidden + hidden @ matrix.T + parts["up.bias"]
        if "gate_up.weight" in parts:
            normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            gate, up = (normed @ parts["gate_up.weight"].T).chunk(2, dim=-1)
            corrected = corrected + (gate * gate.sigmoid() * up) @ parts["mlp_down.weight"].T
        return corrected

    def _show_classifier(self, block: int, hidden: Tensor, position: int, first: int) -> None:
        policy = self.policy
        if policy.classifier not in RECURRENT or block not in policy.exit_layers:
            return
        if policy.thresholds[policy.exit_layers.index(block)] >= 1:
            return
        everywhere = policy.exit_scope == "all"
        warmup = policy.classifier_warmup
        if policy.prompt_exit_layer is not None:
            warmup = min(warmup, policy.prompt_exit_keep)
        if everywhere or position >= min(first, self.prompt_length - warmup):
            self.seen.setdefault(block, []).append(hidden.flatten())


@contextmanager
def learned_projections(layer: Any, exits: Any, exit_layer: int | None, block: int) -> Iterator[None]:
    """Lets the projections that a block's states are made of return what a map makes of their input; None: nothing."""
    if exit_layer is None:
        yield
        return
    parts = dict(exits.state_maps[str(exit_layer)][str(block)].named_parameters())
    own = {name: module for name, module in layer.named_modules() if name in STATE_PROJECTIONS}
    names = [name for name in STATE_PROJECTIONS if name in own]
    widths = [own[name].out_features for name in names]

    def hook(name: str) -> Any:
        def replace(module: Any, args: Any, output: Tensor) -> Tensor:
            (x,) = args
            width, first = output.shape[-1], sum(widths[: names.index(name)])
            rows = slice(0, width)
            if name == "mixer.in_proj":  # the map gives nothing for the gate
                inner = layer.mixer.intermediate_size
                rows = slice(inner, width) if hasattr(layer.mixer, "n_groups") else slice(0, inner)
            chosen = slice(first, first + width) if name != "mixer.in_proj" else slice(None)
            if "down" in parts:
                made = output[..., rows] + ((x @ parts["down"].T) @ parts["weight"].T + parts["bias"])[..., chosen]
            else:
                made = (x @ parts["weight"].T + parts["bias"])[..., chosen]
            output = output.clone()
            output[..., rows] = made
            return output

        return replace

    hooks = [own[name].register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class Reference(Decisions):
    """Feeds one row token by token under a policy."""

    def __init__(self, model: Any, *args: Any) -> None:
        super().__init__(model, *args)
        self.config = model.config
        self.inner = next(m for m in model.children() if hasattr(m, "layers"))
        self.caches = [_ListCache() for _ in self.inner.layers]
        self.inputs: dict[int, Tensor] = {}  # of each block, for the last token that ran it
        self.is_mamba = "mamba" in self.config.model_type
        self.mamba_cache = DynamicCache(config=self.config) if self.is_mamba else None

    @torch.no_grad()
    def feed(self, token: int) -> Tensor:
        """Runs one token, keeps its states, returns its logits (V,)."""
        position = len(self.row.layers)
        policy, depth = self.policy, len(self.inner.layers)
        hidden = self.model.get_input_embeddings()(torch.tensor([[token]]))
        first = 1 if policy.exit_scope == "all" else self.prompt_length
        exit_layer, last_run = depth, 0
        for block in range(1, depth + 1):
            if self._prunes(block, position):
                continue
            if exit_layer < depth and not (policy.final_block and block == depth):
                self._leave_state(block, last_run, hidden, position)
                continue
            before = hidden
            hidden = self._block(block, hidden, position)
            self.inputs[block] = before
            last_run = block
            if exit_layer < depth:
                continue
            self._show_classifier(block, hidden, position, first)
            if position >= first and self._exits(block, before, hidden, position - first):
                exit_layer = block
            if block == policy.prompt_exit_layer and position < self.prompt_length - policy.prompt_exit_keep:
                exit_layer = block
        self.row.layers.append(exit_layer)
        logits = self._readout(self._adapted(hidden, exit_layer) if exit_layer < depth else hidden)
        self.row.logits.append(logits)
        return logits

    def _leave_state(self, block: int, last_run: int, hidden: Tensor, position: int) -> None:
        if self.policy.state_mode in ("recompute", "learned"):
            is_learned = self.policy.state_mode == "learned" and block > last_run + 1
            exit_layer = last_run if is_learned else None
            with learned_projections(self.inner.layers[block - 1], self.classifiers, exit_layer, block):
                self._block(block, hidden, position)  # writes K and V; the output is thrown away
            self.row.block_calls -= 1
        elif self.policy.state_mode == "copy_previous":
            # What the block made of that token, as if it stood here.
            self._block(block, self.inputs[block], position)
            self.row.block_calls -= 1
        elif self.policy.state_mode == "copy":
            source, target = self.caches[last_run - 1], self.caches[block - 1]
            target.pending = position
            target.update(source.keys[-1], source.values[-1])

    def _block(self, block: int, hidden: Tensor, position: int) -> Tensor:
        self.row.block_calls += 1
        layer = self.inner.layers[block - 1]
        if self.is_mamba:
            return layer(hidden, cache_params=self.mamba_cache)
        cache = self.caches[block - 1]
        cache.pending = position
        ids = torch.tensor([[position]])
        types = getattr(self.config, "layer_types", None)
        kind = [types[block - 1]] if self.config.model_type.startswith("gemma3") else []
        rotary = self.inner.rotary_emb(hidden, ids, *kind)
        name = "layer_past" if self.config.model_type == "gpt_neox" else "past_key_values"
        before, self.config._attn_implementation = self.config._attn_implementation, "eager"
        output = layer(
            hidden,
            attention_mask=self._mask(block, position),
            position_ids=ids,
            position_embeddings=rotary,
            use_cache=True,
            **{name: cache},
        )
        self.config._attn_implementation = before
        return output[0] if isinstance(output, tuple) else output

    def _mask(self, block: int, position: int) -> Tensor:
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if types is not None and types[block - 1] != "sliding_attention":
            window = None
        seen = [*self.caches[block - 1].positions, position]
        far = [window is not None and position - other >= window for other in seen]
        return torch.tensor(far).float().mul(-1e9).view(1, 1, 1, -1)

    def _readout(self, hidden: Tensor) -> Tensor:
        norm = next(
            getattr(self.inner, name) for name in ("norm", "final_layer_norm", "norm_f") if hasattr(self.inner, name)
        )
        return self.model.get_output_embeddings()(norm(hidden))[0, 0].float()


def slow_classifier(classifier: Any, seen: list[Tensor]) -> Tensor:
    """Logits (2,) for the last of the hidden states (D,) that a classifier saw, one after the other."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * weight

    parts = dict(classifier.named_parameters())
    inputs = [norm(hidden.float(), parts["norm.weight"]) for hidden in seen]
    if not classifier.recurrent:
        x = inputs[-1]
        if "in_proj.weight" in parts:
            x = torch.nn.functional.silu(parts["in_proj.weight"] @ x + parts["in_proj.bias"])
        return parts["out_proj.weight"] @ x + parts["out_proj.bias"]
    shape = classifier.shape
    state = torch.zeros(shape.heads, shape.head_dim, shape.state)
    window = [torch.zeros(shape.channels)] * shape.kernel
    for x in inputs:
        projected = parts["in_proj.weight"] @ x
        gate, channels, dt = projected[: shape.inner], projected[shape.inner : -shape.heads], projected[-shape.heads :]
        window = [*window[1:], channels]
        mixed = sum(window[k] * parts["conv_weight"][:, k] for k in range(shape.kernel)) + parts["conv_bias"]
        mixed = mixed * mixed.sigmoid()
        values = mixed[: shape.inner].view(shape.heads, shape.head_dim)
        b, c = mixed[shape.inner :].chunk(2)  # one group
        step = (1 + (dt + parts["dt_bias"]).exp()).log()
        decay = (-step * parts["A_log"].exp()).exp()
        state = decay[:, None, None] * state + (step[:, None] * values)[:, :, None] * b
        y = (state * c).sum(-1) + parts["D"][:, None] * values
        y = norm(y.flatten() * gate * gate.sigmoid(), parts["gate_norm.weight"])
    if "hidden_proj.weight" in parts:
        both = torch.cat([y, inputs[-1]])
        y = torch.nn.functional.silu(parts["hidden_proj.weight"] @ both + parts["hidden_proj.bias"])
    return parts["out_proj.weight"] @ y + parts["out_proj.bias"]


def reference_generate(
    model: Any,
    policy: ExitPolicy,
    prompt: list[int],
    max_new: int,
    classifiers: Any = None,
    kind: type[Decisions] = Reference,
) -> tuple[list[int], Row]:
    """Greedy tokens after a prompt, by a reference of this kind."""
    reference = kind(model, policy, len(prompt), max_new, classifiers)
    reference.prompt = prompt
    for token in prompt:
        logits = reference.feed(token)
    generated = [int(logits.argmax())]
    while len(generated) < max_new:
        generated.append(int(reference.feed(generated[-1]).argmax()))
    return generated, reference.row


def reference_score(
    model: Any,
    policy: ExitPolicy,
    context: list[int],
    continuation: list[int],
    classifiers: Any = None,
    kind: type[Decisions] = Reference,
) -> tuple[list[float], Row]:
    """Log-probability of each continuation token, fed one by one to a reference of this kind."""
    reference = kind(model, policy, len(context), len(continuation), classifiers)
    reference.prompt = context
    for token in [*context, *continuation[:-1]]:
        reference.feed(token)
    wanted = reference.row.logits[len(context) - 1 :]
    scores = [float(logits.log_softmax(-1)[token]) for logits, token in zip(wanted, continuation, strict=True)]
    return scores, reference.row
