"""What has to be known of the harness's ``HFLM``: the arguments that it takes, and how it passes them on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.hf_arguments import QUANTIZATION_ARGUMENTS
from dynamax_lm_eval.keywords import ModelKeywords
from dynamax_lm_eval.models import loading
from dynamax_lm_eval.progress import is_watched

Function = TypeVar("Function", bound=Callable[..., Any])

#: What the harness's command passes on where the user says nothing.
_UNSAID = {"device": "cuda:0", "batch_size": 1}


def with_signature(function: Function) -> Function:
    """Gives an ``__init__`` with keywords of ``ModelKeywords`` a signature that shows them, for notebooks and help."""
    theirs = {name: parameter.default for name, parameter in inspect.signature(HFLM.__init__).parameters.items()}
    ours = {row.name: row.default for row in fields(DynamaxArgs)}
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=ours.get(name, theirs.get(name)),
            annotation=getattr(kind, "__forward_arg__", kind),
        )
        for name, kind in ModelKeywords.__annotations__.items()
        if name != "pretrained"  # another spelling of what comes first
    ]
    first = [*inspect.signature(function).parameters.values()][:2]
    function.__signature__ = inspect.Signature([*first, *keywords])  # type: ignore[attr-defined]
    return function


def harness_arguments() -> frozenset[str]:
    """Returns the names that HFLM takes, without the two that only make sense inside it."""
    return frozenset(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


def quantization(kwargs: dict[str, Any]) -> Any:
    """Takes HFLM's arguments of bitsandbytes out of ``kwargs``; returns the configuration that they mean, or None.

    transformers 5 takes a configuration only; HFLM still passes its parts one by one.

    Raises:
        UserError: some have no meaning without the others.
    """
    given = {name: kwargs.pop(name) for name in QUANTIZATION_ARGUMENTS if name in kwargs}
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        configuration: Any = transformers.BitsAndBytesConfig
        return configuration(**given)
    if any(name.startswith("bnb_") for name in given):
        raise UserError(f"{', '.join(sorted(given))}: needs load_in_4bit=True to have a meaning")
    return None


@contextmanager
def loading_whole_models(lm: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Refuses, while HFLM loads, models whose files lack weights, and names the argument that an error belongs to.

    HFLM loads the backbone, and the weights of a delta, through its attribute ``AUTO_MODEL_CLASS``.

    Args:
        lm: the model.
        options: of its ``_create_model``.
    """
    others = [name for name in ("peft", "delta", "autogptq", "gptqmodel") if options.get(name)]
    backbone = f"backbone={lm.args.backbone!r}"

    def name_of(loaded_from: str) -> str:
        return f"delta={loaded_from!r}" if loaded_from == options.get("delta") else backbone

    auto_class = lm.AUTO_MODEL_CLASS
    lm.AUTO_MODEL_CLASS = loading.CompleteModels(auto_class, name_of)
    try:
        with loading.naming(", ".join(f"{name}={options[name]!r}" for name in others) or backbone):
            try:
                yield
            except NotImplementedError as error:
                if not (options.get("peft") and options.get("parallelize")):
                    raise
                raise UserError(
                    f"peft={options['peft']!r} cannot be put on a model that is offloaded in part; give it more memory "
                    "(max_memory_per_gpu, max_cpu_memory), or merge the adapter into the backbone's weights"
                ) from error
            if options.get("peft"):
                loading.check_adapter_weights(lm._model, options["peft"], options["revision"])
    finally:
        lm.AUTO_MODEL_CLASS = auto_class


@contextmanager
def without_bar() -> Iterator[None]:
    """Keeps the bar of transformers over weights for somebody who watches: in a file it is a line of remains."""
    bars: Any = transformers.utils.logging
    is_shown = bars.is_progress_bar_enabled()
    if is_watched() or not is_shown:
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def beside(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a command, less those that its model arguments name as well.

    Raises:
        UserError: both name another value. What the harness gives where the user says nothing counts as none.
    """
    for name, value in options.items():
        given = arguments.get(name, value)
        if value not in (None, _UNSAID.get(name)) and str(given) != str(value):
            raise UserError(f"--{name} {value} and {name}={given} in --model_args differ; give one of them")
    return {name: value for name, value in options.items() if name not in arguments}


def asked_for(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a command without its GPU where there is none: the harness names it for everybody."""
    is_default = options.get("device") == _UNSAID["device"] and not torch.cuda.is_available()
    return {name: value for name, value in options.items() if not (is_default and name == "device")}
