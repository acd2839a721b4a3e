"""Arguments damaged by swapped types, wrong ranges and misspellings are honoured or refused, never ignored."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from lm_eval.models.huggingface import HFLM

from dynamax_lm_eval.config import OWN_ARGUMENTS
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness import hflm
from dynamax_lm_eval.lm import DynamaxLM

LAYERS = 6
VALID: dict[str, list[Any]] = {
    "threshold": [0.8, 1, 0, "0.5", [0.5, 0.6], "0.5+0.6", 0.999],
    "confidence": ["softmax", "entropy", "state"],
    "exit_layers": [[2, 4], "2+4", 3, [1, 5]],
    "state_mode": ["recompute", "copy", "copy_previous", "skip"],
    "prune_layers": [0, 1, "2", [1, 2], 4],
    "exit_scope": ["generated", "all"],
    "repetition_penalty": [1.0, 1.3, "1.1", None],
    "threshold_decay": [0, 4.0, "2", None],
    "classifier": ["calm", "mamba", None],
    "classifier_warmup": [0, 8, "16", None],
    "final_block": [True, "false", None],
    "exits_check": [True, "true"],
    "preset": ["paper", "thesis", None],
    "batch_size": [1, "4", "auto"],
    "dtype": ["float32"],
}
STRANGE: list[Any] = [
    *[-1, 0.5, 7, 99, 1e9, float("nan"), float("inf"), True, False, "", " ", "abc", "None", "0,5", "1e400", b"x"],
    *[[], {}, [None], ["a"], [0.5, "x"], [[1]], (2, 4), [4, 2], [2, 2], [0], "+", "2+", "2++4", "recompute ", "SKIP"],
]


def mutate(rng: random.Random) -> dict[str, Any]:
    """One to three arguments, most of them damaged."""
    args: dict[str, Any] = {}
    for name in rng.sample(list(VALID), rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.3:
            args[name] = rng.choice(VALID[name])
        elif kind < 0.75:
            args[name] = rng.choice(STRANGE)
        elif kind < 0.85:
            args[name] = rng.choice(VALID[rng.choice(list(VALID))])
        else:
            letters = list(name)
            letters[rng.randrange(len(letters))] = rng.choice("abcxyz_")
            args["".join(letters)] = rng.choice(VALID[name])
    return args


@pytest.fixture(scope="module")
def configured(model_folder: Path) -> Any:
    """Builds the model's policy without loading weights; returns it with the arguments as understood."""

    class ReachedError(BaseException):
        pass

    def build(args: dict[str, Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:

            def stop(self: Any, *_: Any, **__: Any) -> None:
                raise ReachedError

            patch.setattr(HFLM, "__init__", stop)
            # __init__ is replaced, so its argument names must be kept.
            patch.setattr(
                hflm,
                "harness_arguments",
                lambda: frozenset({"pretrained", "batch_size", "dtype"}),
            )
            lm = DynamaxLM.__new__(DynamaxLM)
            try:
                lm.__init__(**{"pretrained": str(model_folder), **args})  # type: ignore[misc]
            except ReachedError:
                return lm
        raise AssertionError("weights were not reached and nothing was refused")

    return build


@pytest.mark.parametrize("block", range(6))
def test_300_damaged_argument_sets(configured: Any, block: int) -> None:
    rng = random.Random(block)
    accepted = refused = 0
    for _ in range(50):
        args = mutate(rng)
        try:
            lm = configured(args)
        except UserError as error:
            refused += 1
            lines = str(error).count("\n")
        else:
            lines = 0
            accepted += 1
            assert set(args) <= {*OWN_ARGUMENTS, "batch_size", "dtype"}, args
            check_meaning(args, lm)
        assert lines == 0, args
    assert accepted > 2
    assert refused > 20


def check_meaning(args: dict[str, Any], lm: DynamaxLM) -> None:
    """What the result file says is what was given."""
    shown = lm.policy.describe()
    for name, value in args.items():
        if value is None:
            continue
        if name == "threshold":
            items = value.split("+") if isinstance(value, str) else value
            items = items if isinstance(items, (list, tuple)) else [items]
            numbers = [float(item) for item in items]
            assert shown["thresholds"] == (numbers * len(shown["exit_layers"]) if len(numbers) == 1 else numbers)
        elif name == "exit_layers":
            items = value.split("+") if isinstance(value, str) else value
            assert shown["exit_layers"] == [int(i) for i in (items if isinstance(items, (list, tuple)) else [items])]
        elif name == "prune_layers" and isinstance(value, (list, tuple)):
            assert shown["pruned_blocks"] == sorted(int(item) for item in value)
        elif name == "prune_layers":
            assert len(shown["pruned_blocks"]) == int(value)
        elif name in ("confidence", "state_mode", "exit_scope"):
            assert shown[name] == value
        elif name == "threshold_decay":
            assert shown[name] == float(value)
        elif name == "final_block":
            assert shown[name] == (str(value).lower() == "true")
        elif name == "exits_check":
            assert lm.args.exits_check == (str(value).lower() == "true")
        elif name == "preset":
            assert lm.args.preset == value
            assert shown["final_block"] or "final_block" in args
        elif name in ("classifier", "classifier_warmup"):
            raise AssertionError("there are no trained exits, so this has no effect and must be refused")
        elif name == "repetition_penalty":
            assert lm.args.repetition_penalty == float(value)


def test_the_same_argument_by_two_names_must_agree(model_folder: Path, configured: Any) -> None:
    assert configured({"backbone": str(model_folder)}).args.backbone == str(model_folder)
    with pytest.raises(UserError, match="name different models"):
        configured({"backbone": "mistral"})
    assert hf.AutoConfig.from_pretrained(model_folder).num_hidden_layers == LAYERS
