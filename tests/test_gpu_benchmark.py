"""benchmarks/gpu.py, which is made for a GPU, from one end to the other on a CPU at tiny sizes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ARGUMENTS = (
    "--device cpu --shape tiny --dtype float32 --blocks 4 --prompt-tokens 6 --warm-tokens 3 --new-tokens 6 --repeats 1"
)


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    given = [*ARGUMENTS.split(), "--batch-sizes", "1", "2", "--rates", "0", "0.5", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    importlib.import_module("gpu").main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {**found, "page": (tmp_path / "gpu-cpu.md").read_text(encoding="utf-8")}


@pytest.mark.slow
def test_the_whole_benchmark(result: dict[str, Any]) -> None:
    assert result["tests"]["failed"] == []
    assert result["tests"]["skipped"] > 0 and result["tests"]["reasons"], "there is no GPU, or these tests ran on it"
    assert result["kernels"]["why_not"] == "mamba-ssm is not used on cpu"
    assert result["bandwidth"] > 0
    assert [shape["runs_as"] for shape in result["shapes"]] == ["fused", "mamba"]
    for shape in result["shapes"]:
        assert shape["self_check"] == "passed"
        assert shape["transformers_left_out"] is None
        rows = {(row["batch_size"], row["case"]): row for row in shape["rows"]}
        assert len(rows) == 2 * (1 + 2 * (1 + 3 * 2))
        for (batch, name), row in rows.items():
            assert row["ms_least"] <= row["ms_per_step"] <= row["ms_most"]
            assert row["times_limit"] == pytest.approx(row["ms_per_step"] / shape["limit_ms"])
            in_segments = name != "transformers" and not name.endswith("block by block")
            # All but the pass that feeds the prompts; few Mamba rows may have too many tokens that left.
            assert sum(row["passes"].values()) == (9 - 1 if in_segments else 0)
            assert not in_segments or row["passes"]["static"] > 4
            if name.partition(",")[0] in ("exits off", "transformers"):
                assert row["mean_exit_layer"] == 4 and row["counted"] == 1
            elif " 0 leave" in name:  # the classifiers' own cost
                assert row["mean_exit_layer"] == 4 and row["counted"] < 1
            else:
                assert row["mean_exit_layer"] < 4
            assert f"| {batch} | {name} |" in result["page"]
    assert f"{result['tests']['skipped']} skipped" in result["page"]
    assert result["environment"]["torch"] in result["page"]
