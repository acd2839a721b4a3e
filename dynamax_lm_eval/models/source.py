"""What a run's backbone is loaded from: an alias, a Hub id, a folder, or a model at hand."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import transformers

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models import aliases, devices, loading
from dynamax_lm_eval.models.blocks import find_blocks
from dynamax_lm_eval.models.fingerprint import (
    Fingerprints,
    adapter_fingerprint,
    fetched_files_fingerprints,
    files_fingerprints,
    model_fingerprints,
)
from dynamax_lm_eval.types import MambaKernels


class ModelSource:
    """A backbone's files and configuration, judged before its weights are loaded.

    Attributes:
        model: the model, where it was loaded before; else None.
        path: folder or Hub id; empty where a model is at hand.
        options: arguments that the model is loaded with; the device is one that exists.
        config: of transformers.
        fingerprints: of the weights, where they are known.
    """

    def __init__(self, backbone: str, options: dict[str, Any], model: transformers.PreTrainedModel | None) -> None:
        """
        Args:
            backbone: as the user named it.
            options: arguments of HFLM and of ``from_pretrained``.
            model: the model, where it was loaded before.

        Raises:
            UserError: there is no such model, it cannot be run block by block, or an option cannot be honoured.
        """
        self.model = model
        self.options = {**options, "trust_remote_code": loading.trusts_remote_code(options)}
        self.path = "" if model is not None else aliases.resolve_backbone(backbone, options.get("subfolder") or "")
        self.config: Any = model.config if model is not None else loading.load_config(self.path, backbone, self.options)
        loading.check_architecture(self.config)
        if model is None and not _is_launched():
            self.options["device"] = devices.resolve_device(options.get("device"))
        if options.get("device_map") is not None:
            devices.check_device_map(options["device_map"])
        if model is not None and options.get("parallelize"):
            raise UserError("the backbone is loaded already, and cannot be spread over devices; remove parallelize")
        if model is not None and self.is_tensor_parallel:
            raise UserError("the backbone is loaded already, and cannot be split between processes; remove tp_plan")
        if not options.get("peft"):  # an adapter may bring tokens of its own
            self.check_token_ids(self.config.get_text_config().vocab_size)
        if options.get("peft"):
            loading.check_peft(options["peft"])
        self.fingerprints: Fingerprints | None = None

    @cached_property
    def structure(self) -> Any:
        """The model, or as long as it is not loaded one like it without weights; None where that cannot be made."""
        return self.model if self.model is not None else loading.model_without_weights(self.config, self.options)

    @cached_property
    def num_layers(self) -> int:
        """The number of blocks, L."""
        depth = int(self.config.get_text_config().num_hidden_layers)
        if self.structure is None:
            return depth
        # Some families count otherwise than by blocks.
        return len(find_blocks(self.structure, depth, type(self.structure).__name__))

    @property
    def has_recurrence(self) -> bool:
        """Whether some of its blocks keep a recurrent state."""
        return loading.has_recurrence(self.config)

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether several processes compute each block together."""
        return self.options.get("tp_plan") is not None

    @property
    def longest_row(self) -> int:
        """The tokens of the longest row that the options or the configuration allow."""
        limit = self.options.get("max_length") or getattr(self.config.get_text_config(), "max_position_embeddings", 0)
        return int(limit or 0)

    def check_mamba_kernels(self, kernels: MambaKernels | None) -> None:
        """Raises UserError where ``mamba_kernels`` is given and there are no Mamba blocks."""
        if kernels is not None and not loading.has_mamba_blocks(self.config):
            kind = self.config.model_type
            raise UserError(f"mamba_kernels has no effect on {kind!r}, which has no Mamba blocks; remove it")

    def check_token_ids(self, vocabulary: int) -> None:
        """Raises UserError where an option names a token that a vocabulary of this size does not have."""
        names = ("prefix_token_id", "think_end_token")
        loading.check_token_ids({name: self.options.get(name) for name in names}, vocabulary)

    def read_fingerprints(self) -> Fingerprints | None:
        """Returns the fingerprints of the weight files, downloaded where they are not here; None where none tell."""
        if self.model is not None:
            fingerprints: Fingerprints | None = model_fingerprints(self.model)
        else:
            fingerprints = files_fingerprints(self.path, self.options)
            fingerprints = fingerprints or fetched_files_fingerprints(self.path, self.options)
        if fingerprints is not None and (adapter := self.options.get("peft")):
            revision = str(self.options.get("revision") or "main")
            fingerprints = fingerprints.with_adapter(adapter_fingerprint(adapter, revision))
        elif fingerprints is not None and (delta := self.options.get("delta")):
            fingerprints = fingerprints.changed_by(delta)  # not the weights that exits were trained for
        self.fingerprints = fingerprints
        return fingerprints

    def fingerprints_of(self, loaded: Any) -> Fingerprints:
        """Returns the fingerprints of the backbone, which is loaded by now: of its files, or else of the model."""
        if self.fingerprints is None:
            self.fingerprints = self.read_fingerprints() or model_fingerprints(loaded)
        return self.fingerprints


def _is_launched() -> bool:
    """Returns whether this is one of several processes, whose devices the launcher gives them."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1
