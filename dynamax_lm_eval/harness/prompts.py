"""Prompts for training: what tasks of the harness ask, of documents that no evaluation of theirs uses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.harness.documents import naming_tasks
from dynamax_lm_eval.harness.evaluate import document_hash
from dynamax_lm_eval.harness.pairs import json_or_pairs
from dynamax_lm_eval.harness.tasks import not_found, task_manager
from dynamax_lm_eval.training.answers import Prompt
from dynamax_lm_eval.training.command import train as train_on
from dynamax_lm_eval.training.options import RunOptions, TrainingOptions

#: The longest answer to a task that says nothing of its length.
_LONGEST = 64


def train(options: TrainingOptions, run: RunOptions) -> ExitCheckpoint | None:
    """Trains exits, on what the backbone answers to tasks where ``--prompts`` names some; see ``training.command``.

    Raises:
        UserError: a task cannot be had, or has no documents to train on.
    """
    return train_on(options, run, prompts_of(options))


def prompts_of(options: TrainingOptions) -> list[Prompt]:
    """Returns the prompts of the tasks that ``--prompts`` names, without copies; none where it names none.

    Raises:
        UserError: a task cannot be had, or has no documents to train on.
    """
    if options.prompts is None:
        return []
    names = [name.strip() for name in options.prompts.split(",") if name.strip()]
    own = options.prompts_include_path
    with naming_tasks("--prompts"):
        metadata = json_or_pairs("--prompts_metadata", options.prompts_metadata)
        manager = task_manager(own, json.dumps(metadata, sort_keys=True))
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            raise UserError(f"--prompts: {not_found(unknown, manager.all_tasks, [own] if own else [])}")
        tasks = manager.load(names)["tasks"]
        prompts = [prompt for name, task in tasks.items() for prompt in _prompts(name, task, options)]
    return list(dict.fromkeys(prompts))


def _prompts(name: str, task: Any, options: TrainingOptions) -> Iterator[Prompt]:
    task.set_fewshot_seed(seed=options.seed)
    documents = _documents(name, task, options.prompts_documents)
    by_field = "doc_id" in inspect.signature(task.construct_requests).parameters  # in 0.5.0.dev1
    place: dict[str, Any] = {"doc_id": 0} if by_field else {"metadata": (name, 0, 1)}
    for document in documents:
        context = task.fewshot_context(document, int(task.get_config("num_fewshot") or 0))
        requests = task.construct_requests(doc=document, ctx=context, apply_chat_template=False, **place)
        request = requests[0] if isinstance(requests, list) else requests
        settings = request.args[1] if request.request_type == "generate_until" else {}
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        longest = int(settings.get("max_gen_toks") or _LONGEST)
        # A choice between continuations is answered in words, up to the end of the line.
        until = until if request.request_type == "generate_until" else ["\n"]
        yield Prompt(str(request.args[0]), tuple(until), longest, document_hash(document))


def _documents(name: str, task: Any, part: str | None) -> list[Any]:
    """Returns the documents of a task to train on."""
    if part is not None:
        first, _, last = part.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise UserError(f"--prompts_documents must be first:last, like 400:800, got {part!r}")
        chosen = list(task.eval_docs)[int(first) : int(last)]
        if not chosen:
            raise UserError(f"--prompts_documents {part}: task {name} has only {len(task.eval_docs)} documents")
        return chosen
    if not task.has_training_docs():
        raise UserError(
            f"--prompts: task {name} has no training documents; give --prompts_documents first:last of those that it "
            "is evaluated on, and evaluate the others"
        )
    evaluated = {document_hash(document) for document in task.eval_docs}
    documents = [document for document in task.training_docs() if document_hash(document) not in evaluated]
    if not documents:
        raise UserError(f"--prompts: all training documents of task {name} are among those that it is evaluated on")
    return documents
