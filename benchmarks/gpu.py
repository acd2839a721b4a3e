"""What a GPU does with this package: its tests there, kernels against torch, and decoding at the size of 7B models.

    python benchmarks/gpu.py                                    # a GPU of 24 GB or more
    python benchmarks/gpu.py --shape mistral-7b --blocks 8       # a smaller one
    python benchmarks/gpu.py --device cpu --shape tiny --output OUT    # whether it works at all

Nothing is downloaded: models have the published sizes and random weights. In order: the tests that need a GPU; logits
by the kernels of mamba-ssm and by torch, at the shape of a Codestral Mamba block; seconds per decoding step of the
engine with exits off and with real classifiers whose decisions are drawn at fixed rates, with blocks in segments that
CUDA graphs replay and one by one, of transformers' own ``generate``, which is what ``--model hf`` calls, and of reading
the weights once at the bandwidth of a measured copy. Alternating order, medians, after as many tokens as capture most
graphs. A page goes to docs/results, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import environment
from forced_exits import DrawnExit, forced, threshold_for
from gpu_page import page
from realized import Case, compare
from shapes import SHAPES, random_model
from torch import Tensor

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones.compare import differences
from dynamax_lm_eval.backbones.mamba import kernels
from dynamax_lm_eval.backbones.mamba.backbone import MambaBackbone
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.parity import check_against_model
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifiers import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.kinds import make_classifier
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.models.loading import described

ROOT = Path(__file__).parents[1]
GROUPS = {"7b": ("mistral-7b", "codestral-mamba-7b"), "tiny": ("mistral-tiny", "codestral-mamba-tiny")}
KINDS = ("calm", "ffn", "mamba")
BY_BLOCK = ", block by block"
#: Bytes of the tensor that is copied to measure bandwidth.
_COPIED = {"cuda": 2**31, "cpu": 2**26}


def run_tests() -> dict[str, Any]:
    """Runs the tests that need a GPU, and returns how many passed, and why others did not run."""
    files = sorted(str(file) for file in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in file.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", *files]
        result = subprocess.run(
            [*command, f"--junitxml={found}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if not found.exists():
            raise SystemExit(f"the tests could not be run: {result.stdout[-2000:]}{result.stderr[-2000:]}")
        cases = list(ElementTree.parse(found).getroot().iter("testcase"))
    reasons = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
    failed = [
        f"{case.get('classname')}.{case.get('name')}" for case in cases if len(case) and not case.findall("skipped")
    ]
    passed = len(cases) - len(reasons) - len(failed)
    return {"passed": passed, "failed": failed, "skipped": len(reasons), "reasons": sorted(set(reasons))}


class _Logits:
    """A collector of the logits of every token of a batch."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def reduce(self, tokens: Any, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: Any, reduced: Tensor) -> None:
        self.parts.append(reduced)


