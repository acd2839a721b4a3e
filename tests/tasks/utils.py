"""Small task data: sentences of the tests' own tokenizer."""

from __future__ import annotations

from typing import Any

import datasets

QUESTIONS = [
    ("what is the capital of France?", "Paris"),
    ("who wrote Hamlet?", "William Shakespeare"),
    ("what jumps over the lazy dog?", "The quick brown fox"),
    ("what saves nine?", "A stitch in time"),
    ("where does the time go?", "nobody knows"),
    ("on what river is Paris?", "the river Seine"),
    ("what else did he write?", "many other plays and more"),
]
CHOICES = [" Paris", " the river Seine", " nobody", " time"]


def load(**kwargs: Any) -> dict[str, datasets.Dataset]:
    rows = [
        {
            "question": question,
            "answer": answer,
            "choices": CHOICES,
            "gold": i % len(CHOICES),
            "text": f"{question} {answer}.",
        }
        for i, (question, answer) in enumerate(QUESTIONS)
    ]
    # Two documents ask the same thing: their records must not be mixed up or lost.
    return {"test": datasets.Dataset.from_list([*rows, rows[0]]), "shots": datasets.Dataset.from_list(rows[2:5])}
