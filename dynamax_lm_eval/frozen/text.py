"""Text as documents of token ids that can be continued from any point, and rows of held-out text.

Documents come from the Hub or from files. Their order follows from the seed and the epoch alone; each row is cut from
one document. What is held out is drawn in an order of its own, the same for all seeds of a training.
"""

from __future__ import annotations

import glob
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.frozen.options import DEFAULT_DATASET, DEFAULT_DATASET_CONFIG, TextSource

#: How the files of each ending are read by ``datasets``.
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

#: A function that gives the documents of an epoch as token ids, from the n-th on.
Documents = Callable[[int, int], Iterator[list[int]]]


def text_documents(source: TextSource, tokenizer: Any) -> Documents:
    """Returns the tokenised documents of a Hub data set or of local files.

    Raises:
        UserError: there is no such file or data set, it has no text column, or the tokenizer has no chat template that
            is asked for.
    """
    encode = _encoder(source, tokenizer)
    rows = _open(source)
    dataset, column = source.dataset, source.column
    if source.documents is not None:
        rows = rows.take(source.documents)

    def read(epoch: int, first: int) -> Iterator[list[int]]:
        stream = rows
        if source.shuffle_buffer:
            # Another seed for each epoch, not set_epoch: skip() forgets that.
            stream = stream.shuffle(seed=source.seed + epoch, buffer_size=source.shuffle_buffer)
        for row in _naming(stream.skip(first) if first else stream, dataset):
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise UserError(f"column {column!r} of {dataset!r} holds {type(text).__name__}, not text")
            if column not in row:
                raise UserError(
                    f"{dataset!r} has no column {column!r}; it has {', '.join(row)}: name one by --text_column"
                )
            yield encode(text) if text else []

    return read


def check_files(source: TextSource | None) -> None:
    """Raises UserError where a source names local files that are not there; what is on the Hub is not asked for."""
    if source is not None:
        _local_files(source.dataset)


def _encoder(source: TextSource, tokenizer: Any) -> Callable[[str], list[int]]:
    """Returns what makes token ids of a text."""
    if source.template == "none":
        return lambda text: list(tokenizer(text).input_ids)
    check_template(source.template, tokenizer)

    def encode(text: str) -> list[int]:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        return list(tokenizer(turn, add_special_tokens=False).input_ids)

    return encode


def check_template(template: str, tokenizer: Any) -> None:
    """Raises UserError where texts are to be put into a chat template and the tokenizer has none."""
    if template != "none" and getattr(tokenizer, "chat_template", None) is None:
        raise UserError(f"--template {template} needs a tokenizer with a chat template, and this one has none")


def _naming(rows: Iterable[Any], dataset: str) -> Iterator[Any]:
    """Yields the rows; an error of reading them becomes one line that names the data set."""
    from datasets.exceptions import DatasetsError

    stream = iter(rows)
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except (OSError, ValueError, EOFError, zlib.error, DatasetsError) as error:
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise UserError(
                f"--dataset {dataset!r} cannot be read to its end: {reason}; have the file again"
            ) from error
        yield row


class HeldOut(NamedTuple):
    """Rows of text that nothing is trained on.

    Attributes:
        rows: token ids.
        document: of each row, which document it is cut from; numbered as they come, from 0.
        read: how many documents of the stream were read for them, empty ones included.
    """

    rows: list[list[int]]
    document: list[int]
    read: int

    @property
    def documents(self) -> int:
        """How many documents the rows are cut from."""
        return len(set(self.document))


