"""The tasks triviaqa_long, coqa_exit and truthfulqa_gen_1shot, on small made-up files; the Hub is replaced by rows."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import transformers.data
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from rouge_score.scoring import BootstrapAggregator

from dynamax_lm_eval import tasks_dir

NAMES = ("triviaqa_long", "coqa_exit", "truthfulqa_gen_1shot")
HARNESS = Path(lm_eval.tasks.__file__).parent

# The documents of the READMEs.
TRIVIA_SHOTS = [
    ("shot-1", "Which artificial waterway links the Mediterranean Sea to the Red Sea?", "Suez Canal"),
    ("shot-2", "Which mountain is the highest in Japan?", "Mount Fuji"),
    # Of the same size as the second: the id decides.
    ("shot-3", "Who painted the woman with a faint smile?", "Leo Vinci?"),
    ("shot-4", "Which star is the nearest?", "The Sun"),
    *((f"shot-{i}", f"Which letter is number {i}?", "ABCDEFGHI"[i]) for i in range(5, 9)),
    ("shot-9", "Which number is the ninth example?", "9"),
]
LONG = (
    "q-0001",
    "What is the full title of the book that Charles Darwin published in 1859?",
    ["On the Origin of Species by Means of Natural Selection", "The Origin of Species by Means of Natural Selection."],
)
STORY = "Mira planted a pear tree behind the mill. In spring a goat ate its leaves, so she built a fence."
TURNS = [
    ("What did Mira plant?", "a pear tree"),
    ("Who ate the leaves?", "A goat."),
    ("What did she build?", "a fence"),
]
OTHERS = ["A fence!", "fence", "a wooden fence"]
SPIDER = {
    "Type": "Adversarial",
    "Category": "Animals",
    "Question": "How many legs does a spider lose when it rains? ",
    "Best Answer": "None",
    "Correct Answers": "None; A spider loses no legs in the rain.;; ",
    "Incorrect Answers": "Two legs; All, because they rust",
    "Source": "invented",
}


def trivia_rows() -> list[dict[str, Any]]:
    """1000 rows with long answers, nine with a single short one, and some that must not be taken."""
    rows = [{"question_id": LONG[0], "question": LONG[1], "aliases": LONG[2]}]
    for i in range(2, 1001):
        # The shortest alias counts, and the longer one comes first.
        aliases = [f"an even longer accepted answer numbered {i:04d}", f"a long accepted answer {i:04d}"]
        rows.append({"question_id": f"q-{i:04d}", "question": f"Question {i}?", "aliases": aliases})
    # Ranked after the first 1000, before the examples, but with two accepted answers.
    rows.append({"question_id": "q-1001", "question": "Out?", "aliases": ["a very long list", "two long words"]})
    # One long alias does not help: the shortest counts.
    rows.append({"question_id": "q-1002", "question": "Short?", "aliases": ["x", "a very, very long and wordy answer"]})
    rows += [{"question_id": key, "question": question, "aliases": [alias]} for key, question, alias in TRIVIA_SHOTS]
    rows.append({"question_id": LONG[0], "question": "listed twice", "aliases": ["A much longer answer " * 9]})
    rows.append({"question_id": "x-blank", "question": "Blank alias?", "aliases": [" ", " z "]})
    random.Random(0).shuffle(rows)
    # Of two rows with one id the first counts.
    rows.sort(key=lambda row: row["question"] == "listed twice")
    return rows


def coqa_row() -> dict[str, Any]:
    def turns(texts: list[str]) -> list[dict[str, Any]]:
        return [{"input_text": text, "turn_id": i, "span_start": 0} for i, text in enumerate(texts, 1)]

    answers = [answer for _, answer in TURNS]
    return {
        "source": "mctest",
        "id": "invented-1",
        "filename": "none",
        "story": STORY,
        "questions": turns([question for question, _ in TURNS]),
        "answers": turns(answers),
        "additional_answers": {str(i): turns([*answers[:-1], other]) for i, other in enumerate(OTHERS)},
        "name": "none",
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]], *, gzipped: bool = False) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if gzipped else text.encode())


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    # The published file starts with a byte order mark.
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "triviaqa_made_up.jsonl", trivia_rows())
    write_jsonl(folder / "coqa_made_up.jsonl.gz", [coqa_row(), coqa_row() | {"id": "invented-2"}], gzipped=True)
    empty = SPIDER | {"Question": "No false answer?", "Incorrect Answers": ""}
    write_csv(folder / "truthfulqa_made_up.csv", [SPIDER, empty])
    (folder / "notes.txt").write_text("not data")
    return folder


class Parrot(LM):
    """Always the same answer. The harness's dummy model would look for a tokenizer on the Hub."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [" a fence" for _ in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def load(name: str, data_dir: Any = None) -> Any:
    """A task as the harness builds it, without its own tasks and without the network."""
    metadata = {"threshold": 1} | ({} if data_dir is None else {"data_dir": str(data_dir)})
    return TaskManager(include_path=str(tasks_dir()), include_defaults=False, metadata=metadata).load([name])["tasks"][
        name
    ]


