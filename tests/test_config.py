"""Every model argument is accepted with its meaning or refused by one line that says what to do."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from dynamax_lm_eval.config import OWN_ARGUMENTS, DynamaxArgs, argument_table, parse_model_args
from dynamax_lm_eval.errors import UserError

HARNESS = {"pretrained", "dtype", "batch_size", "device", "backend", "max_length", "parallelize", "tp_plan"}


def parse(**args: Any) -> Any:
    return parse_model_args({"backbone": "x", **args}, HARNESS)[0]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("threshold", 0.8, (0.8,)),
        ("threshold", "0.8", (0.8,)),
        ("threshold", 1, (1.0,)),
        ("threshold", 0, (0.0,)),
        ("threshold", [0.8, 1, 0.5], (0.8, 1.0, 0.5)),
        ("threshold", "0.8+0.9", (0.8, 0.9)),
        ("exit_layers", [3, 5], (3, 5)),
        ("exit_layers", "3+5", (3, 5)),
        ("exit_layers", 4, (4,)),
        ("prune_layers", 2, 2),
        ("prune_layers", "2", 2),
        ("prune_layers", [20, 21], (20, 21)),
        ("confidence", "entropy", "entropy"),
        ("state_mode", "skip", "skip"),
        ("exit_scope", "all", "all"),
        ("repetition_penalty", 1.1, 1.1),
        ("threshold_decay", 0, 0.0),
        ("threshold_decay", None, None),
        ("exits", "some/folder", "some/folder"),
        ("classifier", "calm", "calm"),
        ("classifier_warmup", "16", 16),
        ("final_block", "true", True),
        ("final_block", False, False),
        ("preset", "paper", "paper"),
        ("static_segments", "auto", None),
        ("static_segments", True, True),
        ("static_segments", "false", False),
    ],
)
def test_accepted(name: str, value: Any, expected: Any) -> None:
    assert getattr(parse(**{name: value}), name) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        ({"threshold": -0.1}, r"threshold must be in \[0, 1\], got -0.1"),
        ({"threshold": "abc"}, "threshold must be a number, got 'abc'"),
        ({"threshold": math.nan}, "threshold must be a number, got nan"),
        ({"threshold": "nan"}, "threshold must be a number, got nan"),
        ({"threshold": True}, "threshold must be a number, got True"),
        ({"threshold": []}, "threshold must not be an empty list"),
        ({"state_mode": "foo"}, "state_mode must be one of recompute, learned, copy, copy_previous, skip, got 'foo'"),
        ({"confidence": "sofmax"}, "confidence must be one of classifier, softmax, entropy, state"),
        ({"exit_scope": "prompt"}, "exit_scope must be one of generated, all"),
        ({"exit_layers": [5, 3]}, "exit_layers must be in rising order"),
        ({"exit_layers": "3,40"}, r"exit_layers is one number, or several joined by \+, got '3,40'; write 3\+40"),
        ({"exit_layers": [3, 3]}, "exit_layers names a layer twice"),
        ({"exit_layers": [2.5]}, "exit_layers must be made of whole numbers"),
        ({"prune_layers": -1}, "prune_layers must be a number of blocks"),
        ({"prune_layers": 1.5}, "prune_layers must be made of whole numbers"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0"),
        ({"threshold_decay": -1}, "threshold_decay must be a finite number of at least 0"),
        ({"threshhold": 0.5}, "unknown model argument 'threshhold'; did you mean 'threshold'"),
        ({"exitlayers": 4}, "did you mean 'exit_layers'"),
        ({"zzzzqqqq": 4}, "dynamax's own are: backbone, threshold"),
        (
            {"attn_implementation": "flash_attention_2"},
            "attn_implementation='flash_attention_2' cannot be honoured",
        ),
        ({"parallelize": "perhaps"}, "parallelize must be true or false"),
        ({"static_segments": "always"}, "static_segments must be auto, true or false, got 'always'"),
        ({"torch_dtype": "float16"}, "write dtype= instead"),
        ({"backend": "seq2seq"}, "needs a decoder-only"),
        ({"pretrained": "y"}, "name different models"),
        ({"backbone": ""}, "backbone must be an alias"),
        ({"rows_in_flight": 8}, "rows_in_flight=8 needs a batch_size from 2 to that many rows, got 1"),
        ({"rows_in_flight": 8, "batch_size": 9}, "rows_in_flight=8 needs a batch_size from 2 to that many rows, got 9"),
        ({"rows_in_flight": 8, "batch_size": "auto"}, "rows_in_flight=8 needs a batch_size from 2"),
        ({"rows_in_flight": 8, "batch_size": 4, "rebatch": False}, "rows_in_flight has no effect with rebatch=false"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, or auto, got 0"),
        ({"batch_size": "many"}, "batch_size must be a whole number"),
        ({"backbone": 3}, "backbone must be an alias"),
    ],
)
def test_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(**args)
    assert "\n" not in str(caught.value)


def test_pretrained_is_another_spelling_of_backbone() -> None:
    own, passed_on = parse_model_args({"pretrained": "gpt2", "dtype": "float16", "parallelize": False}, HARNESS)
    assert own.backbone == "gpt2"
    assert passed_on == {"dtype": "float16", "parallelize": False}
    with pytest.raises(UserError, match="backbone must be"):
        parse_model_args({"threshold": 0.5}, HARNESS)


def test_the_table_of_the_documentation_is_generated() -> None:
    page = (Path(__file__).parents[1] / "docs" / "arguments.md").read_text(encoding="utf-8")
    table = page.partition("from this folder -->\n")[2].partition("<!-- end of arguments -->")[0]
    assert table == argument_table().replace("](docs/", "](")


def test_every_argument_has_a_meaning_and_a_parser() -> None:
    for row in dataclasses.fields(DynamaxArgs):
        if row.name in OWN_ARGUMENTS:
            assert row.metadata["help"], row.name
            assert row.name == "backbone" or callable(row.metadata["parse"]), row.name
