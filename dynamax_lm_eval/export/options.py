"""The options of ``dynamax-lm-eval export``."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamax_lm_eval.errors import UserError

FORMATS = ("csv", "parquet", "hf-eval-results", "model-index", "eee")
#: Whether who evaluates is who made the model, in the words of Every Eval Ever.
RELATIONSHIPS = ("first_party", "third_party", "collaborative", "other")


@dataclass(frozen=True)
class ExportOptions:
    """Result files, and the format that they are wanted in."""

    folder: str = field(metadata={"help": "folder that runs or sweeps wrote (--output_path, --output)"})
    format: str = field(
        metadata={
            "help": "csv or parquet: one table, a row per operating point, task and metric; hf-eval-results: files for "
            "the Hub's .eval_results; model-index: metadata for a model card; eee: records of Every Eval Ever, by its "
            "own package"
        }
    )
    output: str | None = field(default=None, metadata={"help": "where to write; default: export-FORMAT in the folder"})
    organization: str | None = field(default=None, metadata={"help": "eee: who evaluated"})
    relationship: str = field(
        default="third_party", metadata={"help": f"eee: of them to the model's makers: {', '.join(RELATIONSHIPS)}"}
    )

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.relationship not in RELATIONSHIPS:
            raise UserError(f"--relationship must be one of {', '.join(RELATIONSHIPS)}, got {self.relationship!r}")
        if self.format == "eee" and not self.organization:
            raise UserError("--format eee needs --organization, who evaluated")
        if self.format != "eee" and self.organization is not None:
            raise UserError(f"--organization has no effect with --format {self.format}; remove it")
