"""Judges what is to be loaded before its weights are, and afterwards whether all the weights were there.

Knows configurations, files and the auto classes of transformers; does not run models.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.peft_utils import find_adapter_config_file

from dynamax_lm_eval.errors import FaultError, UserError
from dynamax_lm_eval.models import aliases
from dynamax_lm_eval.types import StateMode

logger = logging.getLogger(__name__)

#: Pure state-space models.
_RECURRENT = ("mamba", "mamba2", "falcon_mamba")
#: Entries of ``layer_types`` that stand for blocks which keep something else than K and V.
_RECURRENT_KINDS = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
#: Adapters whose compute is that of linear layers and vectors, as it is counted.
_ADAPTERS = ("LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS")
#: Groups of weights that a message names.
_NAMED_WEIGHTS = 4


def is_recurrent(config: Any) -> bool:
    """Returns whether a configuration is that of a Mamba model."""
    return getattr(config, "model_type", None) in _RECURRENT


def copy_is_impossible(name: str, mode: StateMode) -> str:
    """Returns the message that refuses ``state_mode=copy`` or ``copy_previous`` where there is a recurrence."""
    return (
        f"state_mode={mode} is not possible on {name}: the states of its recurrent blocks sum up the whole past, so "
        "there is nothing of a single token to copy; use recompute or skip"
    )


def described(error: BaseException) -> str:
    """Returns an exception as part of one line: its type, and what it says, or else the code that raised it."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        text = f"in {frames[-1].name}: {frames[-1].line}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns whatever goes wrong while ``what`` is loaded into one line; the cause stays attached."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code=True" in str(error):
            raise UserError(_needs_trust(what)) from error
        kind = FaultError if isinstance(error, SafetensorError) else UserError
        raise kind(f"{what} could not be loaded ({described(error)})") from error


def trusts_remote_code(options: Mapping[str, Any]) -> bool:
    """Returns ``trust_remote_code`` of some options as a bool; without one, transformers asks on the terminal.

    Raises:
        UserError: it is neither true nor false.
    """
    value = options.get("trust_remote_code")
    if value is None or isinstance(value, bool):
        return bool(value)
    if str(value).lower() not in ("true", "false"):
        raise UserError(f"trust_remote_code must be true or false, got {value!r}")
    return str(value).lower() == "true"


def load_config(source: str, backbone: str, options: Mapping[str, Any]) -> Any:
    """Reads the backbone's configuration, before any weights.

    Raises:
        UserError: there is none to be had, or it is not that of a model for transformers.
    """
    names = ("subfolder", "cache_dir", "token", "local_files_only")
    source_options = {name: options[name] for name in names if options.get(name)}
    source_options["revision"] = str(options.get("revision") or "main")
    _check_no_adapter(source, backbone, source_options)
    if options.get("gguf_file"):
        source_options["gguf_file"] = options["gguf_file"]
    trusted = trusts_remote_code(options)
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusted, **source_options)
    except Exception as error:
        if not Path(source).is_dir() and _is_unreachable(error):
            raise FaultError(_not_reached(source, backbone)) from error
        raise UserError(_why_not(source, backbone, source_options, trusted, error)) from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Says whether something could not be downloaded because there is no way to the Hub."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _not_reached(source: str, backbone: str) -> str:
    """Returns the message for a model that is not on this machine, where the Hub cannot be asked for it."""
    of_alias = f" stands for {source}, which" if source != backbone else ""
    return (
        f"backbone={backbone!r}{of_alias} is not on this machine, and the Hugging Face Hub cannot be reached; check "
        f"the network and HF_HUB_OFFLINE, or give a folder{_nearest_alias(backbone)}"
    )


def _nearest_alias(backbone: str) -> str:
    """Returns a question for the alias that was meant, as the end of a message."""
    nearest = difflib.get_close_matches(backbone, aliases.backbone_names(), n=1, cutoff=0.75)
    return f"; did you mean {nearest[0]!r}?" if nearest and nearest[0] != backbone else ""


