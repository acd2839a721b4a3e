"""The command ``train``: what lies in its folder already, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import LAYERS
from helpers_training import train, training_options

from dynamax_lm_eval import cli
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.locks import locked
from dynamax_lm_eval.training import command, state
from dynamax_lm_eval.training.options import RunOptions


class TestOutput:
    """What lies in the folder of a training is looked at before anything else is done."""

    @pytest.fixture
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("README.md", "MY OWN README"),
            ("training.jsonl", '{"text": "a"}\n'),
            ("training.jsonl", '{"step": 1, "loss": 2.5}\n'),
            ("training.jsonl", "[1]"),
            ("config.json", '{"model_type": "llama"}'),
            ("main.py", "pass"),
            ("evaluation.json", "{}"),
        ],
    )
    def test_other_files_are_not_written_over(
        self, model_folder: Path, texts: Path, tmp_path: Path, name: str, content: str, overwrite: bool
    ) -> None:
        (tmp_path / name).write_text(content)
        run = RunOptions(output=str(tmp_path), overwrite=overwrite, device="cpu")
        with pytest.raises(UserError, match=f"--output .*holds other files .*{name}"):
            command.train(training_options(model_folder, texts), run)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == content

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("name", ["training.jsonl", "state/state-machine/notes.txt"])
    def test_what_looks_like_a_beginning_does_not_open_a_folder(
        self, model_folder: Path, texts: Path, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "README.md").write_text("MY OWN README")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=r"holds other files \(README.md, [^.]+"):
            command.train(training_options(model_folder, texts), RunOptions(output=str(tmp_path), device="cpu"))
        assert (tmp_path / name).exists()

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("damaged", ["", "[1]", None])
    def test_a_damaged_state_can_be_overwritten_only(
        self,
        model_folder: Path,
        texts: Path,
        tmp_path: Path,
        damaged: str | None,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        home = tmp_path / "state" / "state-00000002"
        home.mkdir(parents=True)
        if damaged is not None:
            (home / state.PROGRESS_NAME).write_text(damaged)
        line = ["train", "--backbone", str(model_folder), "--dataset", str(texts), "--output", str(tmp_path)]
        line += ["--exit_layers", "2+3+4", "--device", "cpu"]
        assert cli.main([*line, "--resume"]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(home) in error
        assert "--overwrite" in error
        assert cli.main(line) == 2
        monkeypatch.undo()
        saved = command.train(
            training_options(model_folder, texts, classifier="calm", max_tokens=128),
            RunOptions(output=str(tmp_path), overwrite=True, device="cpu"),
        )
        assert saved is not None
        assert not (tmp_path / "state").exists()

    @pytest.mark.usefixtures("no_work")
    def test_one_training_at_a_time(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        with locked(tmp_path), pytest.raises(UserError, match="in use by process"):
            train(model_folder, texts, tmp_path)
        with pytest.raises(UserError, match="cannot be written"):
            train(model_folder, texts, texts)

    def test_a_begun_log_is_its_own(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        """A training that was killed before its first state, in the middle of a line."""
        (tmp_path / "training.jsonl").write_text('{"step": 1, "tok')
        train(model_folder, texts, tmp_path, classifier="calm", max_tokens=128)
        assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 1
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_text_that_is_not_there_is_found_before_weights_load(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamax_lm_eval.training.command.load_backbone", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="no file there"):
        train(model_folder, tmp_path / "missing.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classifier", "calm,cnn"], "must name some of calm, ffn, mamba, hybrid, got 'cnn'"),
        (["--top_k", "0"], "--top_k must be at least 1, got 0"),
        (["--label_share", "1.5"], "--label_share must be at most 1"),
        (["--batch_tokens", "1000", "--micro_batch_tokens", "600"], "must be a multiple of"),
        (["--exit_layers", "2+9"], "exit_layers must lie in 1..5"),
        (["--dataset", "./missing.jsonl"], "no file there"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--max_token", "5"], "unknown option '--max_token'; did you mean --max_tokens?"),
        (["--seq_len", "9000"], "must be at most --micro_batch_tokens=1024"),
        (["--save_dtype", "int8"], "--save_dtype must be one of float32, bfloat16"),
        (["--private", "True"], "--private has no effect without --push_to_hub"),
        (["--eval_split", "test"], "have no effect without --eval_dataset"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--dataset_split", "test"], "is a local file, which has no configuration and no splits"),
        (["--adapter", "cubic"], "adapter must be none, affine, lowrank:R or swiglu:W"),
        (["--classifier", "calm", "--ffn_expand", "2"], "--ffn_expand has no effect on --classifier calm"),
        (["--classifier", "ffn", "--mamba_state", "8"], "--mamba_state has no effect on --classifier ffn"),
        (["--dataset", "self", "--dataset_split", "test"], "have no effect with --dataset self"),
        (["--classifier", "calm", "--mamba_state", "8"], "add mamba or hybrid, or remove it"),
        (["--hybrid_expand", "0.5"], "--hybrid_expand has no effect on --classifier calm,mamba,ffn"),
        (["--classifier", "hybrid", "--hybrid_expand", "0"], "hybrid_expand must be a finite number above 0"),
        (
            ["--calibrate", "false", "--calibrate_tokens", "5"],
            "--calibrate_tokens has no effect with --calibrate false",
        ),
        (["--calibrate_tokens", "0"], "--calibrate_tokens must be at least 1"),
        (
            ["--eval_tokens", "64", "--calibrate_tokens", "100000"],
            "fewer than --calibrate_tokens=100000 tokens of text",
        ),
        (["--mamba_expand", "-1"], "mamba_expand must be a finite number above 0"),
    ],
)
def test_refusals_are_one_line(
    model_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    line = ["train", "--backbone", str(model_folder), "--dataset", str(texts), "--device", "cpu"]
    assert cli.main([*line, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dynamax-lm-eval: error: ")
    assert message in error
    assert LAYERS == 6
