"""What surrounds the kernels of Mamba: rows and lines, constants, norms, and which are used. Without a GPU."""

from __future__ import annotations

import copy
import importlib
import logging
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, MAMBAS, tiny_model
from helpers_engine import (
    PROMPTS,
    KernelsOnCpu,
    classifier_policy,
    engine_for,
    exits_config,
    run_generate,
    separated_policy,
    varied_classifiers,
)
from kernel_stand_ins import STAND_INS
from reference import reference_generate
from torch import nn

from dynamax_lm_eval.backbones import MambaBackbone
from dynamax_lm_eval.backbones.mamba import kernels, norms
from dynamax_lm_eval.backbones.mamba.groups import KernelRows
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.state_cache import lines_of
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import check_against_model
from dynamax_lm_eval.exits.policy import ExitPolicy

#: The functions of mamba-ssm.
SCANS = ("chunk_scan", "state_update", "gated_norm")


def counted_kernels(calls: Counter[str]) -> KernelsOnCpu:
    """The stand-ins, whose calls are counted by name."""

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(STAND_INS, name)(*args, **kwargs)

        return call

    return KernelsOnCpu(*map(counted, SCANS), STAND_INS.conv)


@pytest.mark.parametrize("mode", ["recompute", "skip"])
@pytest.mark.parametrize("family", MAMBAS)
def test_states_move_on_in_place_by_kernels(family: str, mode: Any) -> None:
    """Prompts that join, steps of rows in any order, and rows that go on with several tokens."""
    calls: Counter[str] = Counter()
    model = tiny_model(family)
    backbone = MambaBackbone(model)
    for block in backbone.blocks:
        block.mixer.kernels = counted_kernels(calls)
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, state_mode=mode), PROMPTS[0])
    expected = run_generate(engine_for(family), [policy] * 5, PROMPTS, 3)
    assert run_generate(Engine(backbone), [policy] * 5, PROMPTS, 3) == expected
    assert set(calls) == ({"state_update"} if family == "mamba" else set(SCANS))
    check_against_model(Engine(backbone), model)


def test_without_a_gpu_there_are_no_kernels() -> None:
    assert kernels.find("auto", torch.device("cpu"), torch.float32) is None
    assert kernels.find("torch", torch.device("cuda"), torch.float32) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", MAMBAS)