def _why_not(source: str, backbone: str, source_options: Mapping[str, Any], trusted: bool, error: Exception) -> str:
    """Returns why a configuration could not be read, as one line."""
    what = f"backbone={backbone!r}"
    try:
        stored: Any = transformers.PreTrainedConfig.get_config_dict(source, **source_options)[0]
    except Exception:
        if Path(source).is_dir():
            return f"{what}: its configuration could not be read ({described(error)})"
        return (
            f"{what} is neither an alias ({', '.join(aliases.backbone_names())}), nor a folder, "
            f"nor a model that could be downloaded from the Hub{_nearest_alias(backbone)}: "
            f"{' '.join(str(error).split())}"
        )
    if not isinstance(stored, dict):
        return f"{what}: its config.json is no mapping"
    model_type = stored.get("model_type")
    is_known = model_type in transformers.CONFIG_MAPPING
    has_code = "AutoConfig" in (stored.get("auto_map") or {})
    if has_code and not is_known and not trusted:
        return _needs_trust(what)
    if model_type is None and "d_model" in stored and "n_layer" in stored:
        return (
            f"{what} is a checkpoint of the package mamba_ssm (its config.json has d_model and no model_type); give "
            "its conversion for transformers, on the Hub the repository whose name ends in -hf "
            "(state-spaces/mamba-130m-hf, say)"
        )
    if model_type is None and not has_code:
        return f"{what}: its config.json names no model_type, so it is not a model for transformers"
    if not is_known and not has_code:
        return (
            f"{what}: model type {model_type!r} is not known to transformers {transformers.__version__}; a newer "
            "release may know it"
        )
    return f"{what}: its configuration could not be read ({described(error)})"


def _needs_trust(what: str) -> str:
    return (
        f"{what} needs trust_remote_code=True: it comes with Python code of its own, which is then run on this "
        "machine; read it first"
    )


def _check_no_adapter(source: str, backbone: str, source_options: Mapping[str, Any]) -> None:
    """Raises UserError for a PEFT adapter in a backbone's place, which transformers would apply on its own."""
    try:
        file = find_adapter_config_file(source, **source_options)
    except (OSError, ValueError):
        return  # reading the configuration will say what is wrong
    if file is None:
        return
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise UserError(
        f"backbone={backbone!r} is a PEFT adapter (it has an adapter_config.json); "
        f"write backbone={base or 'ITS_BASE_MODEL'},peft={backbone}"
    )


def check_architecture(config: Any) -> None:
    """Raises UserError where a configuration is not that of a causal LM which can be run block by block."""
    model_type = getattr(config, "model_type", None)
    if config.is_encoder_decoder:
        raise UserError(
            f"{model_type!r} is an encoder-decoder (seq2seq) model; dynamax needs a decoder-only (causal) backbone"
        )
    known = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if not any(model_type in mapping for mapping in known) and not getattr(config, "auto_map", None):
        raise UserError(f"{model_type!r} is not a causal language model of transformers")
    if not isinstance(getattr(config.get_text_config(), "num_hidden_layers", None), int):
        raise UserError(
            f"{model_type!r} does not say its number of blocks (its configuration has no num_hidden_layers); "
            "this architecture is not supported"
        )


def auto_class(config: Any) -> Any:
    """Returns the class of transformers that loads the model of a configuration.

    Models that see images and are not known as language models are loaded whole; they run on text.
    """
    model_type = getattr(config, "model_type", None)
    is_language_model = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "auto_map", None)
    if not is_language_model and model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def has_recurrence(config: Any) -> bool:
    """Returns whether some blocks keep a state that sums up the past, as Mamba's do, by what a configuration says."""
    if is_recurrent(config):
        return True
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    return any(kind in _RECURRENT_KINDS for kind in kinds or ()) or (has_mamba_blocks(config) and not kinds)


def has_mamba_blocks(config: Any) -> bool:
    """Returns whether a configuration has settings of Mamba blocks."""
    names = vars(config.get_text_config())
    return is_recurrent(config) or any(name.startswith("mamba_") for name in names)


def model_without_weights(config: Any, options: Mapping[str, Any]) -> Any:
    """Builds the causal LM of a configuration on the meta device, which takes no time or memory, in eval mode.

    Args:
        config: the backbone's configuration.
        options: arguments of ``from_pretrained``: trust_remote_code, and the revision of the code.

    Returns:
        The model, or None where it cannot be built; loading will say why.

    Raises:
        UserError: the model's own code is needed and not trusted.
    """
    trusted = trusts_remote_code(options)
    code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if code and not trusted and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(_needs_trust(f"backbone={config.name_or_path!r}"))
    # Code is taken from the revision that was asked for, unless it is another repository's.
    pinned = {"code_revision": str(options.get("revision") or "main")} if code and trusted and "--" not in code else {}
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=trusted, **pinned)
    except Exception as error:
        logger.debug("The model could not be built without its weights (%s)", described(error))
        return None
    return model.eval()


