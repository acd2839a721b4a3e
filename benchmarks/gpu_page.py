"""The page that benchmarks/gpu.py writes."""

from __future__ import annotations

from typing import Any

_HEADER = (
    "| batch | case | ms per step (least to most) | tokens/s | x limit | x transformers | mean exit layer | counted "
    "| realised | peak GB | passes |"
)


def page(result: dict[str, Any]) -> str:
    """The result as a page in Markdown."""
    about = "\n".join(f"| {name} | {value} |" for name, value in result["environment"].items())
    tests = result["tests"]
    reasons = "".join(f"\n- {reason}" for reason in tests["reasons"])
    text = f"""# {result["environment"]["device"]}

Measured on {result["date"]} by

    {result["command"]}

| | |
| --- | --- |
{about}

Tests that need a GPU: {tests["passed"]} passed, {len(tests["failed"])} failed, {tests["skipped"]} skipped.{reasons}
"""
    text += "".join(f"\n- failed: {name}" for name in tests["failed"])
    text += "\n## mamba-ssm against torch\n\nLogits after two blocks of the shape of Codestral Mamba, random weights.\n"
    if result["kernels"]["why_not"]:
        text += f"\nNot compared: {result['kernels']['why_not']}.\n"
    else:
        text += "\n| dtype | pass | largest difference / largest value | mean / mean |\n| --- | --- | --- | --- |\n"
        for row in result["kernels"]["rows"]:
            text += f"| {row['dtype']} | {row['pass']} | {row['largest']:.1e} | {row['mean']:.1e} |\n"
    text += f"""
## Decoding

Random weights at the published sizes, prompts of {result["prompt_tokens"]} tokens, {result["dtype"]},
{result["repeats"]} repetitions in alternating order; the {result["new_tokens"]} tokens are timed that follow the first
{result["warm_tokens"]}, in which most graphs are captured. Blocks run in segments that CUDA graphs replay, unless a
case says block by block; `passes` are those of all tokens by how they ran. The limit is the time in which the weights
that a token needs are read once at {result["bandwidth"] / 1e9:.0f} GB/s, which a copy on this device reads and writes.
Classifiers are real, their decisions drawn; `counted` is the reduction in MACs of generated tokens with the LM head,
`realised` the ratio of times, both against exits off. Peak memory is that of the
tensors of a case, with the model and the classifiers of all cases.
"""
    for shape in result["shapes"]:
        if shape["why_not"]:
            text += f"\n### {shape['shape']}\n\nNot measured: {shape['why_not']}.\n"
            continue
        text += f"""
### {shape["shape"]}, {shape["blocks"]} blocks

Runs as `{shape["runs_as"]}`; self-check {shape["self_check"]}.
The limit: {shape["weight_bytes"] / 1e9:.3f} GB of weights per token, {shape["limit_ms"]:.3f} ms.

{_HEADER}
{"| --- " * _HEADER.count(" | ")}| --- |
"""
        for row in shape["rows"]:
            ratio = row["times_as_fast_as_transformers"]
            against = "-" if ratio is None else f"{ratio:.2f}"
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
            passes = ", ".join(f"{count} {how}" for how, count in row["passes"].items()) or "-"
            text += (
                f"| {row['batch_size']} | {row['case']} | {row['ms_per_step']:.3f} ({row['ms_least']:.3f} to "
                f"{row['ms_most']:.3f}) | {row['tokens_per_second']:.1f} | {row['times_limit']:.2f} | "
                f"{against} | {row['mean_exit_layer']:.1f} | {row['counted']:.3f} | "
                f"{row['realised']:.3f} | {peak} | {passes} |\n"
            )
        if shape["transformers_left_out"]:
            text += f"\ntransformers' own `generate` fails here: {shape['transformers_left_out']}.\n"
    return text