def prompt(task: Any, index: int = 0, num_fewshot: int | None = None) -> str:
    shots = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
    return str(task.fewshot_context(task.eval_docs[index], num_fewshot=shots))


def module_of(name: str) -> Any:
    """The task's utils.py, as the harness loaded it."""
    load_yaml(tasks_dir() / name / f"{name}.yaml")
    return sys.modules[str(tasks_dir().resolve() / name / "utils")]


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Messages of triviaqa_long; the harness's logger may not propagate to pytest's."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = found.append  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval.tasks.triviaqa_long")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


class TestEveryTask:
    def test_group(self, data_dir: Path) -> None:
        manager = TaskManager(
            include_path=str(tasks_dir()), include_defaults=False, metadata={"data_dir": str(data_dir)}
        )
        assert "dynamax" in manager.all_groups
        assert set(NAMES) <= set(manager.all_subtasks)
        assert not any(name.startswith("_") for name in manager.all_tasks)
        loaded = manager.load(["dynamax"])
        assert tuple(loaded["tasks"]) == NAMES
        assert loaded["group_map"] == {"dynamax": list(NAMES)}

    @pytest.mark.parametrize("name", NAMES)
    def test_config(self, name: str, data_dir: Path) -> None:
        task = load(name, data_dir)
        assert task.VERSION == 1.0
        assert task.higher_is_better() and all(task.higher_is_better().values())
        assert task.config.test_split == "validation"
        assert task.config.generation_kwargs["do_sample"] is False

    @pytest.mark.parametrize("name", NAMES)
    def test_the_readme_shows_the_prompt(self, name: str, data_dir: Path) -> None:
        readme = (tasks_dir() / name / "README.md").read_text(encoding="utf-8")
        assert f"```\n{prompt(load(name, data_dir))}\n```" in readme

    @pytest.mark.parametrize("name", NAMES)
    def test_evaluates(self, name: str, data_dir: Path) -> None:
        task = load(name, data_dir)
        manager = TaskManager(include_defaults=False)
        results = lm_eval.simple_evaluate(Parrot(), tasks=[task], task_manager=manager, limit=2, bootstrap_iters=0)
        metrics = {key.split(",")[0] for key in results["results"][name] if "," in key and "stderr" not in key}
        assert metrics == set(task.higher_is_better())

    @pytest.mark.parametrize("name", NAMES)
    def test_read_once(self, name: str, data_dir: Path) -> None:
        assert load(name, data_dir).dataset["validation"] is load(name, data_dir).dataset["validation"]

    def test_a_changed_file_is_read_again(self, tmp_path: Path) -> None:
        file = tmp_path / "coqa.jsonl"
        write_jsonl(file, [coqa_row()])
        assert len(load("coqa_exit", tmp_path).eval_docs) == 1
        write_jsonl(file, [coqa_row()] * 3)
        os.utime(file, ns=(0, 0))
        assert len(load("coqa_exit", tmp_path).eval_docs) == 3

    def test_relative_folder(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(data_dir.parent)
        assert len(load("coqa_exit", data_dir.name).eval_docs) == 2

    @pytest.mark.parametrize(
        ("name", "pattern"), zip(NAMES, ("triviaqa*.jsonl*", "coqa*.jsonl*", "truthfulqa*.csv*"), strict=True)
    )
    def test_missing_file(self, name: str, pattern: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError) as error:
            load(name, tmp_path)
        assert pattern in str(error.value) and str(tmp_path) in str(error.value) and name in str(error.value)
        with pytest.raises(FileNotFoundError, match="is not a folder") as error:
            load(name, tmp_path / "none")
        assert pattern in str(error.value)

    def test_ambiguous_or_empty_data_dir(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "coqa_a.jsonl", [coqa_row()])
        write_jsonl(tmp_path / "coqa_b.jsonl.gz", [coqa_row()], gzipped=True)
        with pytest.raises(ValueError, match=r"coqa_a\.jsonl, coqa_b\.jsonl\.gz; keep one"):
            load("coqa_exit", tmp_path)
        with pytest.raises(ValueError, match="data_dir is empty"):
            load("coqa_exit", "")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "holds no rows"),
            (b'{"id": 1', r"coqa\.jsonl: line 1 is no JSON \(Expecting"),
            (b'{"id": "a", "source": "b"}\n', "line 1 lacks story, questions, answers, additional_answers"),
            (b"[]\n", "line 1 lacks id"),
            (gzip.compress(b"{}" * 500, mtime=0)[:-9], r"coqa\.jsonl: Compressed file ended"),
            (b"\xff\xfe\x00", "can't decode"),
        ],
    )
    def test_damaged_file(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "coqa.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("coqa_exit", tmp_path)

    def test_damaged_csv(self, tmp_path: Path) -> None:
        file = tmp_path / "truthfulqa.csv"
        file.write_text("Question,Category\nWhy?,None\n")
        with pytest.raises(ValueError, match="the header lacks Best Answer, Correct Answers, Incorrect Answers"):
            load("truthfulqa_gen_1shot", tmp_path)
        file.write_text("Category,Question,Best Answer,Correct Answers,Incorrect Answers\na,b,c,d\n")
        os.utime(file, ns=(0, 0))
        with pytest.raises(ValueError, match="line 2 has fewer cells"):
            load("truthfulqa_gen_1shot", tmp_path)


class TestTriviaqa:
    def test_prompt(self, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        assert prompt(task) == (
            "Question: Which artificial waterway links the Mediterranean Sea to the Red Sea?\nAnswer: Suez Canal\n\n"
            "Question: Which mountain is the highest in Japan?\nAnswer: Mount Fuji\n\n"
            "Question: What is the full title of the book that Charles Darwin published in 1859?\nAnswer:"
        )
        assert prompt(task, 1).endswith("Answer: Mount Fuji\n\nQuestion: Question 2?\nAnswer:")
        assert task.config.generation_kwargs["until"] == ["\n"]

    def test_selection(self, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        documents = task.dataset["validation"]
        assert documents["question_id"] == [f"q-{i:04d}" for i in range(1, 1001)]
        assert documents[1]["answer"] == "a long accepted answer 0002"
        assert documents[1]["aliases"] == [
            "a long accepted answer 0002",
            "an even longer accepted answer numbered 0002",
        ]

    def test_examples_are_fixed_and_not_evaluated(self, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        shots = task.dataset["train"]
        # By words, then characters, then ids. "9" is the ninth.
        assert shots["question_id"] == [f"shot-{i}" for i in range(1, 9)]
        assert not set(shots["question_id"]) & set(task.dataset["validation"]["question_id"])
        starts = {prompt(task, i).rsplit("Question:", 1)[0] for i in range(0, 1000, 50)}
        assert len(starts) == 1
        assert prompt(task, num_fewshot=8).count("Question:") == 9

    def test_ranking_ties(self) -> None:
        rank = module_of("triviaqa_long")
        rows = [rank._row(f"id{i:04d}", "?", answer, []) for i, answer in enumerate(["aa bb"] * 997)]
        ties = [("z", "aa bb cc"), ("y", "aa bbb"), ("x", "aa bb"), ("id", "aa bb"), ("w", "aaaaaaaaaaaaaaaa")]
        evaluated, rest = rank._longest([*(rank._row(key, "?", answer, []) for key, answer in ties), *rows])
        # More words first, then more characters, then the smaller id; one word is never enough.
        assert [row["question_id"] for row in rest] == ["x", "w"]
        assert [row["question_id"] for row in evaluated] == ["id", *(f"id{i:04d}" for i in range(997)), "y", "z"]

    def test_shortest_alias_ties(self, tmp_path: Path) -> None:
        rows = trivia_rows()
        (row,) = (row for row in rows if row["question"] == LONG[1])
        row["aliases"] = ["b " * 10 + "cc", "b " * 10 + "bb", "c " * 9 + "ddddddddddddddd", "c " * 9 + "dddd"]
        write_jsonl(tmp_path / "triviaqa.jsonl", rows)
        assert load("triviaqa_long", tmp_path).eval_docs[0]["answer"] == "c " * 9 + "dddd"
        row["aliases"] = row["aliases"][:2]
        write_jsonl(tmp_path / "triviaqa.jsonl", rows)
        os.utime(tmp_path / "triviaqa.jsonl", ns=(0, 0))
        assert load("triviaqa_long", tmp_path).eval_docs[0]["answer"] == "b " * 10 + "bb"

    @pytest.mark.parametrize(
        ("answer", "score"),
        [
            ("  on the origin of species, by means of natural selection ", 1.0),
            ("The Origin of Species by Means of Natural Selection", 1.0),
            ("Origin of Species by Means of Natural Selection", 0.0),
            ("", 0.0),
        ],
    )
    def test_score(self, answer: str, score: float, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        (filtered,) = task._filters[0].filters[0]().apply([[answer]], [{}])
        assert task.process_results(task.eval_docs[0], filtered) == {"exact_match": score}

    def test_too_few_questions(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "triviaqa.jsonl", trivia_rows()[:500])
        with pytest.raises(ValueError, match="500 questions are too few"):
            load("triviaqa_long", tmp_path)

    @pytest.mark.parametrize("aliases", [[], [" "], "a string", None, [1]])
    def test_unusable_aliases(self, aliases: Any, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "triviaqa.jsonl", [{"question_id": "q-7", "question": "?", "aliases": aliases}])
        with pytest.raises(ValueError, match="q-7 has no list of accepted answers"):
            load("triviaqa_long", tmp_path)

    @pytest.mark.parametrize("question", [None, 3, ["?"]])
    def test_a_question_is_text(self, question: Any, tmp_path: Path) -> None:
        row = {"question_id": "q-7", "question": question, "aliases": ["a"]}
        write_jsonl(tmp_path / "triviaqa.jsonl", [{**row, "question": "?"}, row])
        with pytest.raises(ValueError, match=r"triviaqa\.jsonl: line 2 has .* as question, which must be text"):
            load("triviaqa_long", tmp_path)

    def test_another_selection_is_noticed(
        self, tmp_path: Path, data_dir: Path, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        utils = module_of("triviaqa_long")
        monkeypatch.setattr(utils, "_FOLDER", tmp_path)
        utils.main(["--write-ids", "--data_dir", str(data_dir)])
        written = json.loads((tmp_path / "ids_local_dpr_dev.json").read_text())
        assert written["questions"] == 1000 and written["examples"] == [f"shot-{i}" for i in range(1, 9)]
        utils._load.cache_clear()
        load("triviaqa_long", data_dir)
        assert records == []

        written["ids_sha256"] = "0" * 64
        (tmp_path / "ids_local_dpr_dev.json").write_text(json.dumps(written))
        utils._load.cache_clear()
        load("triviaqa_long", data_dir)
        (record,) = records
        assert record.levelno == logging.WARNING
        assert "ids_local_dpr_dev.json (different: ids_sha256)" in record.getMessage()

    def test_hub(self, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The main answer is the marked one, a question listed twice counts once, train gives the examples."""

        def row(key: str, value: str, aliases: list[str]) -> dict[str, Any]:
            answer = {"value": value, "aliases": aliases, "normalized_aliases": [], "type": "WikipediaEntity"}
            return {"question_id": key, "question": f"What is {key}?", "question_source": "none", "answer": answer}

        validation = [row(f"tc_{i:04d}", "three words each", ["Yes", "three words each"]) for i in range(1005)]
        twice = [row("tc_9999", "the very longest main answer", ["short"])] * 2
        train = [row(key, f"main {key}", ["other"]) for key in ("t3", "t1", "t1", *"abcdefgh")]
        hub = {"train": train, "validation": [*validation, *twice]}
        asked = []

        def load_dataset(*names: str, **_: Any) -> dict[str, datasets.Dataset]:
            asked.append(names)
            return {split: datasets.Dataset.from_list(rows) for split, rows in hub.items()}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        utils = module_of("triviaqa_long")
        monkeypatch.setattr(utils, "_FOLDER", tmp_path)
        utils._load.cache_clear()
        task = load("triviaqa_long")
        load("triviaqa_long")
        utils._load.cache_clear()
        assert asked == [("mandarjoshi/trivia_qa", "rc.nocontext")]
        assert task.dataset["validation"]["question_id"] == [*(f"tc_{i:04d}" for i in range(999)), "tc_9999"]
        assert task.eval_docs[-1]["aliases"] == ["the very longest main answer", "short"]
        assert task.eval_docs[0]["aliases"] == ["three words each", "Yes"]
        assert task.dataset["train"]["question_id"] == ["t3", "t1", *"abcdef"]
        assert prompt(task) == (
            "Question: What is t3?\nAnswer: main t3\n\nQuestion: What is t1?\nAnswer: main t1\n\n"
            "Question: What is tc_0000?\nAnswer:"
        )
        (record,) = records
        assert record.levelno == logging.INFO
        assert "no ids_hub.json to compare" in record.getMessage()

    def test_no_ids_of_the_hub_are_made_up(self) -> None:
        """The record of the local file is there; that of the Hub only once somebody with a network has written it."""
        folder = tasks_dir() / "triviaqa_long"
        for file in folder.glob("ids_*.json"):
            record = json.loads(file.read_text())
            assert record["questions"] == 1000 and len(record["examples"]) == 8
        assert (folder / "ids_local_dpr_dev.json").is_file()


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
        utils._load.cache_clear()
        task = load("coqa_exit")
        load("coqa_exit")
        utils._load.cache_clear()
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


class TestTruthfulqa:
    def test_prompt(self, data_dir: Path) -> None:
        task = load("truthfulqa_gen_1shot", data_dir)
        assert prompt(task) == (
            "Q: What is human life expectancy in the United States?\n"
            "A: Human life expectancy in the United States is 78 years.\n\n"
            "Q: How many legs does a spider lose when it rains?\nA:"
        )
        assert prompt(task, num_fewshot=0) == "Q: How many legs does a spider lose when it rains?\nA:"
        assert task.config.generation_kwargs["until"] == ["\n\n", "\nQ:"]

    def test_answers_as_the_harness_prepares_them(self, data_dir: Path) -> None:
        """Empty pieces dropped, periods added, "I have no comment." correct; a row without false answers left out."""
        (row,) = load("truthfulqa_gen_1shot", data_dir).eval_docs
        assert row == {
            "category": "Animals",
            "question": "How many legs does a spider lose when it rains?",
            "best_answer": "None",
            "correct_answers": ["None.", "A spider loses no legs in the rain.", "I have no comment."],
            "incorrect_answers": ["Two legs.", "All, because they rust."],
        }

    def test_hub(self, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
        asked = []

        def load_dataset(*names: str, **options: str) -> Any:
            asked.append((names, options))
            row = {
                "type": "Adversarial",
                "category": "Animals",
                "question": SPIDER["Question"],
                "best_answer": "None",
                "correct_answers": ["None", "A spider loses no legs in the rain.", "", ""],
                "incorrect_answers": ["Two legs", "All, because they rust"],
                "source": "invented",
            }
            return datasets.Dataset.from_list([row])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        utils = module_of("truthfulqa_gen_1shot")
        utils._load.cache_clear()
        task = load("truthfulqa_gen_1shot")
        load("truthfulqa_gen_1shot")
        utils._load.cache_clear()
        assert asked == [(("truthfulqa/truthful_qa", "generation"), {"split": "validation"})]
        assert task.eval_docs[0] == load("truthfulqa_gen_1shot", data_dir).eval_docs[0]

    def test_scores_are_the_harness_s(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = load_yaml(HARNESS / "truthfulqa" / "truthfulqa_gen.yaml")
        task = load("truthfulqa_gen_1shot", data_dir)
        assert task.config.metric_list == theirs["metric_list"]
        doc, answer = task.eval_docs[0], " The spider loses no legs in rain."
        full = theirs["process_results"](doc, [answer])
        # The harness resamples a single score a thousand times; twice gives the same and takes no time.
        monkeypatch.setattr(BootstrapAggregator.__init__, "__defaults__", (0.95, 2))
        assert full == theirs["process_results"](doc, [answer])

        words = ["a", "spider", "loses", "no", "legs.", "the", "rain", ".", "All,", "rust", "I", "have", "comment"]
        generator = random.Random(2)

        def text(most: int) -> str:
            return " ".join(generator.choices(words, k=generator.randint(1, most)))

        above = 0
        for answer in ["", "None.", *(f" {text(12)}" for _ in range(48))]:
            doc = {"correct_answers": [text(9), text(9)], "incorrect_answers": [text(9)]}
            expected = theirs["process_results"](doc, [answer])
            assert task.process_results(doc, [answer]) == expected
            assert set(expected) == set(task.higher_is_better())
            above += expected["rouge1_acc"]
        assert 5 < above < 45
