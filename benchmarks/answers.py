"""A model's own answers, from the samples file of a run, as token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def answers(path: Path, tokenizer: Any, limit: int | None = None) -> tuple[list[list[int]], list[int]]:
    """Returns prompts with their answers as ids, and the number of tokens of each prompt; one-token answers left out.

    ``limit``: so many of them, drawn with seed 0.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if limit is not None:
        chosen = np.random.default_rng(0).permutation(len(lines))[:limit]
        lines = [lines[i] for i in sorted(chosen)]
    rows, prompts = [], []
    for line in lines:
        sample = json.loads(line)
        prompt = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"]).input_ids
        answer = tokenizer(sample["resps"][0][0], add_special_tokens=False).input_ids
        if len(answer) > 1:
            rows.append([*prompt, *answer])
            prompts.append(len(prompt))
    return rows, prompts
