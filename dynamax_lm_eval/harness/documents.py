"""Tasks and documents of requests: what an answer is for, and what an error has to name.

Knows the harness's instances and the errors of the engine; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dynamax_lm_eval.errors import FaultError, NotFiniteError, RequestError, UserError

#: Task and number of a document; the task is empty where a request says nothing of it.
Document = tuple[str, Any]


def document_of(request: Any, place: int = 0) -> Document:
    """Returns the document of a request; one that was made by hand, and says nothing of it, is its own document."""
    task, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
    return "" if task is None else str(task), f"request {place}" if document is None else document


def documents_of(requests: Sequence[Any]) -> list[Document]:
    """Returns the document of each request."""
    return [document_of(request, place) for place, request in enumerate(requests)]


@contextmanager
def of_document(document: Document) -> Iterator[None]:
    """Puts task and document before errors of what one request asks for."""
    try:
        yield
    except UserError as error:
        if not document[0]:
            raise
        raise UserError(f"{_named(document)}: {error}") from error


@contextmanager
def naming_tasks(option: str = "--tasks") -> Iterator[None]:
    """Turns what goes wrong while the harness reads tasks and their data into one line that begins with an option."""
    try:
        yield
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, UserError) or getattr(error, "raised_while_evaluating", False):
            raise
        is_fault = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (FaultError if is_fault else UserError)(f"{option}: {' '.join(str(error).split())}") from error


@contextmanager
def naming_document(documents: Sequence[Document], owner: Sequence[int] | None = None) -> Iterator[None]:
    """Turns an error of one computation into one that names its document.

    ``owner``: gives for each computation the place of its document; None: they have the same places.
    """
    try:
        yield
    except RequestError as error:
        where = f"for {_named(documents[error.index if owner is None else owner[error.index]])}"
        if isinstance(error, NotFiniteError):
            raise UserError(
                f"the model computed {error.what} that are not finite {where}; try dtype=float32, or check the weights"
            ) from error
        raise UserError(f"the generation arguments cannot be followed {where}: {error}; check their values") from error


def _named(document: Document) -> str:
    """Returns a document in words."""
    task, doc_id = document
    return f"document {doc_id} of task {task!r}" if task else str(doc_id)
