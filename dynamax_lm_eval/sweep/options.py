"""The options of ``dynamax-lm-eval sweep``. Knows no torch, so that help comes at once."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import yaml

from dynamax_lm_eval.config import VARIED_ARGUMENTS
from dynamax_lm_eval.errors import UserError, unknown_name
from dynamax_lm_eval.harness.pairs import json_or_pairs, pairs
from dynamax_lm_eval.types import (
    AUTO,
    DEFAULT_PROPOSE,
    VERIFY,
    ClassifierKind,
    ConfidenceName,
    Confirm,
    PruneScope,
    StateMode,
)

#: What may stand in ``--confidences``: kinds of classifiers, and training-free confidences.
KINDS = get_args(ClassifierKind)
CASCADE = "cascade"
_TRAINING_FREE = tuple(name for name in get_args(ConfidenceName) if name not in ("classifier", CASCADE))
CONFIDENCES = (*KINDS, *_TRAINING_FREE, *(f"{CASCADE}:{kind}" for kind in KINDS))
#: What may stand in ``--state_modes``.
STATE_MODES = (*get_args(StateMode), VERIFY, AUTO)

#: The family of points whose exits are drafts.
VERIFIED = "verified"
#: Arguments of a run that a sweep decides.
_DECIDED = VARIED_ARGUMENTS | {"pretrained", "batch_size", "device"}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SweepOptions:
    """A grid of policies, the tasks to answer under each of them, and how to run them."""

    backbone: str = field(metadata={"help": "alias (smollm2-gguf, mistral, ...), Hub id, or folder"})
    tasks: str = field(metadata={"help": "tasks of the harness, separated by commas"})
    output: str = field(metadata={"help": "output folder; rerun an interrupted sweep and it continues there"})
    thresholds: str = _option(
        "0.25:0.95:0.05",
        "first:last:step and numbers, separated by commas; 0.9+0.8+0.7 is one for each exit. TASK=0.3,0.5;TASK=0.4 has "
        "a list for each task",
    )
    confidences: str | None = _option(
        None, f"separated by commas: {', '.join(CONFIDENCES)}; default: the kinds of the trained exits"
    )
    confirm: str | None = _option(
        None,
        f"of cascades: {' or '.join(get_args(Confirm))}, what of the read-out confirms; default: fitted where the "
        "exits have it",
    )
    propose: str | None = _option(
        None,
        "cascades: a token is read out where the classifier's confidence reaches this; several, separated by commas; "
        f"default: {DEFAULT_PROPOSE}",
    )
    state_modes: str = _option(
        AUTO,
        "separated by commas: learned, recompute, copy, copy_previous, skip; verify: exits are drafts that the full "
        "model verifies; auto: what a preset among --model_args says, else learned where the exits have maps of states",
    )
    verify_tokens: int | None = _option(None, "most tokens that a row drafts, in points that verify; default: 8")
    verify_at: str = _option(
        "",
        "exit layers, separated by commas: every token is drafted there, and the full model verifies; a family of its "
        "own, without decisions",
    )
    static_exits: str = _option(
        "",
        "exit layers, separated by commas: every token exits there, without a decision, through the adapter of the "
        "trained exits; a family of its own for each state mode",
    )
    prune: str = _option("", "numbers of pruned blocks, separated by commas; a family of its own, without exits")
    prune_scope: str | None = _option(
        None, "which tokens skip the pruned blocks: all, or generated; default: what a preset says, else all"
    )
    prune_profile: str | None = _option(None, "file of prune-profile: adds the same numbers with angular pruning")
    prune_adapter: str | None = _option(
        None, "file of prune-profile --fit_adapters: adds the same pruned models with a fitted read-out"
    )
    model_args: str = _option("", "further model arguments for all points: exit_scope=all,repetition_penalty=1.1,...")
    limit: int | None = _option(None, "documents of each task; default: all")
    draw: int | None = _option(
        None,
        "a seed: draws --limit documents of each task at random; its first ones may be alike",
    )
    samples: str | None = _option(None, 'JSON, or a file of it, with documents by task: {"triviaqa": [0, 7]}')
    num_fewshot: int | None = _option(None, "examples in the prompt; default: the task's own")
    batch_size: int = _option(32, "sequences processed at once, of all points together")
    noise_rows: int | None = _option(
        None,
        "sequences processed at once in a second run of the full model, which measures rounding; 0: none; default: "
        "half of --batch_size (2 where that is 1), and none in float32 on a CPU",
    )
    timed: bool = _option(
        False,
        "answer one point after the other, so that each has a time, latency and energy of its own; batches of few "
        "documents are less full, so it takes longer",
    )
    device: str | None = _option(None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    include_path: str | None = _option(None, "folder with tasks of your own")
    metadata: str | None = _option(None, "JSON, or name=value pairs separated by commas, for tasks that take some")
    apply_chat_template: bool = _option(False, "wrap prompts in the tokenizer's chat template")
    system_instruction: str | None = _option(None, "text before every prompt")
    seed: int = _option(1234, "random seed for few-shot choice and sampling")

    def __post_init__(self) -> None:
        for name in ("backbone", "tasks", "output"):
            if not getattr(self, name).strip():
                raise UserError(f"--{name} must not be empty")
        if self.batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, got {self.batch_size}")
        if self.noise_rows is not None and (self.noise_rows < 0 or self.noise_rows == self.batch_size):
            raise UserError(
                f"--noise_rows must be 0, or another number of rows than --batch_size {self.batch_size}, "
                f"got {self.noise_rows}"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, got {self.limit}")
        if self.limit is not None and self.samples is not None:
            raise UserError("--limit and --samples both choose documents; give one")
        if self.draw is not None and (self.limit is None or self.draw < 0):
            raise UserError("--draw is a seed of at least 0, and needs --limit: how many documents of each task")
        self.thresholds_by_task()  # refuses names that are none
        if self.prune_scope is not None and self.prune_scope not in get_args(PruneScope):
            raise UserError(f"--prune_scope must be all or generated, got {self.prune_scope!r}")
        if self.prune_scope is not None and not self.prune:
            raise UserError("--prune_scope has no effect without --prune; add it, or remove --prune_scope")
        if self.verify_tokens is not None and self.verify_tokens < 1:
            raise UserError(f"--verify_tokens must be at least 1, got {self.verify_tokens}")
        if self.verify_tokens is not None and VERIFY not in items_of(self.state_modes) and not self.verify_at:
            raise UserError(
                "--verify_tokens has no effect without --state_modes verify or --verify_at; add one of them"
            )
        confidences = items_of(self.confidences or "")
        if self.confidences is not None:
            check_names("confidences", confidences, CONFIDENCES)
        check_names("state_modes", items_of(self.state_modes), STATE_MODES)
        if self.samples is not None:
            _ = self.samples_given  # refuses a file that is not there
        if self.propose is not None:
            proposing(confidences, self.propose)
        if self.confirm is not None and self.confirm not in get_args(Confirm):
            raise UserError(f"--confirm must be {' or '.join(get_args(Confirm))}, got {self.confirm!r}")
        if self.confirm is not None and not any(name.startswith(CASCADE) for name in confidences):
            raise UserError(
                "--confirm has no effect without a cascade among --confidences; add one, or remove --confirm"
            )
        given = self.shared_arguments
        if clash := sorted(_DECIDED & set(given)):
            raise UserError(f"--model_args must not set {', '.join(clash)}: the sweep decides them")
        if "tp_plan" in given:
            raise UserError("--model_args must not set tp_plan: processes share the points; use parallelize=True")

    @property
    def task_names(self) -> list[str]:
        return items_of(self.tasks)

    def thresholds_by_task(self) -> dict[tuple[float, ...], tuple[str, ...]]:
        """Returns thresholds by rising mean, each with the tasks that are answered at it.

        Raises:
            UserError: they are no numbers, or lists are given for other tasks than ``tasks``.
        """
        if "=" not in self.thresholds:
            return dict.fromkeys(parse_thresholds(self.thresholds), tuple(self.task_names))
        lists: dict[str, list[tuple[float, ...]]] = {}
        for part in filter(None, (part.strip() for part in self.thresholds.split(";"))):
            task, _, text = part.partition("=")
            lists[task.strip()] = parse_thresholds(text)
        if unknown := sorted(set(lists) - set(self.task_names)):
            raise UserError(f"--thresholds: {', '.join(unknown)} is not among --tasks {self.tasks}")
        if missing := [task for task in self.task_names if task not in lists]:
            raise UserError(
                f"--thresholds has no list for {', '.join(missing)}; give one for every task, or one for all"
            )
        values = sorted({value for found in lists.values() for value in found}, key=_by_mean)
        return {value: tuple(task for task in self.task_names if value in lists[task]) for value in values}

    @property
    def shared_arguments(self) -> dict[str, Any]:
        """The arguments of ``--model_args`` by name."""
        return pairs("--model_args", self.model_args)

    @property
    def samples_given(self) -> dict[str, list[int]] | None:
        """The documents of ``--samples`` by task, in rising order."""
        if self.samples is None:
            return None
        text, path = self.samples, Path(self.samples).expanduser()
        try:
            if not text.lstrip().startswith("{"):
                text = path.read_text(encoding="utf-8")
            samples = {task: sorted({int(i) for i in indices}) for task, indices in json.loads(text).items()}
        except OSError as error:
            raise UserError(f"--samples {self.samples} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f'--samples must be JSON like {{"task": [0, 7]}}: {error}') from error
        if missing := [task for task in self.task_names if not samples.get(task)]:
            raise UserError(f"--samples has no documents for {', '.join(missing)}")
        return samples

    @property
    def metadata_given(self) -> dict[str, Any]:
        """The values of ``--metadata`` by name."""
        return json_or_pairs("--metadata", self.metadata)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parse_thresholds(text: str) -> list[tuple[float, ...]]:
    """Reads ``0.5:0.95:0.05`` or ``0.5,0.7+0.8`` as tuples of one number, or of one per exit, by rising mean.

    Raises:
        UserError: they are no numbers or lie outside [0, 1), where 1 is allowed for some of several exits.
    """
    try:
        values: list[tuple[float, ...]] = []
        for item in items_of(text):
            if ":" in item:
                first, last, step = (float(part) for part in item.split(":"))
                if not step > 0 or last < first:
                    raise UserError(f"--thresholds {item!r}: the order is first:last:step, rising, e.g. 0.5:0.9:0.1")
                count = math.floor((last - first) / step + 1e-9) + 1
                values += [(round(first + i * step, 10),) for i in range(count)]
            else:
                values.append(tuple(float(part) for part in item.split("+")))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"--thresholds must be first:last:step or numbers like 0.5,0.7, got {text!r}") from None
    if not values or not all(0 <= min(value) < 1 and max(value) <= 1 for value in values):
        raise UserError(f"--thresholds must lie in [0, 1), got {text!r}; the full model is always part of a sweep")
    return sorted(set(values), key=_by_mean)


def _by_mean(thresholds: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    """Orders thresholds, one or one per exit, by their mean."""
    return mean(thresholds), thresholds


def name_of(thresholds: Sequence[float]) -> str:
    """Returns thresholds as a user would write them."""
    return "+".join(f"{threshold:g}" for threshold in thresholds)


def uses_classifiers(confidences: Sequence[str]) -> bool:
    """Says whether some of these confidences need trained classifiers."""
    return any(name.partition(":")[0] in (*KINDS, CASCADE) for name in confidences)


def names_of(options: SweepOptions) -> list[str]:
    """Returns what names and lines of points begin with, for each of the confidences that are named."""
    pairs = proposing(items_of(options.confidences or ""), options.propose)
    return [shown_name(*pair, options.confirm) for pair in pairs]


def shown_name(confidence: str, propose: float | None, confirm: str | None = None) -> str:
    """Returns what a confidence is called in names and lines of points; ``propose``, ``confirm``: of a cascade."""
    if propose is None:
        return confidence
    return "-".join([confidence.replace(":", "-"), f"{propose:g}", *([confirm] if confirm else [])])


def check_names(option: str, names: Sequence[str], choices: Sequence[str]) -> None:
    """Raises UserError where an option names something else than ``choices``, or nothing."""
    wrong = [name for name in names if name not in choices]
    if wrong or not names:
        nearest = difflib.get_close_matches(wrong[0], choices, n=1) if wrong else []
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"--{option} must name some of {', '.join(choices)}, got {', '.join(wrong) or 'none'}{hint}")


def proposing(confidences: Sequence[str], propose: str | None) -> list[tuple[str, float | None]]:
    """Returns confidences, those that are cascades with each of the values of ``--propose``."""
    if propose is not None and not any(confidence.startswith(CASCADE) for confidence in confidences):
        raise UserError("--propose has no effect without a cascade among --confidences; add one, or remove --propose")
    try:
        values = [DEFAULT_PROPOSE] if propose is None else [float(text) for text in items_of(propose)]
    except ValueError:
        values = []
    if not values or not all(0 <= value <= 1 for value in values):
        raise UserError(f"--propose must be numbers in [0, 1], separated by commas, got {propose!r}")
    pairs: list[tuple[str, float | None]] = []
    for confidence in confidences:
        pairs += [(confidence, value) for value in values] if confidence.startswith(CASCADE) else [(confidence, None)]
    return pairs


def read_yaml(text: str) -> dict[str, Any]:
    """Returns the options in a YAML file; lists may stand for what the command line separates by commas."""
    data = yaml.safe_load(text)
    if not isinstance(data, Mapping):
        raise UserError("the file of --config must hold options by name, e.g. `backbone: mistral`")
    names = [item.name for item in dataclasses.fields(SweepOptions)]
    options: dict[str, Any] = {}
    for name, value in data.items():
        if name not in names:
            raise UserError(unknown_name("option", str(name), names, "options are", names))
        if name == "thresholds" and isinstance(value, Mapping):
            lists = {task: items if isinstance(items, (list, tuple)) else [items] for task, items in value.items()}
            value = ";".join(f"{task}={','.join(map(str, items))}" for task, items in lists.items())
        elif isinstance(value, Mapping):
            value = ",".join(f"{key}={item}" for key, item in value.items())
        elif isinstance(value, (list, tuple)):
            value = ",".join(str(item) for item in value)
        elif name in ("thresholds", "prune", "static_exits", "verify_at", "tasks") and value is not None:
            value = str(value)
        options[str(name)] = value
    return options


def items_of(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def whole_number(option: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"--{option} must be whole numbers separated by commas, got {text!r}")
    return int(text)