def test_kernels_give_what_the_reference_gives(family: str) -> None:
    pytest.importorskip("mamba_ssm")
    model = copy.deepcopy(tiny_model(family)).cuda()
    policy = separated_policy(tiny_model(family), ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3), PROMPTS[0])
    results = [
        run_generate(Engine(MambaBackbone(model, choice)), [policy] * 3, PROMPTS[:3], 2)  # type: ignore[arg-type]
        for choice in ("auto", "torch")
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["mamba", "hybrid"])
def test_classifiers_move_on_in_place_by_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states too, of prompts that join and of rows that decode; and a Transformer has none of its own."""
    calls: Counter[str] = Counter()
    options = replace(exits_config().options, mamba_state=4)  # channels that the kernel of the convolution takes
    classifiers = varied_classifiers(exits_config(options=options))
    model = tiny_model("llama")
    policy = separated_policy(model, classifier_policy(kind), PROMPTS[0], classifiers=classifiers)
    expected = [reference_generate(model, policy, prompt, 8, classifiers) for prompt in PROMPTS]
    used = counted_kernels(calls)
    monkeypatch.setattr(kernels, "find", lambda choice, *_: used if choice == "auto" else None)
    engine = Engine(engine_for("llama").backbone, classifiers)
    results = run_generate(engine, [policy] * 5, PROMPTS, 3)
    assert set(calls) == set(SCANS)
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    calls.clear()
    engine.backbone.mamba_kernels = "torch"
    assert run_generate(engine, [policy] * 5, PROMPTS, 3) == results
    assert not calls


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("most_steps", [1, 4])
def test_groups_hold_every_token_once_and_in_order(most_steps: int, padded: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(1, 9, size=generator.integers(1, 7))
        is_new = generator.random(len(lengths)) < generator.choice([0.0, 0.5, 1.0])
        numbers = generator.permutation(12)[: len(lengths)]
        rows = KernelRows(RaggedRows(lengths.tolist()), numbers, lines_of(numbers, torch.device("cpu")), is_new)
        groups = rows.groups(3, most_steps, padded)
        places = np.arange(lengths.sum())
        if groups.order is not None:
            places = groups.order.place.numpy()
            assert (groups.order.tokens[places] == torch.arange(lengths.sum())).all()
            absent = np.setdiff1d(np.arange(len(groups.order.tokens)), places)
            assert (groups.order.tokens[absent] == lengths.sum()).all()
        # Which line moves on at each place, step after step, then row after row.
        lines = [line for count in groups.steps for line in groups.step_lines[:count].tolist()]
        if groups.beside is not None:
            assert groups.beside.num_rows == len(groups.beside_lines)
            lines += np.repeat(groups.beside_lines.numpy(), groups.beside.lengths).tolist()
        if groups.aside is not None:
            assert groups.aside[0] == len(groups.aside_lines)
            lines += np.repeat(groups.aside_lines.numpy(), groups.aside[1]).tolist()
        assert [lines[place] for place in places] == np.repeat(numbers, lengths).tolist()
        for row in np.split(places, np.cumsum(lengths)[:-1]):
            assert (np.diff(row) > 0).all()


class TestConstants:
    """They follow the parameters, however these change."""

    @staticmethod
    def logits(backbone: MambaBackbone) -> torch.Tensor:
        with torch.no_grad():
            return backbone.train_forward(torch.tensor(PROMPTS[0]), RaggedRows([len(PROMPTS[0])]))

    @pytest.mark.parametrize("family", MAMBAS)
    @pytest.mark.parametrize("fused", [False, True])
    def test_training(self, family: str, fused: bool) -> None:
        model = copy.deepcopy(tiny_model(family)).requires_grad_()
        backbone = MambaBackbone(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        before = self.logits(backbone)
        backbone.train_forward(torch.tensor(PROMPTS[0]), RaggedRows([len(PROMPTS[0])])).square().mean().backward()
        assert torch.equal(self.logits(backbone), before)
        optimizer.step()
        assert not torch.allclose(self.logits(backbone), before)
        assert torch.equal(self.logits(backbone), self.logits(MambaBackbone(copy.deepcopy(model))))

    @pytest.mark.parametrize("family", MAMBAS)
    def test_weights_that_are_loaded_moved_or_replaced(self, family: str) -> None:
        model = copy.deepcopy(tiny_model(family)).requires_grad_(False)
        backbone = MambaBackbone(model)
        before = self.logits(backbone)
        other = {name: value + 0.1 for name, value in model.state_dict().items()}
        model.load_state_dict(other)
        assert not torch.allclose(self.logits(backbone), before)
        assert torch.equal(self.logits(backbone), self.logits(MambaBackbone(copy.deepcopy(model))))
        model.to(torch.bfloat16)
        assert torch.equal(self.logits(backbone), self.logits(MambaBackbone(copy.deepcopy(model))))
        model.to(torch.float32)
        mixer = model.backbone.layers[0].mixer
        mixer.A_log = nn.Parameter(mixer.A_log + 0.5)
        assert torch.equal(self.logits(backbone), self.logits(MambaBackbone(copy.deepcopy(model))))

    @pytest.mark.parametrize("fused", [False, True])
    def test_classifiers_in_training(self, fused: bool) -> None:
        classifier = varied_classifiers().at("mamba", 2).requires_grad_().train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=0.1, fused=fused)
        hidden, rows = torch.randn(9, 32), RaggedRows([9])

        def evaluated(module: nn.Module) -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = module(hidden, rows)[0]
            return logits

        before = evaluated(classifier)
        classifier(hidden, rows)[0].square().mean().backward()
        evaluated(classifier)
        optimizer.step()
        assert not torch.allclose(evaluated(classifier), before)
        assert torch.equal(evaluated(classifier), evaluated(copy.deepcopy(classifier)))


class TestNorms:
    @pytest.mark.parametrize("family", MAMBAS)
    def test_those_of_blocks(self, family: str) -> None:
        module = tiny_model(family).backbone.layers[0].norm
        norm = norms.recognised(module)
        assert norm is not None
        x = torch.randn(5, 32)
        torch.testing.assert_close(norm(x, module.weight), module(x))

    def test_gated_ones(self) -> None:
        module = tiny_model("mamba2").backbone.layers[0].mixer.norm
        norm = norms.recognised(module, gated=True)
        assert norm is not None
        x, gate = torch.randn(2, 5, 64)
        torch.testing.assert_close(norm(x, module.weight, gate), module(x, gate))

    def test_others_are_not(self) -> None:
        module = copy.deepcopy(tiny_model("mamba2").backbone.layers[0].norm)
        module.register_forward_hook(lambda *_: None)
        assert norms.recognised(module) is None
        assert norms.recognised(nn.LayerNorm(8)) is None
        assert norms.recognised(_OffsetNorm()) is None
        assert norms.recognised(nn.Linear(4, 4)) is None


class _OffsetNorm(nn.Module):
    """Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class TestWhichAreUsed:
    @pytest.fixture(autouse=True)
    def anew(self) -> Any:
        kernels._installed.cache_clear()
        yield
        kernels._installed.cache_clear()

    def find(
        self, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Exception], dtype: torch.dtype = torch.bfloat16
    ) -> Any:
        def import_module(name: str) -> Any:
            for package, error in broken.items():
                if name.split(".")[0] == package:
                    raise error
            return SimpleNamespace(
                mamba_chunk_scan_combined=1,
                selective_state_update=2,
                rmsnorm_fn=3,
                causal_conv1d_fn=4,
                causal_conv1d_update=5,
            )

        monkeypatch.setattr(importlib, "import_module", import_module)
        return kernels.find("auto", torch.device("cuda"), dtype)

    def test_both_packages(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        found = self.find(monkeypatch, {})
        assert (found.chunk_scan, found.state_update, found.gated_norm) == (1, 2, 3)
        assert (found.conv.whole, found.conv.update) == (4, 5)
        assert "mamba-ssm and causal-conv1d" in caplog.text

    @pytest.mark.parametrize(
        ("package", "error", "level", "words"),
        [
            ("mamba_ssm", ModuleNotFoundError("no", name="mamba_ssm"), "INFO", "mamba-ssm is not installed"),
            ("mamba_ssm", ImportError("no symbol"), "WARNING", "mamba-ssm cannot be imported (ImportError: no symbol)"),
            (
                "causal_conv1d",
                ModuleNotFoundError("no", name="causal_conv1d"),
                "INFO",
                "causal-conv1d is not installed",
            ),
            ("causal_conv1d", OSError("no CUDA"), "WARNING", "causal-conv1d cannot be imported (OSError: no CUDA)"),
        ],
    )
    def test_what_is_missing_or_broken_is_named_once(
        self,
        package: str,
        error: Exception,
        level: str,
        words: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO)
        found = [self.find(monkeypatch, {package: error}) for _ in range(2)]
        assert [record.levelname for record in caplog.records if words in record.getMessage()] == [level]
        assert found == [None, None] if package == "mamba_ssm" else found[0].conv is None

    def test_float32_keeps_its_products(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        language = SimpleNamespace(fp32_default=None)
        monkeypatch.setattr(kernels, "_language_knobs", lambda: language)
        assert self.find(monkeypatch, {}, torch.bfloat16) is not None
        assert language.fp32_default is None
        assert self.find(monkeypatch, {}, torch.float32) is not None
        assert language.fp32_default == "ieee"
        monkeypatch.setattr(kernels, "_language_knobs", lambda: None)
        assert self.find(monkeypatch, {}, torch.float32) is None
        assert "runs on plain torch in float32" in caplog.text
