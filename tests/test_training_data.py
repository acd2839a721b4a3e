"""Texts and the micro-batches that are made of them."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model
from helpers_training import training_options

from dynamax_lm_eval.backbones import TransformerBackbone
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.frozen import text as data
from dynamax_lm_eval.frozen.options import HELD_OUT_SEED, TextSource
from dynamax_lm_eval.training.batches import MicroBatches, Position
from dynamax_lm_eval.training.generated import generated_documents


def letters(text: str) -> Any:
    """A tokenizer."""
    return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})


class TestData:
    @staticmethod
    def documents(epoch: int, first: int) -> Any:
        lengths = [5, 0, 23, 1, 8] if epoch % 2 == 0 else [8, 5, 23]
        return itertools.islice(([100 * i + t for t in range(n)] for i, n in enumerate(lengths)), first, None)

    def test_rows_hold_one_document_each_and_fill_the_batch(self) -> None:
        batches = MicroBatches(self.documents, 12, 10)
        found = [next(batches) for _ in range(6)]
        assert all(sum(map(len, rows)) == 12 for rows in found)
        rows = [row for batch in found for row in batch]
        assert all(len(row) <= 10 and len({token // 100 for token in row}) == 1 for row in rows)
        assert rows[:4] == [[0, 1, 2, 3, 4], list(range(200, 207)), list(range(207, 217)), [217, 218]]

    def test_any_position_can_be_continued(self) -> None:
        batches = MicroBatches(self.documents, 7, 6)
        positions, found = [batches.position], []
        for _ in range(25):
            found.append(next(batches))
            positions.append(batches.position)
        for start in range(25):
            resumed = MicroBatches(self.documents, 7, 6, Position(**positions[start].to_json()))
            assert [next(resumed) for _ in range(25 - start)] == found[start:]

    def test_held_out_text_is_never_trained_on(self) -> None:
        rows, document, count = data.held_out(self.documents, 20, 10)
        assert sum(map(len, rows)) >= 19
        assert document == [0, 1, 1]
        kept = data.without_first(self.documents, count)
        assert count == 3
        assert list(kept(0, 0)) == [[], [], [], *self.documents(0, 3)]
        assert list(kept(1, 0)) == [list(range(8)), list(range(100, 105)), []]
        same_text = data.without_first(lambda _, first: iter([[7], [8], [7]][first:]), 1)
        assert list(same_text(0, 0)) == [[], [8], []]
        assert list(same_text(1, 1)) == [[8], []]
        with pytest.raises(UserError, match="all documents would be held out"):
            data.without_first(self.documents, 5)

    def test_held_out_tokens_are_of_many_documents(self) -> None:
        def documents(epoch: int, first: int) -> Any:
            return itertools.islice(([100 * i + t for t in range(50 if i % 2 else 12)] for i in range(12)), first, None)

        found = data.held_out(documents, 100, 10, num_documents=5)
        assert (found.documents, found.read) == (7, 7), "of a document at most 20 tokens, and some have 12"
        taken = [
            sum(len(row) for row, number in zip(found.rows, found.document, strict=True) if number == i)
            for i in range(7)
        ]
        assert taken == [12, 20, 12, 20, 12, 20, 4]
        assert all(row[0] // 100 == number for row, number in zip(found.rows, found.document, strict=True))
        assert data.held_out(documents, 100, 10, num_documents=100).documents == 10, "a row of each"
        assert data.held_out(documents, 100, 10).documents == 4, "documents whole"
        with pytest.raises(
            UserError, match=r"only 120 tokens of text \(of each document at most 10, .* lower it or --eval_doc"
        ):
            data.held_out(documents, 200, 10, num_documents=100)

    def test_the_order_of_training_does_not_decide_what_is_held_out(self, tmp_path: Path) -> None:
        lines = [json.dumps({"text": chr(ord("a") + i) * (3 + i)}) + "\n" for i in range(20)]
        (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")

        def order(seed: int) -> Any:
            return data.text_documents(TextSource(str(tmp_path), seed=seed), letters)

        held = data.held_out(order(HELD_OUT_SEED), 40, 8, 4)
        left_out = list(itertools.islice(order(HELD_OUT_SEED)(0, 0), held.read))
        kept = data.without_first(order(5), held.read, drawn_from=order(HELD_OUT_SEED))
        for epoch in (0, 1):
            read = [tokens for tokens in kept(epoch, 0) if tokens]
            assert len(read) == 20 - held.read and not any(tokens in left_out for tokens in read)
        with pytest.raises(UserError, match="all documents would be held out"):
            data.without_first(order(5), 20, drawn_from=order(HELD_OUT_SEED))

    @pytest.mark.parametrize("buffer", [0, 3, 100])
    @pytest.mark.parametrize("files", [1, 3])
    def test_streams_continue_in_every_epoch(self, tmp_path: Path, buffer: int, files: int) -> None:
        for i in range(files):
            lines = [json.dumps({"text": chr(ord("a") + i) * n}) + "\n" for n in range(1, 8)]
            (tmp_path / f"{i}.jsonl").write_text("".join(lines))
        documents = data.text_documents(TextSource(str(tmp_path), shuffle_buffer=buffer), letters)
        whole = [list(documents(epoch, 0)) for epoch in range(3)]
        for epoch, expected in enumerate(whole):
            assert list(documents(epoch, 4)) == expected[4:]
            assert sorted(expected) == sorted(whole[0])
        assert (whole[0] == whole[1]) == (buffer == 0)

    @pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet", "txt"])
    def test_files_of_every_kind(self, tmp_path: Path, ending: str) -> None:
        import datasets

        table = datasets.Dataset.from_dict({"text": ["abc", "de"]})
        file = tmp_path / f"a.{ending}"
        if ending == "parquet":
            table.to_parquet(file)
        elif ending == "txt":
            file.write_text("abc")
            (tmp_path / "b.txt").write_text("de")
        else:
            table.to_json(file)
        source = file if ending != "txt" else tmp_path
        documents = data.text_documents(TextSource(str(source), shuffle_buffer=0), letters)
        assert list(documents(0, 0)) == [[97, 98, 99], [100, 101]]
        assert list(documents(0, 1)) == [[100, 101]]

    @pytest.mark.parametrize("dataset", ["./missing.jsonl", "/no/such/folder", "x*.txt"])
    def test_missing_files_are_errors(self, dataset: str) -> None:
        with pytest.raises(UserError, match="no file there with one of the endings"):
            data.text_documents(TextSource(dataset), None)

    def test_text_of_the_backbone_itself(self, model_folder: Path) -> None:
        engine = Engine(TransformerBackbone(tiny_model("llama"), max_length=256))
        tokenizer = type("T", (), {"bos_token_id": 1, "eos_token_id": 2})
        documents = generated_documents(engine, tokenizer, training_options(model_folder, Path("self"), seq_len=12))
        first = list(itertools.islice(documents(0, 0), 40))
        assert first[35:38] == list(itertools.islice(documents(0, 35), 3))
        assert first[33:40] == list(itertools.islice(documents(0, 33), 7))
        assert all(row[0] == 1 and len(row) <= 12 for row in first)
        assert len({tuple(row) for row in first}) > 35


def test_damaged_text_is_named(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": f"{random.random()}" * 50}) + "\n" for _ in range(500)).encode())
    for name, content in (
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("text.parquet", b"PAR1"),
        ("latin.txt", b"caf\xe9"),
    ):
        (tmp_path / name).write_bytes(content)
        source = TextSource(str(tmp_path / name), shuffle_buffer=0)
        with pytest.raises(UserError, match=name):
            list(data.text_documents(source, letters)(0, 0))
