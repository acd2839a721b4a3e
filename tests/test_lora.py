"""LoRA on a backbone's blocks before exits are trained: its loss, its steps, its folder, and exits that fit it."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import TASKS, random_ids, tiny_model
from helpers_architectures import ARCHITECTURES
from helpers_engine import EXITS
from helpers_harness import dynamax
from helpers_training import ROWS, train, training_options
from safetensors.torch import load_file, save_file

from dynamax_lm_eval import cli
from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.models.fingerprint import adapter_fingerprint
from dynamax_lm_eval.models.loading import model_without_weights
from dynamax_lm_eval.training import command, output
from dynamax_lm_eval.training.batches import MicroBatches
from dynamax_lm_eval.training.lora import LoraTrainer, check, linear_layers
from dynamax_lm_eval.training.options import RunOptions
from dynamax_lm_eval.training.read_outs import lora_report, read_outs
from dynamax_lm_eval.training.trainer import Processes, exit_weights

peft = pytest.importorskip("peft", reason="needs peft")

POSITIONS = torch.tensor([0, 3, 8, 9, 12, 17, 23])
FAMILIES = ["llama", "gemma3", "gpt_neox", "mamba2", "mamba"]


def lora_trainer(family: str = "llama", processes: Processes | None = None, **changes: Any) -> LoraTrainer:
    """On a copy of a tiny model, because adapters are put on it in place."""
    settings: dict[str, Any] = {"lora": 4, "lora_tokens": 128 * 12, "lora_learning_rate": 1e-2, **changes}
    model = copy.deepcopy(tiny_model(family)).requires_grad_(False)
    frozen = FrozenPass(make_backbone(model, max_length=256), EXITS, final_block=False, top_k=1)
    return LoraTrainer(frozen, training_options(Path("x"), Path("x"), **settings), processes)


def text(documents: int = 6) -> MicroBatches:
    """The same few documents of one row each, again and again."""

    def read(epoch: int, first: int) -> Any:
        return itertools.islice((random_ids(32, i) for i in range(documents)), first, None)

    return MicroBatches(read, 64, 32)


def read_out(model: Any, layers: tuple[int, ...]) -> list[torch.Tensor]:
    """The logits (n, V) at the positions after some blocks, then at full depth, by transformers row by row."""
    found: list[list[torch.Tensor]] = [[] for _ in (*layers, None)]
    decoder = model.base_model
    norm = next(getattr(decoder, n) for n in ("norm", "norm_f", "final_layer_norm") if hasattr(decoder, n))
    # Mamba's hidden states begin after its first block, those of other families with the embeddings.
    offset = 1 if "mamba" in model.config.model_type else 0
    for row in ROWS:
        output = model(torch.tensor([row]), output_hidden_states=True)
        for logits, layer in zip(found, layers, strict=False):
            logits.append(model.get_output_embeddings()(norm(output.hidden_states[layer - offset][0])))
        found[-1].append(output.logits[0])
    return [torch.cat(logits)[POSITIONS] for logits in found]


def divergences(model: Any, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || read-out) of each exit and of full depth, (E + 1,)."""
    target = teacher.log_softmax(-1)
    return torch.stack(
        [
            F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
            for logits in read_out(model, EXITS)
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
class TestLoss:
    def test_begins_as_the_model(self, family: str) -> None:
        trainer = lora_trainer(family)
        original = copy.deepcopy(tiny_model(family))
        ids = torch.tensor([ROWS[2]])
        with torch.no_grad():
            assert torch.equal(trainer.model(ids).logits, original(ids).logits)
            teacher = read_out(original, ())[0]
            expected = divergences(original, teacher)
        found = trainer.accumulate(ROWS, POSITIONS, 1.0)
        assert found[-1] == pytest.approx(0, abs=1e-5)
        assert found[:-1].min() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_the_loss(self, family: str) -> None:
        trainer = lora_trainer(family, lora_keep=0.7)
        with torch.no_grad():
            for weight in trainer.weights:
                weight.add_(0.05 * torch.randn_like(weight))
            teacher = read_out(copy.deepcopy(tiny_model(family)), ())[0]
        found = trainer.accumulate(ROWS, POSITIONS, 0.5)
        gradients = [weight.grad.clone() for weight in trainer.weights if weight.grad is not None]
        trainer.optimizer.zero_grad(set_to_none=True)
        # The model under PEFT is the backbone's, with adapters in its blocks.
        expected = divergences(trainer.frozen.backbone.model, teacher)
        (0.5 * (expected * torch.tensor([*exit_weights(len(EXITS)), 0.7])).sum()).backward()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
        assert found[-1] > 1e-4
        assert len(gradients) == len(trainer.weights)
        for weight, gradient in zip(trainer.weights, gradients, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_steps_draw_exits_to_the_model_and_keep_it(family: str) -> None:
    last = {}
    for keep in (0.0, 1.0):
        trainer = lora_trainer(family, lora=8, lora_keep=keep, lora_tokens=128 * 16, label_share=1.0)
        batches = text(documents=2)
        reports = [trainer.step(number, batches) for number in range(16)]
        assert reports[0].full_depth == pytest.approx(0, abs=1e-5)
        assert [report.tokens for report in reports[:2]] == [128, 256]
        first, last[keep] = reports[0], reports[-1]
        assert all(now < 0.9 * then for now, then in zip(last[keep].exits, first.exits, strict=True))
    assert last[1.0].full_depth < 0.5 * last[0.0].full_depth


def test_processes_share_a_step() -> None:
    alone = lora_trainer()
    report = alone.step(0, text())
    gradients: list[torch.Tensor] = []

    def noting(tensor: torch.Tensor) -> torch.Tensor:
        gradients.append(tensor.clone())
        return tensor

    # What the other process adds up is noted first; the second then gets it beside its own.
    lora_trainer(processes=Processes(0, 2, noting)).step(0, text())
    theirs = iter(gradients)
    together = lora_trainer(processes=Processes(1, 2, lambda tensor: tensor + next(theirs)))
    shared = together.step(0, text())
    assert shared.exits == pytest.approx(report.exits, rel=1e-4)
    assert shared.gradient_norm == pytest.approx(report.gradient_norm, rel=1e-4)
    for weight, expected in zip(together.weights, alone.weights, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("mamba2", {"in_proj"}),
        ("mamba", {"in_proj", "x_proj"}),
    ],
)
def test_linear_layers_of_blocks_only(family: str, names: set[str]) -> None:
    paths = linear_layers(tiny_model(family))
    assert {path.rpartition(".")[2] for path in paths} == names
    assert len(paths) == 6 * len(names)


def test_read_outs_are_those_of_the_model(model_folder: Path) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    frozen = FrozenPass(make_backbone(model, max_length=256), EXITS, final_block=False, top_k=1)
    found = read_outs(frozen, ROWS, 16)
    nats = 0.0
    with torch.no_grad():
        for row in ROWS:
            logits = model(torch.tensor([row])).logits[0]
            nats += float(F.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum"))
        best = [logits.argmax(-1) for logits in read_out(model, EXITS)]
    assert found.bits == pytest.approx(nats / torch.tensor(2.0).log().item(), rel=1e-5)
    assert found.best[:, POSITIONS].tolist() == torch.stack(best).tolist()

    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return "ab" * len(ids)

    report = lora_report(found, found, EXITS, ROWS, Bytes())
    assert report["agreement_at_full_depth"] == 1
    assert report["bits_per_byte"]["original"] == pytest.approx(found.bits / (2 * sum(len(row) - 1 for row in ROWS)))
    for i, layer in enumerate(EXITS):
        share = (found.best[i] == found.best[-1]).mean()
        assert report["agreement_of_exit"][str(layer)] == dict.fromkeys(
            ("before", "after", "after_with_original"), share
        )


LORA = {"classifier": "calm", "max_tokens": 256, "lora": 2, "lora_tokens": 5 * 128, "lora_learning_rate": 5e-3}


@pytest.fixture(scope="module", params=["llama", pytest.param("mamba2", marks=pytest.mark.slow)])
def trained(
    request: pytest.FixtureRequest, model_folder: Path, mamba_folder: Path, texts: Path, tmp_path_factory: Any
) -> tuple[Path, ExitCheckpoint]:
    folder = model_folder if request.param == "llama" else mamba_folder
    return folder, train(folder, texts, tmp_path_factory.mktemp("lora"), **LORA)


class TestCommand:
    def test_evaluations_take_adapters_and_exits(self, trained: tuple[Path, ExitCheckpoint], tmp_path: Path) -> None:
        backbone, saved = trained
        names = {"adapter_model.safetensors", "adapter_config.json", "training.jsonl"}
        assert {path.name for path in (saved.path / "lora").iterdir()} == names
        given = f"backbone={backbone},exits={saved.path},threshold=0.5"
        line = ["run", "--tasks", "tiny_generate", "--include_path", str(TASKS), "--device", "cpu", "--limit", "2"]
        output = ["--output_path", str(tmp_path)]
        assert cli.main([*line, *output, "--model_args", f"{given},peft={saved.path / 'lora'}"]) == 0
        (file,) = tmp_path.rglob("results_*.json")
        assert json.loads(file.read_text())["results"]["tiny_generate"]["compute_reduction,none"] > 0
        with pytest.raises(UserError, match="were trained for other weights"):
            dynamax(backbone, exits=str(saved.path), threshold=0.5)

    def test_exits_fit_the_adapters_wherever_they_lie(
        self, trained: tuple[Path, ExitCheckpoint], tmp_path: Path
    ) -> None:
        backbone, saved = trained
        fingerprint = saved.config.backbone.fingerprint
        moved = tmp_path / "moved"
        shutil.copytree(saved.path / "lora", moved)
        lm = dynamax(backbone, peft=str(moved), exits=str(saved.path), threshold=0.5)
        assert lm.backbone_fingerprint() == fingerprint
        assert lm.engine.backbone.rung in ("fused", "mamba")
        # As they were saved again elsewhere, by another release; then with another weight.
        config = json.loads((moved / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "elsewhere", "peft_version": "0"}
        config["target_modules"] = config["target_modules"][::-1]
        (moved / "adapter_config.json").write_text(json.dumps(config))
        assert adapter_fingerprint(str(moved)) == adapter_fingerprint(str(saved.path / "lora"))
        weights = load_file(moved / "adapter_model.safetensors")
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, moved / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="were trained for other weights"):
            dynamax(backbone, peft=str(moved), exits=str(saved.path), threshold=0.5)

    def test_adapters_can_be_merged_and_then_cost_nothing(
        self, trained: tuple[Path, ExitCheckpoint], tmp_path: Path
    ) -> None:
        """As the documentation says how."""
        backbone, saved = trained
        base = transformers.AutoModelForCausalLM.from_pretrained(backbone)
        peft.PeftModel.from_pretrained(base, saved.path / "lora").merge_and_unload().save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
        given: dict[str, Any] = {"exits": str(saved.path), "threshold": 0.5}
        adapted = dynamax(backbone, peft=str(saved.path / "lora"), **given)
        merged = dynamax(tmp_path, exits_check=False, **given)
        plain = dynamax(backbone)
        pairs = [(("a", "b"), random_ids(9, 1), random_ids(6, 2))]
        ((expected, _),), ((found, _),) = (
            lm._loglikelihood_tokens(pairs, disable_tqdm=True) for lm in (adapted, merged)
        )
        assert found == pytest.approx(expected, rel=1e-4)
        costs = [lm.engine.backbone.cost.blocks for lm in (plain, merged, adapted)]
        assert costs[0] == costs[1]
        assert all(
            ours.weights < theirs.weights and ours.state_recompute < theirs.state_recompute
            for ours, theirs in zip(costs[1], costs[2], strict=True)
        )

    def test_says_what_it_did(self, trained: tuple[Path, ExitCheckpoint]) -> None:
        backbone, saved = trained
        config = json.loads((saved.path / "lora" / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(backbone), 2, 4)
        evaluation = json.loads((saved.path / "evaluation.json").read_text())
        found = evaluation["lora"]
        for layer, agreement in found["agreement_of_exit"].items():
            # Without adapters of the read-out, exits agree after the training as their labels say.
            assert agreement["after"] == pytest.approx(evaluation["agreement_of_exit"][layer])
        assert found["bits_per_byte"]["original"] > 1
        assert 0.5 < found["agreement_at_full_depth"] <= 1
        assert found["block_weights"]["original"] < found["block_weights"]["tuned"]
        steps = [json.loads(line) for line in (saved.path / "lora" / "training.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
        card = (saved.path / "README.md").read_text()
        assert "peft=THIS_FOLDER/lora" in card
        assert f"{found['bits_per_byte']['tuned']:.3f}" in card

    @pytest.mark.parametrize(
        "steps", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
    )
    def test_goes_on_as_if_it_had_not_been_killed(
        self,
        trained: tuple[Path, ExitCheckpoint],
        texts: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        steps: int,
    ) -> None:
        """Before the first saved state, between two, and after the last step."""
        backbone, saved = trained
        original = LoraTrainer.step

        def dying(self: LoraTrainer, step: int, batches: MicroBatches) -> Any:
            if step == steps:
                raise KeyboardInterrupt
            return original(self, step, batches)

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LoraTrainer, "step", dying)
            patch.setattr(command, "_loop", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(backbone, texts, tmp_path, **LORA)
        if steps > 1:
            with pytest.raises(UserError, match=r"lora_keep \(1.0, now 0.5\)"):
                train(backbone, texts, tmp_path, resume=True, **LORA, lora_keep=0.5)
        again = train(backbone, texts, tmp_path, resume=True, **LORA)
        assert again.config.backbone.fingerprint == saved.config.backbone.fingerprint
        ours, theirs = (load_file(path / "lora" / "adapter_model.safetensors") for path in (tmp_path, saved.path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for name, tensor in again.load().state_dict().items():
            assert torch.equal(tensor, saved.load().state_dict()[name])
        assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "0"], "--lora must be at least 1, got 0"),
        (["--lora", "4"], "--lora needs --output"),
        (["--lora_keep", "2"], "--lora_keep has no effect without --lora; add it, or remove --lora_keep"),
        (["--lora_tokens", "5"], "--lora_tokens has no effect without --lora"),
        (["--lora", "4", "--lora_keep", "-1"], "--lora_keep must be at least 0"),
        (["--lora", "4", "--lora_learning_rate", "0"], "--lora_learning_rate must be above 0"),
        (["--lora", "4", "--final_block"], "--lora and --final_block exclude each other"),
        (["--lora", "4", "--dataset", "self"], "--lora cannot be trained on text that its backbone goes on writing"),
    ],
)
def test_refusals_are_one_line(
    model_folder: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(command, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    line = ["train", "--backbone", str(model_folder), "--dataset", str(texts), "--device", "cpu"]
    assert cli.main([*line, *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_blocks_that_give_several_vectors_are_refused_before_weights_load() -> None:
    config = ARCHITECTURES["inputs per block and shared K and V"][1]()
    options, run = training_options(Path("x"), Path("x"), lora=2), RunOptions(output="x")
    with pytest.raises(UserError, match="blocks of Gemma3nForCausalLM give several vectors per token"):
        check(options, run, model_without_weights(config, {}))


@pytest.mark.parametrize(
    ("without", "message"),
    [("peft", "--lora needs the package peft; run: pip install peft"), ("layers", "no linear layers in its blocks")],
)
def test_what_cannot_be_adapted_is_refused_before_weights_load(
    model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str, message: str
) -> None:
    monkeypatch.setattr(command, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    if without == "peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        monkeypatch.setattr("dynamax_lm_eval.training.lora.linear_layers", lambda _: [])
    with pytest.raises(UserError, match=message):
        train(model_folder, texts, tmp_path / "output", **LORA)


def test_overwriting_removes_what_a_training_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    output.clear(tmp_path)
    assert (tmp_path / "lora").exists()
    (tmp_path / "lora" / "training.jsonl").write_text("")
    output.clear(tmp_path)
    assert not (tmp_path / "lora").exists()
