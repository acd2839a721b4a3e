"""The arguments of ``--model dynamax``: every one is parsed and checked here, before weights load.

Knows names, types and ranges. Knows nothing of a backbone (``exits.resolve`` does), of torch, transformers or the
harness.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from dynamax_lm_eval.errors import UserError, unknown_name
from dynamax_lm_eval.types import (
    BudgetStrategy,
    ClassifierKind,
    ConfidenceName,
    ExitScope,
    MambaKernels,
    Preset,
    PruneStrategy,
    StateMode,
)

Backend = Literal["default", "causal"]


@dataclass(frozen=True)
class DynamaxArgs:
    """What the user asked for, checked as far as that goes without knowing the backbone."""

    #: Alias, Hub id or local folder.
    backbone: str
    #: Confidence at or above which a token exits; one number, or one per exit layer. 1 never exits.
    threshold: tuple[float, ...] = (0.8,)
    #: Certificate whose thresholds are used: a file of ``dynamax-lm-eval calibrate``, or ``calibrated``: the one that
    #: was made for this backbone, exits and policy. ``threshold=`` takes the same words.
    certificate: str | None = None
    #: True: use the certificate for other tasks than its own, without any guarantee.
    certificate_any_task: bool = False
    #: compute_reduction that the run is held to, by a threshold that follows what was spent so far.
    target_reduction: float | None = None
    #: Milliseconds per generated token that the run is held to, in the same way; depends on the machine.
    target_latency_ms: float | None = None
    #: How ``target_reduction`` is reached: ``online``, or ``two_pass``: one threshold, from a sample of the documents.
    #: None: online.
    budget: BudgetStrategy | None = None
    #: What is compared with the threshold; None: ``classifier`` where trained exits are known, else ``softmax``.
    confidence: ConfidenceName | None = None
    #: Kind of exit classifier; None: the first of the checkpoint.
    classifier: ClassifierKind | None = None
    #: Checkpoint of exits, a folder or a Hub id (``user/name`` or ``user/name@revision``); None: looked up.
    exits: str | None = None
    #: False: use exits although they were trained for other weights of the same shape.
    exits_check: bool = True
    #: Last tokens of the prompt that a recurrent classifier sees; None: 16.
    classifier_warmup: int | None = None
    #: Numbers of blocks that have run at an exit (1-based); None: the checkpoint's, or floor(L/2 + i*L/8), i = 0..3.
    exit_layers: tuple[int, ...] | None = None
    #: Block L runs after an exit, before norm and LM head; None: as the exits were trained.
    final_block: bool | None = None
    #: What a token leaves behind in the blocks it skipped; None: ``recompute`` (a preset may say otherwise).
    state_mode: StateMode | None = None
    #: N: N blocks are disabled, those that ``prune_strategy`` chooses; a tuple names blocks (1-based).
    prune_layers: int | tuple[int, ...] = 0
    #: ``deepest``: the N blocks before the last one; ``angular``: the N blocks in a row that turn the hidden state
    #: least, as ``prune_profile`` says. None: deepest.
    prune_strategy: PruneStrategy | None = None
    #: File of ``dynamax-lm-eval prune-profile``.
    prune_profile: str | None = None
    #: Which tokens may exit.
    exit_scope: ExitScope = "generated"
    #: transformers' repetition penalty for every generation that does not set its own.
    repetition_penalty: float | None = None
    #: tau of CALM's decaying threshold, clip(0.9*threshold + 0.1*exp(-tau*t/N), 0, 1); None: no decay.
    threshold_decay: float | None = None
    #: A set-up by name: ``paper`` runs block L after an exit, copies states and penalises repetition.
    preset: Preset | None = None
    #: On a Mamba backbone: ``auto`` uses the kernels of mamba-ssm on a GPU where they are installed; None: auto.
    mamba_kernels: MambaKernels | None = None
    #: What several requests begin with runs once.
    prefix_caching: bool = True
    #: A generation counts as degenerate where it ends in an n-gram of up to so many tokens, at least three times in
    #: a row; 0 counts none.
    degenerate_ngram: int = 8
    #: ... and over at least so many tokens.
    degenerate_tokens: int = 16


#: In place of a file: the certificate that fits.
CALIBRATED = "calibrated"

#: What ``preset=paper`` sets where the user does not (its state mode depends on the backbone). The paper names no
#: value for its repetition penalty.
PAPER_PRESET: dict[str, Any] = {"final_block": True, "repetition_penalty": 1.1}

#: Our argument names; ``backbone`` may also be spelled ``pretrained``.
OWN_ARGUMENTS = tuple(field.name for field in dataclasses.fields(DynamaxArgs))

#: Arguments that make a bitsandbytes configuration.
QUANTIZATION_ARGUMENTS = frozenset(
    {
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "load_in_4bit",
        "load_in_8bit",
    }
)
#: Arguments of ``from_pretrained`` that reach it through the harness's ``**kwargs``.
FROM_PRETRAINED_ARGUMENTS = QUANTIZATION_ARGUMENTS | frozenset(
    {
        "cache_dir",
        "force_download",
        "local_files_only",
        "low_cpu_mem_usage",
        "token",
        "use_safetensors",
        "variant",
    }
)

#: Arguments that ``--model hf`` takes and this model cannot honour, with the reason.
REFUSED_ARGUMENTS = {
    "attn_implementation": "dynamax runs its own attention over ragged batches; remove attn_implementation",
    "device_map": "the blocks of a dynamax backbone must be on one device; remove device_map",
    "max_cpu_memory": "it only acts on blocks spread over devices, and these are on one device; remove max_cpu_memory",
    "max_memory_per_gpu": (
        "it only acts on blocks spread over devices, and these are on one device; remove max_memory_per_gpu"
    ),
    "offload_folder": "it only acts on blocks spread over devices, and these are on one device; remove offload_folder",
    "parallelize": "the blocks of a dynamax backbone must be on one device; remove parallelize",
    "tp_plan": "tensor parallelism is not supported by dynamax; remove tp_plan",
    "torch_dtype": "it was renamed in transformers 5; write dtype= instead",
}


def parse_model_args(args: Mapping[str, Any], harness_arguments: Collection[str]) -> tuple[DynamaxArgs, dict[str, Any]]:
    """Splits model_args into ours, checked, and those that are passed on to the harness's ``HFLM``.

    Args:
        args: all model_args; strings from the command line are understood (``"0.8"``, ``"15+20"``).
        harness_arguments: names that ``HFLM.__init__`` takes.

    Raises:
        UserError: a name is unknown, a value is out of range, or an argument cannot be honoured.
    """
    own = {name: args[name] for name in OWN_ARGUMENTS if name in args}
    passed_on = {name: value for name, value in args.items() if name not in OWN_ARGUMENTS}
    known = {*OWN_ARGUMENTS, *harness_arguments, *FROM_PRETRAINED_ARGUMENTS}
    for name, value in passed_on.items():
        if name in REFUSED_ARGUMENTS and _is_set(value):
            raise UserError(f"{name}={value!r} cannot be honoured: {REFUSED_ARGUMENTS[name]}")
        if name not in known and name not in REFUSED_ARGUMENTS:
            raise UserError(unknown_name("model argument", name, known, "dynamax's own are", OWN_ARGUMENTS))
    passed_on = {name: value for name, value in passed_on.items() if name not in REFUSED_ARGUMENTS}
    if passed_on.get("backend", "default") == "seq2seq":
        raise UserError("backend=seq2seq cannot be honoured: early exit needs a decoder-only (causal) backbone")

    _check_batch_size(passed_on.get("batch_size", 1))
    for name, parse in _HARNESS_PARSERS.items():
        if passed_on.get(name) is not None:
            passed_on[name] = parse(name, passed_on[name])
    _check_harness_combinations(passed_on)

    pretrained = passed_on.pop("pretrained", None)
    backbone = own.pop("backbone", None)
    if backbone is not None and pretrained is not None and backbone != pretrained:
        raise UserError(f"backbone={backbone!r} and pretrained={pretrained!r} name different models; give one")
    backbone = backbone if backbone is not None else pretrained
    if not isinstance(backbone, str) or not backbone.strip():
        raise UserError(f"backbone must be an alias, a Hub id or a folder, got {backbone!r}; e.g. backbone=mistral")

    if _names_certificate(own.get("threshold")):
        if own.get("certificate") is not None:
            raise UserError("threshold and certificate both name a certificate; give one")
        own["certificate"] = own.pop("threshold")
    parsed: dict[str, Any] = {"backbone": backbone}
    for name, value in own.items():
        if value is not None:
            parsed[name] = _PARSERS[name](name, value)
    if not parsed.get("exits_check", True) and "exits" not in parsed:
        raise UserError("exits_check=false has no effect without exits=: exits are looked up by the weights they fit")
    _check_threshold_source(parsed)
    check_pruning(parsed.get("prune_strategy"), parsed.get("prune_profile"), parsed.get("prune_layers", 0))
    if parsed.get("preset") == "paper":
        parsed = {**PAPER_PRESET, **parsed}
    return DynamaxArgs(**parsed), passed_on


def parse_exit_layers(value: Any) -> tuple[int, ...]:
    """Exit layers as the user may write them: a number, a list, or ``15+20``; UserError where they are none."""
    return _exit_layers("exit_layers", value)


def check_pruning(strategy: str | None, profile: str | None, layers: int | tuple[int, ...]) -> None:
    """Raises UserError where these arguments do not go together."""
    if strategy == "angular" and profile is None:
        raise UserError(
            "prune_strategy=angular needs prune_profile=, a file of block distances; make it: dynamax-lm-eval "
            "prune-profile --backbone ..."
        )
    if profile is not None and strategy != "angular":
        raise UserError("prune_profile has no effect without prune_strategy=angular; add it, or remove prune_profile")
    if strategy is not None and (not isinstance(layers, int) or layers == 0):
        raise UserError(f"prune_strategy={strategy} needs prune_layers=N, the number of blocks that it chooses")


def _names_certificate(threshold: Any) -> bool:
    return isinstance(threshold, str) and (threshold == CALIBRATED or threshold.endswith(".json"))


def _check_threshold_source(parsed: Mapping[str, Any]) -> None:
    """Thresholds come from one place: the user, a certificate, or a budget."""
    sources = ("threshold", "certificate", "target_reduction", "target_latency_ms")
    given = [name for name in sources if name in parsed]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each decide the threshold; give one of them")
    if parsed.get("certificate_any_task") and "certificate" not in parsed:
        raise UserError("certificate_any_task has no effect without threshold=calibrated or a certificate's file")
    if "budget" in parsed and "target_reduction" not in parsed:
        raise UserError(f"budget={parsed['budget']} needs target_reduction, the budget; add it, or remove budget")
    budget = next((name for name in sources[2:] if name in parsed), None)
    if budget is not None and "threshold_decay" in parsed:
        raise UserError(f"threshold_decay and {budget} both move the threshold; remove one of them")


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and str(value).lower() not in ("false", "none")


def _check_batch_size(value: Any) -> None:
    size, _, schedule = str(value).partition(":")
    is_auto = size == "auto" and (not schedule or schedule.replace(".", "", 1).isdigit())
    if isinstance(value, bool) or not (is_auto or (str(value).isdecimal() and int(value) >= 1)):
        raise UserError(f"batch_size must be a whole number of at least 1, or auto, got {value!r}")


def _check_harness_combinations(args: Mapping[str, Any]) -> None:
    """What ``HFLM`` would only notice after the weights have been loaded."""
    for first, second in (("peft", "delta"), ("autogptq", "gptqmodel")):
        if args.get(first) and args.get(second):
            raise UserError(f"{first} and {second} exclude each other; give one")
    if args.get("enable_thinking") and args.get("think_end_token") is None:
        raise UserError("enable_thinking=true needs think_end_token=, the token after which the answer begins; add it")
    if not isinstance(device := args.get("device", "cuda"), str):
        raise UserError(f"device must be a name such as cpu or cuda:0, got {device!r}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"{name} must be a number, got {value!r}") from None
    if math.isnan(number):
        raise UserError(f"{name} must be a number, got nan")
    return number


def _items(name: str, value: Any) -> list[Any]:
    """The items of a list, of the text form ``15+20+25``, or of a single value."""
    items = value.split("+") if isinstance(value, str) else value
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    if not items:
        raise UserError(f"{name} must not be an empty list; leave it out for the default")
    return items


def _threshold(name: str, value: Any) -> tuple[float, ...]:
    numbers = [_number(name, item) for item in _items(name, value)]
    for number in numbers:
        if not 0 <= number <= 1:
            raise UserError(f"{name} must be in [0, 1], got {number:g}; 1 never exits, 0 always does")
    return tuple(numbers)


def _integer(name: str, value: Any) -> int:
    number = _number(name, value)
    if not float(number).is_integer():
        raise UserError(f"{name} must be made of whole numbers, got {value!r}")
    return int(number)


def _block_list(name: str, value: Any) -> tuple[int, ...]:
    blocks = [_integer(name, item) for item in _items(name, value)]
    if len(set(blocks)) != len(blocks):
        raise UserError(f"{name} names a layer twice: {blocks}")
    return tuple(sorted(blocks))


def _exit_layers(name: str, value: Any) -> tuple[int, ...]:
    items = _items(name, value)
    if [_integer(name, item) for item in items] != list(_block_list(name, value)):
        raise UserError(f"{name} must be in rising order (thresholds are matched to them), got {items}")
    return _block_list(name, value)


def _prune_layers(name: str, value: Any) -> int | tuple[int, ...]:
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and "+" in value):
        return _block_list(name, value)
    count = _integer(name, value)
    if count < 0:
        raise UserError(f"{name} must be a number of blocks (0 or more) or a list of blocks, got {count}")
    return count


def _count(name: str, value: Any) -> int:
    number = _integer(name, value)
    if number < 0:
        raise UserError(f"{name} must be a whole number of at least 0, got {number}")
    return number


def _whole(least: int) -> Callable[[str, Any], int]:
    """A parser of whole numbers, also in text; other than ``_integer`` it refuses 64.0, which is no length."""

    def parse(name: str, value: Any) -> int:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not (is_number or (isinstance(value, str) and value.strip().isdecimal())) or int(value) < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        return int(value)

    return parse


def _dtype(name: str, value: Any) -> Any:
    """A torch dtype (known by its name: torch is not imported here) or its name, as text without ``torch.``."""
    text = str(value).removeprefix("torch.")
    if text not in _DTYPES and not (text == "auto" and name == "dtype"):
        auto = "auto, " if name == "dtype" else ""
        raise UserError(f"{name} must be one of {auto}{', '.join(_DTYPES)}, got {value!r}")
    return text if isinstance(value, str) else value


def _think_end_token(name: str, value: Any) -> str | int:
    if isinstance(value, str) and value:
        return int(value) if value.isdecimal() else value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UserError(f"{name} must be a token's text or its id, got {value!r}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a mapping of names to values, got {value!r}")
    return value


def _location(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} must be a file, a folder or a Hub id, got {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise UserError(f"{name} must be true or false, got {value!r}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name} must be a folder or a Hub id, got {value!r}")
    return value


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise UserError(f"{name} must be a finite number above 0, got {number:g}; 1 means no penalty")
    return number


def _reduction(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 1 < number < math.inf:
        raise UserError(f"{name} must be a finite number above 1, got {number:g}; threshold=1 is the full model")
    return number


def _milliseconds(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise UserError(f"{name} must be a finite number above 0, got {number:g}")
    return number


def _not_negative(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number < math.inf:
        raise UserError(f"{name} must be a finite number of at least 0, got {number:g}; leave it out for no decay")
    return number


def _choice(kind: Any) -> Any:
    choices = cast("tuple[str, ...]", get_args(kind))

    def parse(name: str, value: Any) -> str:
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return str(value)

    return parse


#: dtypes of weights and of a softmax, by the names that torch has for them.
_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double")

#: How arguments of ``HFLM`` that it takes as they come are checked; None is left to it.
_HARNESS_PARSERS: dict[str, Any] = {
    "backend": _choice(Backend),
    "max_length": _whole(1),
    "max_batch_size": _whole(1),
    "prefix_token_id": _whole(0),
    "think_end_token": _think_end_token,
    "chat_template_args": _mapping,
    **dict.fromkeys(("dtype", "softmax_dtype", "mixed_precision_dtype"), _dtype),
    **dict.fromkeys(("subfolder", "peft", "delta", "gguf_file"), _location),
    **dict.fromkeys(("truncation", "logits_cache", "trust_remote_code", "use_fast_tokenizer", "gptqmodel"), _flag),
    **dict.fromkeys(("add_bos_token", "enable_thinking"), _flag),
}

_PARSERS: dict[str, Any] = {
    "threshold": _threshold,
    "certificate": _text,
    "certificate_any_task": _flag,
    "target_reduction": _reduction,
    "target_latency_ms": _milliseconds,
    "budget": _choice(BudgetStrategy),
    "confidence": _choice(ConfidenceName),
    "classifier": _choice(ClassifierKind),
    "exits": _text,
    "exits_check": _flag,
    "classifier_warmup": _count,
    "final_block": _flag,
    "preset": _choice(Preset),
    "mamba_kernels": _choice(MambaKernels),
    "prefix_caching": _flag,
    "degenerate_ngram": _count,
    "degenerate_tokens": _count,
    "prune_strategy": _choice(PruneStrategy),
    "prune_profile": _text,
    "exit_layers": _exit_layers,
    "state_mode": _choice(StateMode),
    "prune_layers": _prune_layers,
    "exit_scope": _choice(ExitScope),
    "repetition_penalty": _positive,
    "threshold_decay": _not_negative,
}
