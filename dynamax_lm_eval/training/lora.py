"""``train --lora``: LoRA on a backbone's blocks, so that what is read out early agrees sooner with the model as it was.

The teacher is the same model without the adapters. Loss: KL divergence of its distribution to that of each exit's plain
read-out (final norm and LM head), summed over the exits with the weights of their classifiers, and ``--lora_keep``
times that to the adapted model's own at full depth, which keeps the model what it is. Blocks run by transformers' own
forward. The result is a folder of PEFT; exits are trained on the model under it afterwards, as on any other.

R rows of W tokens, N tokens without padding, n labelled positions, E exits, D hidden.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynamax_lm_eval.backbones.base import Backbone
from dynamax_lm_eval.engine.parity import engine_without_weights
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import naming
from dynamax_lm_eval.frozen.passes import FrozenPass, Target, descend
from dynamax_lm_eval.frozen.text import Documents
from dynamax_lm_eval.models import aliases
from dynamax_lm_eval.models.blocks import find_blocks
from dynamax_lm_eval.models.loading import described
from dynamax_lm_eval.training import state
from dynamax_lm_eval.training.batches import MicroBatches
from dynamax_lm_eval.training.log import LOG_NAME, cut_log
from dynamax_lm_eval.training.loop import Loop
from dynamax_lm_eval.training.options import RunOptions, TrainingOptions
from dynamax_lm_eval.training.output import LORA_NAME, STATE_NAME
from dynamax_lm_eval.training.trainer import (
    Processes,
    exit_weights,
    labelled_batches,
    learning_rate,
    update,
)

logger = logging.getLogger(__name__)

#: Layers of a Mamba mixer whose weights are also read past the module, so that LoRA would be left out there.
_READ_DIRECTLY = ("out_proj", "dt_proj")
#: LoRA's alpha over its rank.
_ALPHA = 2


@dataclass(frozen=True)
class LoraReport:
    """What one optimiser step did; divergences are means over the labelled positions, before the step."""

    step: int
    tokens: int
    learning_rate: float
    exits: list[float]  # of the original model's distribution to each exit's
    full_depth: float  # to the adapted model's own
    gradient_norm: float


def check(options: TrainingOptions, run: RunOptions, structure: Any) -> None:
    """Refuses, before weights load, what ``--lora`` cannot be had with; does nothing without it.

    Args:
        options: of the training.
        run: how it is run.
        structure: the backbone without weights; None where it cannot be built.

    Raises:
        UserError: there is no output folder or no PEFT, or this backbone cannot be adapted.
    """
    if options.lora is None:
        return
    if run.output is None:
        raise UserError("--lora needs --output, the folder that it is kept in for evaluations with peft=; add it")
    try:
        import peft  # noqa: F401 - whether it is there
    except ImportError:
        raise UserError("--lora needs the package peft; run: pip install peft") from None
    draft = engine_without_weights(structure, options.seq_len)
    if draft is not None:
        _check_vectors(draft.backbone)
    if structure is not None:
        adapted(structure, options.lora, options.seed)


def _check_vectors(backbone: Backbone) -> None:
    """Refuses, with a UserError, a model whose blocks give several vectors per token."""
    if backbone.hidden_size != backbone.model.config.get_text_config().hidden_size:
        raise UserError(f"--lora: blocks of {backbone.name} give several vectors per token; remove --lora")


def linear_layers(model: Any) -> list[str]:
    """Returns the paths of the linear layers in the blocks of a causal LM of transformers that LoRA is put on."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = {id(module) for block in find_blocks(model, depth, type(model).__name__) for module in block.modules()}
    paths = []
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        in_mamba = hasattr(model.get_submodule(parent), "A_log")
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D)):
            paths += [] if in_mamba and name in _READ_DIRECTLY else [path]
    return paths


