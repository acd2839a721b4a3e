"""The task explain_demo: its questions, its prompt and its score."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers_tasks import load, module_of, prompt

from dynamax_lm_eval import tasks_dir

NAME = "explain_demo"


def test_the_readme_shows_the_prompt_and_counts_the_questions() -> None:
    readme = (tasks_dir() / NAME / "README.md").read_text(encoding="utf-8")
    task = load(NAME)
    assert f"```\n{prompt(task)}\n```" in readme
    assert f"\n{len(task.eval_docs)} open questions" in readme
    topics = sorted(Counter(document["topic"] for document in task.eval_docs))
    assert f"`topic` ({', '.join(topics)})" in " ".join(readme.split())


def test_every_explanation_mentions_its_own_key_terms() -> None:
    score = module_of(NAME).key_terms
    for document in load(NAME).eval_docs:
        assert score(document, [document["answer"]]) == {"key_terms": 1.0}, document["question"]
        assert score(document, [""]) == {"key_terms": 0.0}
        assert all(word == word.lower() for term in document["key_terms"] for word in term)


@pytest.mark.parametrize(
    ("answer", "share"), [("YEAST makes gas", 1.0), ("gas, carbon dioxide", 0.5), ("the oven is warm", 0.0)]
)
def test_a_term_counts_once_by_any_spelling(answer: str, share: float) -> None:
    document = {"key_terms": [["yeast"], ["carbon dioxide", "gas"]]}
    assert module_of(NAME).key_terms(document, [answer]) == {"key_terms": share}
