"""The options of ``dynamax-lm-eval calibrate``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamax_lm_eval.calibration.testing import BOUNDS, Bound
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.sweep.options import CONFIDENCES, SweepOptions
from dynamax_lm_eval.types import AUTO, DEFAULT_PROPOSE, VERIFY

if TYPE_CHECKING:
    from dynamax_lm_eval.measure.threshold_search import ThresholdPath

METHODS = ("ltt", "crc")
LOSSES = ("consistency", "metric")
LIKENESSES = ("rouge_l", "token_f1", "exact")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class CalibrateOptions:
    """The guarantee that is wanted, the documents that it comes from, and the policy that it is for."""

    backbone: str = field(metadata={"help": "alias (smollm2-gguf, mistral, ...), Hub id, or folder"})
    tasks: str = field(metadata={"help": "one task of the harness; the guarantee holds for documents like its own"})
    output: str = field(metadata={"help": "folder for answers and the certificate; rerun it to continue"})
    tolerance: float = _option(0.1, "bound on the expected loss per document; losses lie in [0, 1]")
    level: float = _option(0.05, "probability that the guarantee fails (method ltt)")
    method: str = _option(
        "ltt", "ltt: learn then test, a bound with probability 1 - level; crc: conformal risk control, a mean"
    )
    bound: str = _option("betting", f"bound of ltt: {', '.join(BOUNDS)}")
    loss: str = _option(
        "consistency",
        "consistency: 1 - similarity to the full model's answer; metric: how much the task's metric falls below the "
        "full model's on the same document, 0 where it does not",
    )
    likeness: str | None = _option(
        None,
        f"similarity of --loss consistency: {', '.join(LIKENESSES)}; default: rouge_l, for choices exact",
    )
    metric: str | None = _option(None, "metric for --loss metric: one of the task's, in [0, 1]; default: its first")
    thresholds: str = _option(
        "0.5:0.95:0.05,0.97,0.99",
        "candidates, tested from the highest mean down: first:last:step and numbers, "
        "separated by commas; 0.9+0.8+0.7 is one for each exit",
    )
    per_exit: str | None = _option(
        None, "file of dynamax-lm-eval exit-thresholds: its thresholds per exit are the candidates instead"
    )
    confidence: str | None = _option(
        None, f"one of {', '.join(CONFIDENCES)}; default: that of --per_exit, else the exits' first"
    )
    propose: float | None = _option(
        None,
        "of a cascade: the classifier's confidence from which on a token is read out; default: that of --per_exit, "
        f"else {DEFAULT_PROPOSE}",
    )
    confirm: str | None = _option(
        None,
        "of a cascade: fitted or read_out, what of the read-out confirms; default: that of --per_exit, else fitted "
        "where the exits have it",
    )
    state_mode: str = _option(
        AUTO, "learned, recompute, copy or skip; auto: learned where the exits have maps of states"
    )
    share: float = _option(0.5, "share of the documents used to calibrate; the others are for the test")
    test: bool = _option(True, "run the certified threshold on the held-out documents as well")
    seed: int = _option(0, "random seed for the draw of documents and the order of bets; choose it before any result")
    limit: int | None = _option(None, "documents of the task in all, drawn by --seed; default: all")
    model_args: str = _option("", "further model arguments: exit_scope=all,repetition_penalty=1.1,...")
    num_fewshot: int | None = _option(None, "examples in the prompt; default: the task's own")
    fewshot_seed: int = _option(
        1234, "random seed for few-shot choice; runs need the same one, and have this by default"
    )
    batch_size: int = _option(32, "sequences processed at once")
    device: str | None = _option(None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    include_path: str | None = _option(None, "folder with tasks of your own")
    metadata: str | None = _option(None, "JSON, or name=value pairs separated by commas, for tasks that take some")
    apply_chat_template: bool = _option(False, "wrap prompts in the tokenizer's chat template")
    system_instruction: str | None = _option(None, "text before every prompt")

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("bound", BOUNDS),
            ("loss", LOSSES),
            ("likeness", (*LIKENESSES, None)),
        ):
            if getattr(self, name) not in choices:
                names = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UserError(f"--{name} must be one of {names}, got {getattr(self, name)!r}")
        for name in ("tolerance", "level", "share"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} must be in (0, 1), got {getattr(self, name):g}")
        for name in ("confidence", "state_mode"):
            if "," in (getattr(self, name) or ""):
                raise UserError(f"--{name} must be one, got {getattr(self, name)!r}; calibrate each")
        if self.state_mode == VERIFY:
            raise UserError("--state_mode verify: the full model's text loses nothing, so there is nothing to certify")
        if self.metric is not None and self.loss != "metric":
            raise UserError("--metric has no effect without --loss metric; add it, or remove --metric")
        if self.likeness is not None and self.loss != "consistency":
            raise UserError("--likeness has no effect without --loss consistency; add it, or remove --likeness")
        if self.limit is not None and self.limit < 2:
            raise UserError(f"--limit must be at least 2, got {self.limit}: one document each to calibrate and to test")
        self.sweep("t", "0.5")  # what it shares with a sweep is checked there

    def of_path(self, path: ThresholdPath) -> CalibrateOptions:
        """Returns these options for the thresholds of ``--per_exit``, which belong to one confidence.

        Raises:
            UserError: another confidence, or another ``propose``, is asked for.
        """
        for name, given, own in (
            ("confidence", self.confidence, path.scorer),
            ("propose", self.propose, path.propose),
            ("confirm", self.confirm, path.confirm),
        ):
            if given is not None and given != own:
                shown = "the classifier alone" if own is None else f"{name} {own}"
                raise UserError(
                    f"--{name} {given} does not fit --per_exit {self.per_exit}, whose thresholds are for {shown}; "
                    f"remove --{name}"
                )
        return replace(self, confidence=path.scorer, propose=path.propose, confirm=path.confirm)

    @property
    def p_values(self) -> Bound:
        """The bound that gives the p-values of ltt."""
        return BOUNDS[BOUNDS.index(self.bound)]

    def sweep(self, folder: str, thresholds: str, samples: str | None = None) -> SweepOptions:
        """Returns the sweep over candidates that these options ask for."""
        return SweepOptions(
            backbone=self.backbone,
            tasks=self.tasks,
            output=str(Path(self.output).expanduser() / folder),
            thresholds=thresholds,
            confidences=self.confidence,
            propose=None if self.propose is None else f"{self.propose:g}",
            confirm=self.confirm,
            state_modes=self.state_mode,
            model_args=self.model_args,
            samples=samples,
            num_fewshot=self.num_fewshot,
            seed=self.fewshot_seed,
            batch_size=self.batch_size,
            noise_rows=0,
            device=self.device,
            include_path=self.include_path,
            metadata=self.metadata,
            apply_chat_template=self.apply_chat_template,
            system_instruction=self.system_instruction,
        )
