"""The task coqa_exit on small made-up files; the Hub is replaced by rows."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers.data
from helpers_tasks import HARNESS, STORY, coqa_row, load, module_of, prompt, write_jsonl


class TestCoqa:
    PROMPT = (
        f"{STORY}\n\nQ: What did Mira plant?\n\nA: a pear tree\n\nQ: Who ate the leaves?\n\nA: A goat.\n\n"
        "Q: What did she build?\n\nA:"
    )

    @pytest.fixture
    def harness(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The harness's own module, with our two comparisons in place of those transformers 5 lacks."""
        ours = module_of("coqa_exit")
        squad = types.ModuleType("transformers.data.metrics.squad_metrics")
        squad.compute_exact, squad.compute_f1 = ours.exact, ours.f1  # type: ignore[attr-defined]
        metrics = types.ModuleType("transformers.data.metrics")
        metrics.squad_metrics = squad  # type: ignore[attr-defined]
        monkeypatch.setattr(transformers.data, "metrics", metrics, raising=False)
        monkeypatch.setitem(sys.modules, "transformers.data.metrics", metrics)
        monkeypatch.setitem(sys.modules, "transformers.data.metrics.squad_metrics", squad)
        theirs = types.ModuleType("harness_coqa")
        exec((HARNESS / "coqa" / "utils.py").read_text(), theirs.__dict__)
        return theirs

    @staticmethod
    def hub_row() -> dict[str, Any]:
        """The Hub keeps the turns as an object of lists."""

        def columns(turns: list[dict[str, Any]]) -> dict[str, list[Any]]:
            return {key: [turn[key] for turn in turns] for key in ("input_text", "turn_id")}

        row = coqa_row()
        additional = {key: columns(turns) for key, turns in row["additional_answers"].items()}
        return {key: row[key] for key in ("id", "source", "story")} | {
            "questions": columns(row["questions"]),
            "answers": columns(row["answers"]),
            "additional_answers": additional,
        }

    def test_prompt(self, data_dir: Path, harness: Any) -> None:
        task = load("coqa_exit", data_dir)
        assert prompt(task) == self.PROMPT
        assert harness.doc_to_text(self.hub_row()) == self.PROMPT
        theirs = (HARNESS / "coqa" / "default.yaml").read_text()
        assert 'until:\n    - "\\nQ:"' in theirs and task.config.generation_kwargs["until"] == ["\nQ:"]

    def test_one_turn(self, tmp_path: Path) -> None:
        row = coqa_row()
        row |= {key: row[key][:1] for key in ("questions", "answers")}
        row["additional_answers"] = {}
        write_jsonl(tmp_path / "coqa.jsonl", [row])
        task = load("coqa_exit", tmp_path)
        assert prompt(task) == f"{STORY}\n\nQ: What did Mira plant?\n\nA:"
        assert task.eval_docs[0]["references"] == ["a pear tree"]

    def test_examples_are_other_conversations(self, data_dir: Path) -> None:
        task = load("coqa_exit", data_dir)
        for index, other in ((0, "invented-2"), (1, "invented-1")):
            (shot,) = task.sampler.sample(n=1, eval_doc=task.eval_docs[index])
            assert shot["id"] == other
        assert prompt(task, num_fewshot=1) == f"{self.PROMPT} a fence\n\n{self.PROMPT}"

    def test_hub(self, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
        asked = []

        def load_dataset(*names: str, **options: str) -> Any:
            asked.append((names, options))
            return datasets.Dataset.from_list([self.hub_row()])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        utils = module_of("coqa_exit")
        utils.read.cache_clear()
        task = load("coqa_exit")
        load("coqa_exit")
        utils.read.cache_clear()
        assert asked == [(("EleutherAI/coqa",), {"split": "validation"})]
        assert task.eval_docs[0] == load("coqa_exit", data_dir).eval_docs[0]
        assert task.eval_docs[0]["references"] == ["a fence", "A fence!", "fence", "a wooden fence"]

    def test_incomplete_conversation(self, tmp_path: Path) -> None:
        row = coqa_row()
        row["additional_answers"]["1"].pop()
        write_jsonl(tmp_path / "coqa.jsonl", [row])
        with pytest.raises(ValueError, match="invented-1 has not one answer to each question"):
            load("coqa_exit", tmp_path)

    @pytest.mark.parametrize("column", ["additional_answers", "questions", "answers", "story"])
    @pytest.mark.parametrize("value", [None, 3, ["x"], {"1": [{"text": "x"}]}])
    def test_values_of_another_shape(self, column: str, value: Any, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "coqa.jsonl", [coqa_row(), {**coqa_row(), column: value}])
        with pytest.raises(ValueError, match=r"coqa\.jsonl: line 2 "):
            load("coqa_exit", tmp_path)

    @pytest.mark.parametrize(
        ("text", "normalized"),
        [
            ("The  Cat's\tan   animal!", "cats animal"),
            ("A.n the", ""),  # "an the" once the full stop is gone
            ("theatre and a-the", "theatre and athe"),
            ("«Été» 3,000", "«été» 3000"),  # ASCII punctuation only
        ],
    )
    def test_normalize(self, text: str, normalized: str) -> None:
        assert module_of("coqa_exit").normalize(text) == normalized

    @pytest.mark.parametrize(
        ("references", "prediction", "em", "f1"),
        [
            # One reference: nothing is left out.
            (["The white cat."], "a White cat", 1, 1),
            # 2 words in common; precision 2/3, recall 2/2: F1 = 2 * (2/3) * 1 / (2/3 + 1) = 0.8.
            (["white cat"], "one white cat", 0, 0.8),
            # Leave out "yes": best of {no} = 0. Leave out "no": best of {yes} = 1. Mean 1/2.
            (["yes", "no"], "Yes.", 1 / 2, 1 / 2),
            # Whichever is left out, a "yes" remains: 1 three or four times. Equal references count separately.
            (["yes", "yes", "yes", "it did"], "yes", 1, 1),
            # Leave out the first: 0. Leave out any other: the first remains, 1. Mean 3/4.
            (["in the barn", "a stable", "outside", "the field"], "in barn", 3 / 4, 3 / 4),
            # F1 against each: "fence" 1/1 and 1/2 -> 2/3; "a wooden fence" = "wooden fence" -> 1; "the gate" -> 0.
            # Left out 1st: max(1, 0) = 1; 2nd: max(2/3, 0) = 2/3; 3rd: max(2/3, 1) = 1. Mean (1 + 2/3 + 1)/3 = 8/9.
            # EM: 0, 1, 0. Left out 1st: 1; 2nd: 0; 3rd: 1. Mean 2/3.
            (["fence", "a wooden fence", "the gate"], "wooden fence", 2 / 3, 8 / 9),
            # A word counts as often as it occurs on both sides: "no no" against "no" has 1 in common;
            # precision 1/2, recall 1: F1 = 2/3. Against "no no no": precision 1, recall 2/3: F1 = 4/5.
            # Leave out "no": 4/5; leave out "no no no": 2/3. Mean 11/15.
            (["no", "no no no"], "no no", 0, 11 / 15),
            # Nothing left of the answer: equal only to what has nothing left either.
            (["the", "cat"], "", 1 / 2, 1 / 2),
            (["cat", "dog"], "the", 0, 0),
        ],
    )
    def test_scores(self, references: list[str], prediction: str, em: float, f1: float) -> None:
        found = module_of("coqa_exit").scores(references, prediction)
        assert found == {"em": pytest.approx(em, abs=1e-12), "f1": pytest.approx(f1, abs=1e-12)}

    def test_leave_one_out_of_the_harness(self, harness: Any) -> None:
        """Equal to the harness's where references differ; it merges equal ones first, the official script does not."""
        words = ["red", "barn", "the", "goat", "Mira", "fence.", "a"]
        generator = random.Random(1)
        scores = module_of("coqa_exit").scores
        for count in [1, 2, 3, 4] * 12 + [4, 5]:
            references = [" ".join(generator.choices(words, k=generator.randint(1, 4))) for _ in range(count)]
            answer = " ".join(generator.choices(words, k=generator.randint(0, 4)))
            assert scores(references, answer) == harness.compute_scores(references, answer)
        doc = self.hub_row()
        for turns, text in zip(
            [doc["answers"], *doc["additional_answers"].values()], ["yes"] * 3 + ["it did"], strict=True
        ):
            turns["input_text"][-1] = text
        assert harness.process_results(doc, ["yes"]) == {"em": 0.5, "f1": 0.5}
        assert scores(["yes"] * 3 + ["it did"], "yes") == {"em": 1.0, "f1": 1.0}

    def test_first_line_counts(self, data_dir: Path) -> None:
        task = load("coqa_exit", data_dir)
        assert task.process_results(task.eval_docs[0], ["\n a fence\nand a gate"])["em"] == 1.0
        assert task.process_results(task.eval_docs[0], [""]) == {"em": 0.0, "f1": 0.0}