def logits_of_passes(engine: Engine, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Yields the logits of two rows, of up to ``tokens`` each, in passes of every kind that a scan is run for."""
    half, states = tokens // 2, engine.new_states(2 * tokens + 4, row_stride=tokens + 2)
    slots = [states.allocate_row(tokens + 2) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, engine.backbone.vocab_size, (2, tokens + 2), generator=generator).tolist()
    policy = ExitPolicy(engine.backbone.num_layers)
    passes = {
        "new rows": [(0, tokens), (0, half)],
        "a row with a past, beside one that decodes": [(tokens, tokens + 1), (half, tokens)],
        "one token in each row": [(tokens + 1, tokens + 2), (tokens, tokens + 1)],
    }
    for name, parts in passes.items():
        inputs = [
            RowInput(text[first:last], first, slot, prompt_length=1, max_steps=1, policy=policy)
            for text, slot, (first, last) in zip(texts, slots, parts, strict=True)
            if slot is not None
        ]
        collector = _Logits()
        engine.forward(FlatBatch.build(inputs), states, collector)
        yield name, torch.cat(collector.parts)


def compare_kernels(shape: str, device: str, tokens: int) -> dict[str, Any]:
    """Returns by how much logits differ between the kernels of mamba-ssm and torch, after two blocks of a shape."""
    # In float32 only where Triton's products can be had in it.
    dtypes = [
        dtype
        for dtype in (torch.bfloat16, torch.float32)
        if kernels.find("auto", torch.device(device), dtype) is not None
    ]
    if not dtypes:
        return {"why_not": f"mamba-ssm is not used on {device}", "rows": []}
    rows = []
    for dtype in dtypes:
        model = random_model(shape, 2, dtype, device)
        engines = [Engine(MambaBackbone(model, choice)) for choice in ("auto", "torch")]  # type: ignore[arg-type]
        for (name, ours), (_, theirs) in zip(*(logits_of_passes(engine, tokens) for engine in engines), strict=True):
            largest, mean = differences(ours, theirs)
            rows.append({"dtype": str(dtype), "pass": name, "largest": largest, "mean": mean})
    return {"rows": rows}


def copy_bandwidth(device: str, repeats: int) -> float:
    """Returns bytes per second, read and written, of copying a large tensor; the median."""
    source = torch.ones(_COPIED[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class MeasuredCase(Case):
    """A policy, run in segments or block by block, with the most memory that it took."""

    def __init__(self, name: str, engine: Engine, policy: ExitPolicy, static: bool = True) -> None:
        super().__init__(name, engine, policy)
        self.peak: int | None = None
        self.passes: Counter[str] = Counter()
        self._static = static

    def steps(self, prompts: list[list[int]], warm_tokens: int, new_tokens: int) -> float:
        """Seconds of a step: of the new tokens that follow the first, which graphs are captured in."""
        device = self.engine.backbone.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = self._seconds(prompts, warm_tokens, new_tokens)
        if device.type == "cuda":
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(device))
        return seconds / new_tokens

    def _seconds(self, prompts: list[list[int]], warm_tokens: int, new_tokens: int) -> float:
        # On a CPU, to try the benchmark out, segments are used only where that is said.
        choice = None if self.engine.backbone.device.type == "cuda" else True
        self.engine.use_segments(choice if self._static else False)
        times = []

        def note(tokens: list[int]) -> bool:
            """Never ends a row; its token has been read back, so the device is done with the step."""
            if len(tokens) in (warm_tokens, warm_tokens + new_tokens):
                times.append(time.perf_counter())
            return False

        length = warm_tokens + new_tokens
        stops = [note, *(len(prompts) - 1) * [lambda _: False]]
        requests = [
            GenerationRequest(prompt, length, self.policy, Sampler(), stop)
            for prompt, stop in zip(prompts, stops, strict=True)
        ]
        self.traces = [generation.trace for generation in generate_all(self.engine, requests, len(prompts))]
        self.passes = Counter() if self.engine.segments is None else self.engine.segments.passes
        return times[-1] - times[0]

    def mean_exit_layer(self) -> float:
        layers = [layer for trace in self.traces for layer in trace.exit_layers]
        return sum(layers) / len(layers) if layers else float(self.engine.backbone.num_layers)


class Generate(MeasuredCase):
    """transformers' ``generate`` of the same model."""

    @torch.inference_mode()
    def _seconds(self, prompts: list[list[int]], warm_tokens: int, new_tokens: int) -> float:
        model, ids = self.engine.backbone.model, torch.tensor(prompts, device=self.engine.backbone.device)
        spent = []
        for length in (warm_tokens, warm_tokens + new_tokens):
            start = time.perf_counter()
            options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
            texts = model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
            spent.append(time.perf_counter() - start)
            assert all(len(text) == ids.shape[1] + length for text in texts), "nothing ends a text"
        return spent[1] - spent[0]

    def macs(self) -> int:
        """Those of a token, since no trace says how many there were: the ratio to the full model is 1."""
        return self.full.macs()

    full: Case


def cases_of(engine: Engine, rates: Sequence[float]) -> list[MeasuredCase]:
    """Exits off, transformers, and every kind of classifier at every rate, in segments and block by block."""
    backbone = engine.backbone
    depth = backbone.num_layers
    full = MeasuredCase("exits off", engine, ExitPolicy(depth))
    theirs = Generate("transformers", engine, ExitPolicy(depth))
    theirs.full = full
    cases = [full, theirs]
    layers = tuple(sorted({depth // 2 + i * depth // 8 for i in range(4)}))
    for kind in KINDS:
        torch.manual_seed(0)
        workers = {n: make_classifier(kind, backbone.hidden_size, "silu", ClassifierOptions()) for n in layers}
        for rate in rates:
            exits = {n: DrawnExit(worker, n) for n, worker in workers.items()}
            for worker in workers.values():
                worker.requires_grad_(False).eval()
            thresholds = (threshold_for(rate),) * len(layers)
            policy = ExitPolicy(depth, layers, thresholds, confidence="classifier", classifier=kind)  # type: ignore[arg-type]
            drawn = forced(backbone, exits, kind=kind)  # type: ignore[arg-type]
            cases.append(MeasuredCase(f"{kind}, {rate:g} leave at each exit", drawn, policy))
    by_block = [
        MeasuredCase(f"{case.name}{BY_BLOCK}", case.engine, case.policy, static=False)
        for case in cases
        if case is not theirs
    ]
    return [*cases, *by_block]


def measure(shape: str, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Returns what decoding takes at a shape."""
    model = random_model(shape, args.blocks, getattr(torch, args.dtype), args.device)
    model.generation_config.eos_token_id = None  # texts are as long as they are asked to be
    longest = args.prompt_tokens + args.warm_tokens + args.new_tokens
    engine = Engine(make_backbone(model, longest))
    try:
        check_against_model(engine, model)
        checked = "passed"
    except UserError as error:
        checked = f"failed ({described(error)})"
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    read = [parameter for parameter in model.parameters() if id(parameter) not in embeddings]
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in read)
    limit = num_bytes / bandwidth
    cases, rows, left_out = cases_of(engine, args.rates), [], None
    try:
        cases[1].steps([[3, 4, 5]], 1, 1)
    except Exception as error:  # the others are measured all the same
        left_out = described(error)
        del cases[1]
    generator = torch.Generator().manual_seed(0)
    for batch_size in args.batch_sizes:
        shape_of = (batch_size, args.prompt_tokens)
        prompts = torch.randint(3, engine.backbone.vocab_size, shape_of, generator=generator).tolist()
        for case in cases:
            case.peak = None
        table = compare(
            list(cases), lambda case, p=prompts: case.steps(p, args.warm_tokens, args.new_tokens), args.repeats
        )
        steps = {row["case"]: row["seconds"] for row in table}
        theirs = statistics.median(steps["transformers"]) if left_out is None else None
        for case, row in zip(cases, table, strict=True):
            step = statistics.median(steps[case.name])
            rows.append(
                {
                    "batch_size": batch_size,
                    "case": case.name,
                    "ms_per_step": 1e3 * step,
                    "ms_least": 1e3 * min(steps[case.name]),
                    "ms_most": 1e3 * max(steps[case.name]),
                    "tokens_per_second": batch_size / step,
                    "times_limit": step / limit,
                    "times_as_fast_as_transformers": None if theirs is None else theirs / step,
                    "counted": row["counted"],
                    "realised": row["realised"],
                    "mean_exit_layer": case.mean_exit_layer(),
                    "peak_bytes": case.peak,
                    "passes": dict(case.passes),
                }
            )
            print(f"{shape}, batch {batch_size}, {case.name}: {1e3 * step:.3f} ms per step", flush=True)
    return {
        "shape": shape,
        "blocks": engine.backbone.num_layers,
        "runs_as": engine.backbone.rung,
        "self_check": checked,
        "transformers_left_out": left_out,
        "weight_bytes": num_bytes,
        "limit_ms": 1e3 * limit,
        "rows": rows,
    }


def attempted(measured: Callable[[], dict[str, Any]], **otherwise: Any) -> dict[str, Any]:
    """Returns what was measured, or else why not: one part that fails does not lose the others."""
    try:
        return {"why_not": None, **measured()}
    except Exception as error:
        print(f"failed: {described(error)}", file=sys.stderr)
        return {"why_not": described(error), **otherwise}


def versions(device: str) -> dict[str, Any]:
    found = environment(device)
    for package in ("mamba-ssm", "causal-conv1d", "triton", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "cuda": torch.version.cuda or "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=(*GROUPS, *SHAPES), default="7b")
    parser.add_argument("--blocks", type=int, help="of each model, where memory or time do not allow all")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.3], help="share that leaves at each exit")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--warm-tokens", type=int, default=64, help="generated before the time is taken")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated while it is")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="folder of the page")
    args = parser.parse_args()

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --shape tiny tries the benchmark out")
    shapes = GROUPS.get(args.shape, (args.shape,))
    tests = run_tests()
    is_tiny = args.shape.endswith("tiny")
    codestral = GROUPS["tiny" if is_tiny else "7b"][1]
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
        "environment": versions(args.device),
        "tests": tests,
        "kernels": attempted(lambda: compare_kernels(codestral, args.device, 64 if is_tiny else 600), rows=[]),
        "bandwidth": (bandwidth := copy_bandwidth(args.device, args.repeats)),
        **{name: getattr(args, name) for name in ("dtype", "prompt_tokens", "warm_tokens", "new_tokens", "repeats")},
        "shapes": [attempted(partial(measure, shape, args, bandwidth), shape=shape, rows=[]) for shape in shapes],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(result["environment"]["device"]).lower()).strip("-")
    file = args.output / f"gpu-{name}.md"
    file.write_text(page(result), encoding="utf-8")
    print(f"written to {file}")
    print(json.dumps(result))
    if tests["failed"] or any(shape["why_not"] for shape in result["shapes"]):
        raise SystemExit("tests failed, or a model could not be measured; the page says which")


if __name__ == "__main__":
    main()
