"""The tokens that are measured: those of a text, or those of answers and continuations of the harness's tasks.

Knows texts, tasks and token ids; knows no exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.frozen.text import HeldOut, held_out, text_documents, without_first
from dynamax_lm_eval.harness.documents import Document, documents_of, naming_document, naming_tasks, of_document
from dynamax_lm_eval.harness.encoding import fit
from dynamax_lm_eval.harness.requests import PreparedArguments, PreparedGeneration, RequestSettings
from dynamax_lm_eval.headroom.options import HeadroomOptions
from dynamax_lm_eval.progress import Bar


@dataclass(frozen=True)
class Row:
    """Token ids that a run would feed, of which those from position ``prompt_length`` on may leave early."""

    ids: list[int]
    prompt_length: int
    #: What it is cut from; the task is empty where it is a text.
    document: Document = ("", 0)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_eligible(self) -> int:
        """How many tokens may leave."""
        return len(self.ids) - self.prompt_length


def positions(rows: Sequence[Row]) -> IntArray:
    """Returns the positions (T,) of the tokens that may leave, row by row."""
    return np.concatenate([np.arange(row.prompt_length, len(row.ids)) for row in rows])


def rows_of(lm: Any, manager: Any, options: HeadroomOptions) -> tuple[list[Row], list[Row]]:
    """Returns the rows to measure, and those to fit adapters on (none without ``--fit_adapters``).

    Every row has a token that may leave, and no document has rows in both.

    Args:
        lm: the model, for its tokenizer, limits and engine.
        manager: of the harness's tasks; None where there are none.
        options: of the command.

    Raises:
        UserError: text or tasks cannot be read or followed, or no token may leave.
    """
    if options.seq_len > lm.max_length:
        raise UserError(f"--seq_len={options.seq_len} is more than the model's longest row, {lm.max_length}; lower it")
    if options.tasks is None:
        return _rows_of_text(lm, options)
    rows = [(document, row) for document, row in _rows_of_tasks(lm, manager, options) if row.num_eligible > 0]
    documents = list(dict.fromkeys(document for document, _ in rows))
    if not rows:
        raise UserError(
            f"--tasks {options.tasks}: no token may leave early: the first token of an answer is made at full depth, "
            "and no answer is longer; measure text (--dataset), or a task with longer answers"
        )
    fitting: set[Document] = set()
    if options.fit_adapters:
        if len(documents) < 2:
            raise UserError("--fit_adapters needs documents to fit on beside those that are measured; raise --limit")
        order = np.random.default_rng(options.seed).permutation(len(documents))
        fitting = {documents[i] for i in order[: len(documents) // 2].tolist()}
    own = [replace(row, document=document) for document, row in rows]
    return [row for row in own if row.document not in fitting], [row for row in own if row.document in fitting]


def _rows_of_text(lm: Any, options: HeadroomOptions) -> tuple[list[Row], list[Row]]:
    documents = text_documents(options.source, lm.tokenizer)
    measured = held_out(documents, options.tokens, options.seq_len, options.documents, ("--tokens", "--documents"))
    fitting = HeldOut([], [], 0)
    if options.fit_adapters:
        remedy = "give more text for --fit_adapters, lower --tokens, or split the text into more documents"
        others = without_first(documents, measured.read, remedy)
        fitting = held_out(
            lambda epoch, _: others(epoch, measured.read),
            options.fit_tokens,
            options.seq_len,
            options.documents,
            ("--fit_tokens", "--documents"),
        )
    for ids in (*measured.rows, *fitting.rows):
        lm.engine.backbone.check_ids(ids)
    return _rows(measured), _rows(fitting)


def _rows(text: HeldOut) -> list[Row]:
    return [Row(ids, 1, ("", document)) for ids, document in zip(text.rows, text.document, strict=True)]


def _rows_of_tasks(lm: Any, manager: Any, options: HeadroomOptions) -> Iterator[tuple[Document, Row]]:
    files = options.task_files
    assert files is not None
    with naming_tasks():
        tasks = manager.load(files.task_names)["tasks"]
        requests = [request for task in tasks.values() for request in _requests(task, lm, options)]
    by_type: dict[str, list[Any]] = {}
    for request in requests:
        by_type.setdefault(str(request.request_type), []).append(request)
    for kind, some in by_type.items():
        documents = documents_of(some)
        if kind == "generate_until":
            yield from zip(documents, _answers(lm, some, options.batch_size), strict=True)
        elif kind == "loglikelihood":
            for document, pair in zip(documents, lm.responder.encode(some), strict=True):
                with of_document(document):
                    yield document, Row(*fit(lm, *pair))
        else:  # whole texts
            for document, request in zip(documents, some, strict=True):
                ids = lm.tok_encode(request.args[0])
                with of_document(document):
                    lm.engine.backbone.check_ids(ids)
                for start in range(0, len(ids), options.seq_len):
                    yield document, Row(ids[start : start + options.seq_len], 1)


def _requests(task: Any, lm: Any, options: HeadroomOptions) -> list[Any]:
    """Returns what the harness would ask of the documents of a task, or of ``--limit`` of them."""
    if options.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    task.set_fewshot_seed(seed=options.seed)
    count = len(task.eval_docs)
    samples = None
    if options.limit is not None and options.limit < count:
        drawn = np.random.default_rng(options.seed).choice(count, options.limit, replace=False)
        samples = sorted(drawn.tolist())
    chat = options.apply_chat_template
    task.build_all_requests(
        samples=samples,
        apply_chat_template=chat,
        chat_template=lm.apply_chat_template if chat else None,
        tokenizer_name=lm.tokenizer_name if chat else "",
    )
    requests: list[Any] = task.instances
    return requests


def _answers(lm: Any, requests: Sequence[Any], batch_size: int) -> Iterator[Row]:
    """Yields prompts with the full model's own answers, greedy whatever the task samples, in order of the requests."""
    end = lm.eot_token_id
    eos = None if end is None else lm.tok_decode(end, skip_special_tokens=False)
    settings = RequestSettings(ExitPolicy(lm.engine.backbone.num_layers), None)
    arguments = PreparedArguments(lm)
    jobs: list[GenerationRequest] = []
    documents = documents_of(requests)
    for document, request in zip(documents, requests, strict=True):
        with of_document(document):
            prepared = PreparedGeneration(lm, settings, request, eos, arguments)
        jobs.append(replace(prepared.request, sampler=Sampler()))
    answers: dict[int, list[int]] = {}
    with naming_document(documents), Bar(len(jobs), "answers of the full model") as bar:
        for index, generation in generate(lm.engine, jobs, batch_size):
            answers[index] = generation.tokens
            bar.update()
    for index, job in enumerate(jobs):
        # The last token of an answer is never fed.
        yield Row([*job.prompt, *answers[index][:-1]], len(job.prompt))
