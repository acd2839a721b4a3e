"""The options of ``dynamax-lm-eval report``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReportOptions:
    """The sweeps that a report is of, and what it shows of them."""

    folders: list[str] = field(metadata={"help": "folders that sweeps wrote, or folders of such folders"})
    output: str | None = field(default=None, metadata={"help": "where to write; default: report in the first folder"})
    metrics: str | None = field(
        default=None,
        metadata={
            "help": "task=metric pairs separated by commas; default: rougeL_acc where a task has it, else its first "
            "metric; the page opens with another one where that is the same at all points"
        },
    )
    max_degenerate: float = field(
        default=0.1,
        metadata={
            "help": "points whose degenerate_rate is more than this above the full model's are kept in the data, "
            "marked invalid, and left out of lines"
        },
    )
    max_token_limit: str | None = field(
        default=None,
        metadata={
            "help": "points of which more than this share of generations ends at the token limit are invalid too: one "
            "number, or task=number pairs separated by commas; default: any share will do"
        },
    )
    draws: int = field(
        default=10_000, metadata={"help": "draws of documents for comparisons with the full model; 0: no intervals"}
    )
    bootstrap: int = field(default=1000, metadata={"help": "draws of documents for intervals"})
    seed: int = field(default=0, metadata={"help": "random seed of these draws"})
    samples: int = field(default=24, metadata={"help": "documents of each task whose texts the page shows"})