def adapted(model: Any, rank: int, seed: int) -> Any:
    """Puts LoRA on the linear layers of a model's blocks, in place; returns PEFT's model, which computes the same.

    Raises:
        UserError: there are none, or PEFT refuses.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    name, paths = type(model).__name__, linear_layers(model)
    if not paths:
        raise UserError(f"--lora: {name} has no linear layers in its blocks that PEFT could adapt; remove --lora")
    config = LoraConfig(r=rank, lora_alpha=_ALPHA * rank, target_modules=paths, task_type=TaskType.CAUSAL_LM)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except Exception as error:  # whatever PEFT says of a family
        raise UserError(f"--lora: PEFT cannot adapt {name} ({described(error)}); remove --lora") from error


class LoraTrainer:
    """Trains LoRA on the model of a backbone, in place; one call of :meth:`step` per optimiser step."""

    def __init__(self, frozen: FrozenPass, options: TrainingOptions, processes: Processes | None = None) -> None:
        assert options.lora is not None, "the options ask for it"
        self.frozen = frozen
        self.options = options
        self.processes = processes or Processes()
        backbone = frozen.backbone
        _check_vectors(backbone)
        self._blocks = find_blocks(backbone.model, backbone.num_layers, backbone.name)
        #: PEFT's model around that of the backbone.
        self.model = adapted(backbone.model, options.lora, options.seed)
        #: The weights of the adapters.
        self.weights = nn.ParameterList(p for p in self.model.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=options.lora_learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        #: Of the exits and of full depth, in the loss.
        self._shares = [*exit_weights(len(frozen.exit_layers)), options.lora_keep]

    def step(self, step: int, batches: MicroBatches) -> LoraReport:
        """Optimiser step number ``step`` (from 0) on the next micro-batches.

        Raises:
            UserError: a gradient is not finite; the weights are as before the step.
        """
        options = self.options
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(self._shares), device=self.frozen.backbone.device)
        for _, rows, positions in labelled_batches(batches, step, options, self.processes):
            sums += self.accumulate(rows, positions, 1 / options.micro_batches)
        values = (self.processes.add_up(sums) / options.micro_batches).tolist()
        rate = learning_rate(step, options.lora_steps, options.lora_learning_rate, options.warmup_share)
        failure = (
            f"--lora, step {step + 1}: the gradient of {{names}} is not finite; the last saved state is good. "
            "Use --dtype float32 or a lower --lora_learning_rate"
        )
        norms = update(self.optimizer, {"lora": list(self.weights)}, rate, options.clip, self.processes, failure)
        return LoraReport(
            step=step + 1,
            tokens=(step + 1) * options.batch_tokens,
            learning_rate=rate,
            exits=values[:-1],
            full_depth=values[-1],
            gradient_norm=norms["lora"],
        )

    def accumulate(self, rows: Sequence[Sequence[int]], positions: Tensor, weight: float) -> Tensor:
        """Adds ``weight`` times the gradient of the loss on some rows.

        Args:
            rows: token ids, N in all.
            positions: (n,) the tokens of these that count.
            weight: of the rows in the step.

        Returns:
            (E + 1,) the mean divergences of the exits and of full depth.

        Raises:
            UserError: the backbone does not know an id.
        """
        backbone, layers = self.frozen.backbone, self.frozen.exit_layers
        for row in rows:
            backbone.check_ids(row)
        positions = positions.to(backbone.device)
        with torch.no_grad(), self.model.disable_adapter():
            (teacher,) = self._hidden(rows, (backbone.num_layers,), positions)
        with torch.enable_grad():
            hidden = self._hidden(rows, (*layers, backbone.num_layers), positions)
        # Read-outs are made a few tokens at a time, so their gradients end here and go through the blocks together.
        ends = [states.detach().requires_grad_() for states in hidden]
        divergences = torch.zeros(len(ends), device=backbone.device)
        for part in torch.arange(len(positions), device=backbone.device).split(self.frozen.read_at_once):
            with torch.no_grad():
                target = Target.of(self.frozen.read_out(teacher[part]))
            for i, (end, share) in enumerate(zip(ends, self._shares, strict=True)):
                with torch.enable_grad():
                    logits = self.frozen.read_out(end[part])
                divergences[i] += descend(logits, target, weight * share / len(positions)) / len(positions)
        torch.autograd.backward(hidden, [end.grad for end in ends])
        return divergences

    def _hidden(self, rows: Sequence[Sequence[int]], layers: Sequence[int], positions: Tensor) -> list[Tensor]:
        """Returns the hidden states (n, D) at positions (n,) of rows, after each of ``layers`` blocks."""
        backbone, width = self.frozen.backbone, max(map(len, rows))
        # Padding on the right of a causal model needs no mask.
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=backbone.device)
        places = [r * width + i for r, row in enumerate(rows) for i in range(len(row))]
        here = torch.tensor(places, device=backbone.device)[positions]
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: Any, _arguments: Any, output: Any) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self._blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
        try:
            backbone.model.base_model(input_ids=ids, use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
        return [found[layer].flatten(0, 1)[here.to(found[layer].device)] for layer in layers]

    def save(self, folder: Path) -> None:
        """Writes the adapters as a folder of PEFT."""
        name = self.options.backbone  # not where an alias leads on this machine
        self.model.active_peft_config.base_model_name_or_path = aliases.HUB_ALIASES.get(name, name)
        self.model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, with nothing filled in


def tune(
    trainer: LoraTrainer, documents: Documents, run: RunOptions, folder: Path, identity: dict[str, Any], main: bool
) -> Path:
    """Runs all steps that are left, and writes the adapters into the output folder; returns where they are.

    Args:
        trainer: of the adapters.
        documents: the text.
        run: how the training is run.
        folder: of the output.
        identity: what the weights depend on.
        main: whether this process writes.

    Raises:
        UserError: a training that is resumed began with another identity.
    """
    options, states = trainer.options, folder / STATE_NAME / state.LORA_NAME
    loop = Loop(
        "LoRA",
        options.lora_steps,
        options,
        run,
        states,
        identity,
        trainer.weights,
        trainer.optimizer,
        main,
        saves_last=True,
    )
    loop.resume(state.latest(states) if run.resume else None)
    batches = MicroBatches(documents, options.micro_batch_tokens, options.seq_len, loop.position)
    if main:
        states.mkdir(parents=True, exist_ok=True)
        if loop.first == 0:
            cut_log(folder / LOG_NAME, 0)  # the folder is a training's from now on
        cut_log(states / LOG_NAME, loop.first)

    def tell(report: LoraReport, speed: float) -> str:
        line = json.dumps({**report.__dict__, "tokens_per_second": round(speed, 1)})
        with naming(states / LOG_NAME), (states / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        shown = "/".join(f"{value:.3f}" for value in report.exits)
        return f"KL {shown}, full depth {report.full_depth:.4f}"

    loop.go(trainer.step, batches, tell)
    result = folder / LORA_NAME
    if main:
        partial = folder / f".{LORA_NAME}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        trainer.save(partial)
        shutil.copyfile(states / LOG_NAME, partial / LOG_NAME)
        shutil.rmtree(result, ignore_errors=True)
        partial.rename(result)
        logger.info("Wrote LoRA to %s", result)
    return result
