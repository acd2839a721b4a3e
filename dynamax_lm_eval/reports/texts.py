"""The documents whose texts a page shows: which ones, what each point answered, and after how many blocks."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamax_lm_eval.sweep.results import Booleans, Floats, PointResult, TaskResults

#: Characters that are shown of a prompt's end, and of what was expected.
_SHOWN = 600
#: References that are shown where there are several.
_REFERENCES = 5
#: What of a prompt all documents share is told apart from this length on.
_SHARED = 20


def texts(task: TaskResults, metric: str, count: int) -> dict[str, Any]:
    """Returns the documents that are shown of a task, and each point's answers to them.

    Args:
        task: its results.
        metric: by which documents are chosen that got better or worse.
        count: documents.
    """
    chosen = shown_documents(task, metric, count)
    full = task.full
    prompts = [_prompt(full, i) for i in range(len(full.samples))] if chosen else []
    shared = _shared_beginning(prompts)
    return {
        "shared": shared[-3 * _SHOWN :],
        "documents": [
            {
                "id": full.samples[i]["doc_id"],
                "prompt": _end(prompts[i][len(shared) :]),
                "target": _target(full.samples[i]["target"]),
            }
            for i in chosen
        ],
        "answers": {point.name: _answers(task, point, chosen) for point in task.points},
    }


def shown_documents(task: TaskResults, metric: str, count: int) -> list[int]:
    """Returns which documents are shown, in order.

    For each point one that changed, as few as possible together; then in turn those that got worse, got better,
    changed, or stayed the same under most points.
    """
    full, points = task.full, task.points[1:]
    if not full.answers or full.answers[0] is None:
        return []
    n = len(full.answers)
    changed = np.array([[a != b for a, b in zip(full.answers, p.answers, strict=True)] for p in points]).reshape(-1, n)
    gains = [gain for point in points if (gain := gains_of(task, point, metric)) is not None]
    gained = np.array(gains).reshape(-1, n)
    chosen: list[int] = []
    uncovered = changed[changed.any(axis=1)]
    while len(uncovered) and len(chosen) < count:
        chosen.append(int(uncovered.sum(axis=0).argmax()))
        uncovered = uncovered[~uncovered[:, chosen[-1]]]
    counts = [(gained < 0).sum(axis=0), (gained > 0).sum(axis=0), changed.sum(axis=0), (~changed).sum(axis=0)]
    rankings = [iter(np.argsort(-of_kind, kind="stable").tolist()) for of_kind in counts]
    while len(chosen) < min(count, n):
        for ranking in rankings:
            if (found := next((i for i in ranking if i not in chosen), None)) is not None and len(chosen) < count:
                chosen.append(found)
    return sorted(chosen)


def gains_of(task: TaskResults, point: PointResult, metric: str) -> Floats | None:
    """Returns by how much each document (n,) got better; None where the metric is no mean over documents."""
    own, whole = point.per_document(metric), task.full.per_document(metric)
    if own is None or whole is None:
        return None
    gain = own - whole if task.higher_is_better(metric) else whole - own
    return np.where(np.abs(gain) < 1e-9, 0.0, gain)


def changes(task: TaskResults, point: PointResult, metric: str) -> dict[str, int] | None:
    """Returns how many of all documents got better, got worse and kept their score; None as :func:`gains_of`."""
    gain = gains_of(task, point, metric)
    if gain is None:
        return None
    kinds: dict[str, Booleans] = {"worse": gain < 0, "better": gain > 0, "same": gain == 0}
    return {name: int(of_kind.sum()) for name, of_kind in kinds.items()}


def strip(point: PointResult, document: int) -> list[tuple[str, int]] | None:
    """Returns each generated token of a document with the number of blocks that gave it; None where none was generated.

    The first one comes from the prompt's last token: at full depth, unless prompts may exit.
    """
    pieces = point.pieces[document]
    if pieces is None:
        return None
    depth = int(point.policy["num_layers"])
    layers = [layer for response in point.samples[document]["exit_layers"][:1] for layer in response]
    by_token = ([depth, *layers] if point.policy["exit_scope"] == "generated" else layers)[-len(pieces) :]
    by_token = [depth] * (len(pieces) - len(by_token)) + by_token
    return list(zip(pieces, by_token, strict=True))


def confidences(point: PointResult, document: int) -> list[list[float | None]] | None:
    """Returns of each generated token of a document the confidence at each exit that it came to; None without any.

    Exits are those of :func:`exits`; None stands at one that was not asked.
    """
    pieces, found = point.pieces[document], point.samples[document].get("exit_confidences", [])[:1]
    if pieces is None or not any(found):
        return None
    by_token: list[list[float | None]] = found[0][-len(pieces) :]
    return [[]] * (len(pieces) - len(by_token)) + by_token


def exits(point: PointResult) -> list[int]:
    """Returns the exit layers of a point at which something is decided."""
    pairs = zip(point.policy.get("exit_layers", []), point.policy.get("thresholds", []), strict=True)
    return [layer for layer, threshold in pairs if threshold < 1]


def _answers(task: TaskResults, point: PointResult, documents: Sequence[int]) -> list[dict[str, Any]]:
    """Returns what a point answered: texts or tokens, and the gain of each metric over the full model."""
    gains = {metric: gains_of(task, point, metric) for metric in task.metrics}
    answers = []
    for i in documents:
        answer: dict[str, Any] = {
            "same": point.answers[i] == task.full.answers[i],
            "gains": {metric: round(float(gain[i]), 6) for metric, gain in gains.items() if gain is not None},
        }
        if (tokens := strip(point, i)) is None:
            answer["text"] = _text(point, i)
        else:
            answer |= {"tokens": [text for text, _ in tokens], "layers": [depth for _, depth in tokens]}
            if (found := confidences(point, i)) is not None:
                answer["confidences"] = found
        answers.append(answer)
    return answers


def _text(point: PointResult, document: int) -> str:
    """Returns an answer as a text: of a choice the continuation that was chosen."""
    answer = point.answers[document]
    if isinstance(answer, str):
        return answer
    arguments = point.samples[document]["arguments"].get(f"gen_args_{answer}", {})
    return str(arguments.get("arg_1", answer)).strip()


def _prompt(point: PointResult, document: int) -> str:
    return str(point.samples[document]["arguments"]["gen_args_0"]["arg_0"])


def _shared_beginning(prompts: Sequence[str]) -> str:
    """Returns the lines with which all prompts begin: few-shot examples, instructions."""
    if len(prompts) < 2:
        return ""
    # What the first and the last in order share, all do.
    first, last = min(prompts), max(prompts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = first[: first.rfind("\n", 0, length) + 1]
    return shared if len(shared) >= _SHARED else ""


def _end(text: str) -> str:
    return ("… " if len(text) > _SHOWN else "") + text[-_SHOWN:]


def _target(target: Any) -> str:
    """Returns what was expected; of a list of references the first ones."""
    text = str(target)
    if text.startswith("["):
        try:
            references = [str(part) for part in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return text[:_SHOWN]
        more = f" (and {len(references) - _REFERENCES} more)" if len(references) > _REFERENCES else ""
        text = " | ".join(references[:_REFERENCES]) + more
    return text[:_SHOWN]