def held_out(
    documents: Documents,
    num_tokens: int,
    seq_len: int,
    num_documents: int = 1,
    options: tuple[str, str] = ("--eval_tokens", "--eval_documents"),
) -> HeldOut:
    """Returns rows of ``num_tokens`` tokens (or one less) of the first documents.

    Args:
        documents: what is read, in the order of the first epoch.
        num_tokens: tokens of all rows together.
        seq_len: tokens of the longest row.
        num_documents: of each document at most its share of the tokens is taken, but always a whole row; 1: documents
            whole.
        options: the user's names for ``num_tokens`` and ``num_documents``.

    Raises:
        UserError: there is less text than that.
    """
    most = max(seq_len, -(-num_tokens // num_documents))
    rows: list[list[int]] = []
    document: list[int] = []
    total = 0
    for read, tokens in enumerate(documents(0, 0), 1):
        own = tokens[:most]
        number = document[-1] + 1 if document else 0
        for start in range(0, len(own), seq_len):
            row = own[start : start + min(seq_len, num_tokens - total)]
            if len(row) > 1:
                rows.append(row)
                document.append(number)
                total += len(row)
            if total >= num_tokens - 1:
                return HeldOut(rows, document, read)
    of_each = f" (of each document at most {most}, by {options[1]}={num_documents})" if num_documents > 1 else ""
    lower = f"lower it or {options[1]}" if num_documents > 1 else "lower it"
    raise UserError(
        f"there are only {total} tokens of text{of_each}, and {options[0]}={num_tokens} are wanted; {lower}, or give "
        "more text"
    )


def without_first(
    documents: Documents,
    count: int,
    remedy: str = "give held-out text by --eval_dataset, lower --eval_tokens, or split the text into more documents",
    purpose: str = "the evaluation",
    drawn_from: Documents | None = None,
) -> Documents:
    """Returns the documents without the first ``count`` of the first epoch's order and without copies of these.

    Other epochs have another order, so the documents are recognised by their tokens. They count as empty, so that
    places in the data keep their numbers.

    Args:
        documents: what is read.
        count: how many are left out.
        remedy: ends the message of the error.
        purpose: what they are held out for, in that message.
        drawn_from: the documents in the order in which the first are left out; default: ``documents``.

    Raises:
        UserError: nothing would be left for training.
    """
    left_out = {tuple(tokens) for tokens in itertools.islice((drawn_from or documents)(0, 0), count)}
    if all(not tokens or tuple(tokens) in left_out for tokens in documents(0, 0)):
        raise UserError(f"all documents would be held out for {purpose}; {remedy}")

    def read(epoch: int, first: int) -> Iterator[list[int]]:
        return ([] if tuple(tokens) in left_out else tokens for tokens in documents(epoch, first))

    return read


def _open(source: TextSource) -> Any:
    """Returns the data set as a stream of its rows; raises UserError where there is none."""
    import datasets
    from datasets.exceptions import DatasetsError

    dataset, name = source.dataset, source.config
    files = _local_files(dataset)
    if files and (name is not None or source.split != "train"):
        raise UserError(f"{dataset!r} is a local file, which has no configuration and no splits; remove those options")
    try:
        if files:
            kind = _READERS[_ending(files[0])]
            extra = {"sample_by": "document"} if kind == "text" else {}
            return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **extra)
        if name is None and dataset == DEFAULT_DATASET:
            name = DEFAULT_DATASET_CONFIG
        return datasets.load_dataset(dataset, name, split=source.split, streaming=True)
    except (OSError, ValueError, EOFError, zlib.error, DatasetsError) as error:
        raise UserError(f"--dataset {dataset!r} could not be opened: {' '.join(str(error).split())}") from error


def _local_files(dataset: str) -> list[str]:
    """Returns the text files that a path, a folder or a pattern means; none where it is a Hub id.

    Raises:
        UserError: a path does not exist, or the files are of several kinds.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _ending(str(file)) in _READERS)
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207 - absolute patterns
    if not files:
        looks_local = dataset.startswith((".", "/", "~")) or _ending(dataset) in _READERS or "*" in dataset
        if looks_local or path.is_dir():
            raise UserError(
                f"--dataset {dataset!r}: no file there with one of the endings {', '.join(_READERS)} (or .gz)"
            )
        return []
    kinds = {_ending(str(file)) for file in files}
    if len(kinds) > 1 or not kinds <= set(_READERS):
        raise UserError(f"--dataset {dataset!r}: the files must all end in one of {', '.join(_READERS)}, got {kinds}")
    return [str(file) for file in files]


def _ending(name: str) -> str:
    """Returns the ending of a file's name in lower case, without that of its compression."""
    path = Path(name.removesuffix(".gz"))
    return path.suffix.lower()
