"""Text for training, as micro-batches of token rows that can be continued from any point.

Documents come from the Hub, from files, or from the backbone itself; they are cut into rows and laid side by
side without padding, so no row holds text of two documents. The order follows from the seed alone.
"""

from __future__ import annotations

import glob
import itertools
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.training.options import DEFAULT_DATASET, DEFAULT_DATASET_CONFIG, TrainingOptions

logger = logging.getLogger(__name__)

#: How the files of each ending are read by ``datasets``.
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

#: Gives the documents of an epoch as token ids, from the n-th on.
Documents = Callable[[int, int], Iterator[list[int]]]


def text_documents(options: TrainingOptions, dataset: str, tokenizer: Any, held_out: bool = False) -> Documents:
    """The tokenised documents of a Hub data set or of local files; ``held_out``: with the options for held-out text.

    Raises:
        UserError: there is no such file or data set, or it has no text column.
    """
    source = _open(options, dataset, held_out)
    column = options.text_column

    def read(epoch: int, first: int) -> Iterator[list[int]]:
        stream = source
        if options.shuffle_buffer:
            # Another seed for each epoch, not set_epoch: skip() forgets that.
            stream = stream.shuffle(seed=options.seed + epoch, buffer_size=options.shuffle_buffer)
        for row in _naming(stream.skip(first) if first else stream, dataset):
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise UserError(f"column {column!r} of {dataset!r} holds {type(text).__name__}, not text")
            if column not in row:
                raise UserError(
                    f"{dataset!r} has no column {column!r}; it has {', '.join(row)}: name one by --text_column"
                )
            yield list(tokenizer(text).input_ids) if text else []

    return read


def _naming(rows: Iterable[Any], dataset: str) -> Iterator[Any]:
    """The rows; an error of reading them becomes one line that names the data set."""
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


def held_out(
    documents: Documents, num_tokens: int, seq_len: int, option: str = "--eval_tokens"
) -> tuple[list[list[int]], int]:
    """Rows of ``num_tokens`` tokens (or one less) of the first documents, and how many documents these are.

    ``option``: the user's name for ``num_tokens``.

    Raises:
        UserError: there is less text than that.
    """
    rows: list[list[int]] = []
    total = 0
    stream = documents(0, 0)
    for count, tokens in enumerate(stream, 1):
        for start in range(0, len(tokens), seq_len):
            row = tokens[start : start + min(seq_len, num_tokens - total)]
            if len(row) > 1:
                rows.append(row)
                total += len(row)
            if total >= num_tokens - 1:
                return rows, count
    raise UserError(
        f"there are only {total} tokens of text, and {option}={num_tokens} are wanted; lower it, or give more text"
    )


def without_first(documents: Documents, count: int) -> Documents:
    """The documents less the first ``count`` of the first epoch's order, in every epoch; copies of them too.

    Later epochs have another order, so those documents are known by their tokens. They count as empty, so that
    places in the data keep their numbers.

    Raises:
        UserError: nothing would be left.
    """
    known = {tuple(tokens) for tokens in itertools.islice(documents(0, 0), count)}
    if next(documents(0, count), None) is None:
        raise UserError(
            "all documents would be held out for the evaluation; give held-out text by --eval_dataset, lower "
            "--eval_tokens, or split the text into more documents"
        )

    def read(epoch: int, first: int) -> Iterator[list[int]]:
        return ([] if tuple(tokens) in known else tokens for tokens in documents(epoch, first))

    return read


def _open(options: TrainingOptions, dataset: str, held_out: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    files = _local_files(dataset)
    name = options.eval_config if held_out else options.dataset_config
    split = options.eval_split if held_out else options.dataset_split
    if files and (name is not None or split != "train"):
        raise UserError(f"{dataset!r} is a local file, which has no configuration and no splits; remove those options")
    try:
        if files:
            kind = _READERS[_ending(files[0])]
            extra = {"sample_by": "document"} if kind == "text" else {}
            return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **extra)
        if name is None and dataset == DEFAULT_DATASET:
            name = DEFAULT_DATASET_CONFIG
        return datasets.load_dataset(dataset, name, split=split, streaming=True)
    except (OSError, ValueError, EOFError, zlib.error, DatasetsError) as error:
        raise UserError(f"--dataset {dataset!r} could not be opened: {' '.join(str(error).split())}") from error


def _local_files(dataset: str) -> list[str]:
    """The text files that a path, a folder or a pattern means; none where it is a Hub id.

    Raises:
        UserError: a path that does not exist, or files of several kinds.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _ending(str(file)) in _READERS)
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207 - absolute patterns
    if not found:
        looks_local = dataset.startswith((".", "/", "~")) or _ending(dataset) in _READERS or "*" in dataset
        if looks_local or path.is_dir():
            raise UserError(
                f"--dataset {dataset!r}: no file there with one of the endings {', '.join(_READERS)} (or .gz)"
            )
        return []
    kinds = {_ending(str(file)) for file in found}
    if len(kinds) > 1 or not kinds <= set(_READERS):
        raise UserError(f"--dataset {dataset!r}: the files must all end in one of {', '.join(_READERS)}, got {kinds}")
    return [str(file) for file in found]


def _ending(name: str) -> str:
    path = Path(name.removesuffix(".gz"))
    return path.suffix.lower()