class CompleteModels:
    """A stand-in for an auto class of transformers that loads only models whose weights are all in their files.

    transformers gives random values to what is missing or has another size, with a warning only.
    """

    def __init__(self, auto_class: Any, name: Callable[[str], str]) -> None:
        """``name``: what messages call a model, by the folder or Hub id that it is loaded from."""
        self._auto_class = auto_class
        self._name = name

    def from_pretrained(self, source: str, **options: Any) -> Any:
        """Loads a model as the auto class does.

        Raises:
            UserError: it cannot be loaded, or weights are missing or of another size.
        """
        what = self._name(source)
        with naming(what), _without_load_report():
            loaded = self._auto_class.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        if not isinstance(loaded, tuple):  # code of the model's own
            logger.warning("%s: it cannot be known whether all of its weights are in its files", what)
            return loaded
        model, information = loaded
        sizes = {name: f"{tuple(file)} and not {tuple(model)}" for name, file, model in information["mismatched_keys"]}
        if sizes:
            named = ", ".join(f"{name} {size}" for name, size in sorted(sizes.items())[:_NAMED_WEIGHTS])
            raise UserError(
                f"{what}: {len(sizes)} weights in its files have other sizes than its configuration says: {named}"
                f"{', ...' if len(sizes) > _NAMED_WEIGHTS else ''}; the two do not belong together"
            )
        check_weights(what, information["missing_keys"], information["unexpected_keys"])
        without_router_logits(model)
        return model


def without_router_logits(model: Any) -> None:
    """Lets a mixture of experts compute logits alone: blocks that run one by one hand over nothing for its loss."""
    configs = [model.config, *([model.config.get_text_config()] if hasattr(model.config, "get_text_config") else [])]
    for config in configs:
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False


def check_weights(what: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raises UserError where weights of a model are ``missing`` in its files; warns of those that it has no use for."""
    if missing:
        raise UserError(
            f"{what}: {len(missing)} of its weights are not in its files and would be random: {_grouped(missing)}; "
            "the files are incomplete, or do not belong to its configuration"
        )
    if unexpected:
        logger.warning("%s: %d weights in its files are not used: %s", what, len(unexpected), _grouped(unexpected))


def check_token_ids(ids: Mapping[str, Any], vocabulary: int) -> None:
    """Raises UserError where an argument names a token by an id that a vocabulary of this size does not have."""
    for name, value in ids.items():
        if isinstance(value, int) and value >= vocabulary:
            raise UserError(f"{name}={value} is no token of this backbone, whose ids are 0 to {vocabulary - 1}")


def check_peft(adapter: str) -> None:
    """Raises UserError for adapters whose positions or compute would not be what is counted."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise UserError(f"peft={adapter!r} needs the package peft; run: pip install peft") from None
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise UserError(f"peft={adapter!r} could not be read ({described(error)})") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise UserError(f"peft={adapter!r} is {kind}, which adds virtual tokens; only LoRA-like adapters work")
    if kind not in _ADAPTERS:
        raise UserError(
            f"peft={adapter!r} is {kind}, whose compute the cost model cannot count; of adapters, "
            f"{', '.join(_ADAPTERS)} work (others can be merged into the backbone's weights first)"
        )


def check_adapter_weights(model: Any, adapter: str, revision: str) -> None:
    """Raises UserError where weights of the adapter of a PEFT model are not in its files."""
    # PEFT tells only who loads an adapter by this method what was missing; here it has been loaded once.
    information = model.load_adapter(adapter, model.active_adapter, revision=revision)
    check_weights(f"peft={adapter!r}", information.missing_keys, information.unexpected_keys)


def _grouped(names: Collection[str]) -> str:
    """Returns the first names of weights; those of several blocks are one: ``layers.{6, 7}.mlp.up_proj.weight``."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        groups.setdefault(pattern, []).append("" if number is None else number.group())
    shown = []
    for pattern, numbers in list(groups.items())[:_NAMED_WEIGHTS]:
        numbers.sort(key=lambda number: int(number or 0))
        blocks = ", ".join(numbers if len(numbers) <= _NAMED_WEIGHTS else [numbers[0], "...", numbers[-1]])
        shown.append(pattern.replace("{}", blocks if len(numbers) == 1 else f"{{{blocks}}}"))
    return ", ".join([*shown, "..."] if len(groups) > _NAMED_WEIGHTS else shown)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps back transformers' table of weights that did not fit: they are named in one line instead."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(is_other)
    try:
        yield
    finally:
        theirs.removeFilter(is_other)
