"""What runs cost beside compute: latency by a clock of the test, energy by counters with real signatures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, random_ids
from helpers_engine import FULL, PROMPTS, drained, engine_for
from helpers_harness import EXIT_ARGS, dynamax, evaluate
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness import energy, latency
from dynamax_lm_eval.harness.energy import EnergyMeter
from dynamax_lm_eval.harness.latency import Latency
from dynamax_lm_eval.harness.responder import latency_of


class Clock:
    """A second passes whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class TestLatency:
    def test_times_are_those_of_the_clock(self) -> None:
        """Two rows in a batch of one: the second begins when the first has ended."""
        clock = Clock()
        requests = [GenerationRequest(PROMPTS[i], 4, FULL, Sampler(), lambda _: False) for i in range(2)]
        (first, second), _ = drained(generate(engine_for("llama"), requests, 1, clock=clock), 2)
        longer, shorter = (first, second) if first.times[0] < second.times[0] else (second, first)
        # Looked at when rows are admitted, in every pass, and when each token is known.
        assert longer.times == (1.0, 2.0, 8.0)
        assert shorter.times[0] > longer.times[2]
        assert latency_of(longer) == Latency(1.0, (8.0 - 2.0) / 3)

    def test_a_text_of_one_token_has_no_time_per_token(self) -> None:
        request = GenerationRequest(random_ids(4, 1), 1, FULL, Sampler(), lambda _: False)
        ((generation,), _) = drained(generate(engine_for("llama"), [request], 1, clock=Clock()), 1)
        assert latency_of(generation) == Latency(1.0, None)

    def test_rows_that_wait_at_exits_are_timed_too(self) -> None:
        policy = ExitPolicy(LAYERS, (2, 4), (0.3, 0.3), confidence="state")
        requests = [GenerationRequest(prompt, 5, policy, Sampler(), lambda _: False) for prompt in PROMPTS]
        found, _ = drained(generate(engine_for("llama"), requests, 2, rows_in_flight=5, clock=Clock()), 5)
        assert all(began < first <= last for began, first, last in (generation.times for generation in found))

    def test_percentiles_are_those_of_the_requests(self) -> None:
        rng = np.random.default_rng(0)
        firsts, laters = rng.uniform(size=50), rng.uniform(size=50)
        by_task = {
            "a": [Latency(*pair) for pair in zip(firsts[:20].tolist(), laters[:20].tolist(), strict=True)],
            "b": [Latency(*pair) for pair in zip(firsts[20:].tolist(), laters[20:].tolist(), strict=True)],
        }
        found = latency.summary(by_task, 4, 16)
        assert found is not None
        assert (found["requests"], found["batch_size"], found["rows_in_flight"]) == (50, 4, 16)
        for name, values in {"time_to_first_token_ms": firsts, "time_per_output_token_ms": laters}.items():
            assert found[name]["mean"] == pytest.approx(1e3 * values.mean())
            for p in (50, 90, 99):
                assert found[name][f"p{p}"] == pytest.approx(1e3 * np.percentile(values, p))
                assert found["by_task"]["a"][name][f"p{p}"] == pytest.approx(1e3 * np.percentile(values[:20], p))
        assert latency.summary({}, 1, None) is None

    def test_in_results(self, model_folder: Path, manager: TaskManager) -> None:
        results = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_generate", "tiny_choice")
        found = results["compute"]["overall"]["latency"]
        assert found["requests"] == results["compute"]["by_task"]["tiny_generate"]["responses"]
        assert set(found["by_task"]) == {"tiny_generate"} and found["batch_size"] == 3
        assert 0 < found["time_to_first_token_ms"]["p50"] <= found["time_to_first_token_ms"]["p99"]
        assert results["compute"]["overall"]["peak_memory_bytes"] == [None]


def package(folder: Path, number: int, microjoules: int, largest: int) -> Path:
    """A counter as the kernel shows it."""
    place = folder / f"intel-rapl:{number}"
    place.mkdir(parents=True)
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{largest}\n")
    (folder / f"intel-rapl:{number}:0").mkdir()  # a part of it, which is counted in it
    return place / "energy_uj"


class TestEnergy:
    def test_packages_add_up_and_counters_begin_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
        first, second = package(tmp_path, 0, 1_000_000, 9_000_000), package(tmp_path, 1, 8_500_000, 9_000_000)
        meter = EnergyMeter.on([torch.device("cpu")])
        with meter.counting():
            first.write_text("3500000\n")
            second.write_text("500000\n")
        assert meter.to_json(7) == {
            "joules": pytest.approx(2.5 + 1.0),
            "per_generated_token": pytest.approx(0.5),
            "source": "rapl",
            "reason": None,
        }

    def test_no_counter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
        meter = EnergyMeter.on([torch.device("cpu")])
        with meter.counting():
            pass
        assert meter.to_json(3) == {
            "joules": None,
            "per_generated_token": None,
            "source": None,
            "reason": "this machine has no RAPL counters",
        }

    def test_a_counter_that_only_root_may_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
        package(tmp_path, 0, 1, 9)

        def refused(self: Path, *_: Any, **__: Any) -> str:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_text", refused)
        assert EnergyMeter.on([torch.device("cpu")]).reason == "RAPL counters cannot be read (PermissionError)"

    @pytest.fixture
    def library(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
        """NVML with the functions that are called: two GPUs in another order than torch's, and millijoules of each."""
        counters = {0: 5_000, 1: 70_000}
        uuids = ["0000aaaa", "1111bbbb"]

        class NVMLError(Exception):
            pass

        fake = SimpleNamespace(
            NVMLError=NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=lambda uuid: ("handle", uuids.index(uuid.removeprefix("GPU-"))),
            nvmlDeviceGetTotalEnergyConsumption=lambda handle: counters[handle[1]],
        )
        monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
        properties = [SimpleNamespace(uuid=uuid) for uuid in reversed(uuids)]
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        return counters

    def test_gpus(self, library: dict[int, int]) -> None:
        meter = EnergyMeter.on([torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0)])
        with meter.counting():
            library[0] += 1_500
            library[1] += 500
        assert (meter.source, meter.joules) == ("nvml", 2.0)
        only = EnergyMeter.on([torch.device("cuda", 0)])
        with only.counting():
            library[1] += 250
        assert only.joules == 0.25, "torch's first is NVML's second"

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        meter = EnergyMeter.on([torch.device("cuda", 0)])
        assert meter.reason == "GPUs' counters need the package nvidia-ml-py"

    def test_in_results(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
        file = package(tmp_path, 0, 0, 10**12)
        reads = iter(range(0, 10**9, 4_000_000))
        monkeypatch.setattr(energy._Rapl, "read", lambda _: next(reads))
        found = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_generate", "tiny_choice")
        drawn, compute = found["compute"]["overall"]["energy"], found["compute"]["overall"]
        assert file.exists() and drawn["source"] == "rapl"
        assert drawn["joules"] == pytest.approx(2 * 4.0), "one reading before and one after each kind of request"
        assert drawn["per_generated_token"] == pytest.approx(8.0 / compute["tokens"]["generated"])
