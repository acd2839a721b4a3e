"""Certificates: what is guaranteed of a threshold, for which model and task, and whether a run is covered by it.

A certificate is a JSON file. It binds everything that decides what a model answers except the thresholds themselves,
the task with its settings, and the documents that it was made from, which no run may be judged on. Knows
identities as JSON data and the harness's tasks; does not run anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynamax_lm_eval.config import CALIBRATED, DynamaxArgs
from dynamax_lm_eval.errors import UserError, changed_settings
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.lookup import is_shipped
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.files import JsonFormat, checksum, clean_name, short_name
from dynamax_lm_eval.models.aliases import cache_dir
from dynamax_lm_eval.models.fingerprint import Fingerprints

logger = logging.getLogger(__name__)

FORMAT = JsonFormat(
    name="dynamax-certificate",
    version=2,
    what="a certificate of dynamax-lm-eval calibrate",
    remedy="calibrate again: dynamax-lm-eval calibrate ...",
    by_hand=True,
    outdated={
        1: "its test followed the order of the task's documents, which can certify thresholds that lose too much, and "
        "it binds neither the few-shot examples nor all of the weights and the tokenizer"
    },
)

#: Parts of a model's identity that change no answer, or are bound by themselves.
_UNBOUND = frozenset({"degenerate", "policy"})
#: What tells two certificates of one guarantee apart.
_BASIS = ("bound", "measured_by", "seed", "calibration_documents", "candidates", "run", "model")
#: Parts of a policy that a certificate decides.
_DECIDED = frozenset({"thresholds"})


@dataclass(frozen=True)
class Certificate:
    """Thresholds, what they guarantee, and the model, task and documents that this holds for.

    Attributes:
        method: ``ltt`` (learn then test) or ``crc`` (conformal risk control).
        bound: of the p-values; None for crc.
        loss: ``metric`` or ``consistency``.
        measured_by: the metric, or the similarity to the full model's answers.
        tolerance: the most that may be lost per document, in expectation.
        level: probability of a worse threshold; None for crc.
        thresholds: one, or one per exit: the certified candidate that saves the most; [1] where none saves anything.
        candidates: all thresholds of the grid, in the order of testing.
        certified: how many of them, from the first on, the guarantee holds for.
        scores: p-value (ltt) or bound (crc) of those that were looked at.
        losses: mean loss of every candidate on the calibration documents.
        reductions: compute_reduction of every candidate on the calibration documents.
        compute_reduction: of ``thresholds`` on the calibration documents: what to expect.
        task: the task's name.
        run: settings of the task, see :func:`run_settings`.
        model: what of the model is bound, see :func:`binding`.
        fingerprint: of the backbone's weight files.
        seed: of the split into documents for calibration and for tests, and of the order of bets.
        population: how many different documents the calibration documents were drawn from.
        calibration_documents: their hashes.
        test: what the thresholds did on the documents that were held out; None where that was not run.
        created: date, for people.
        version: of this package.
    """

    method: str
    bound: str | None
    loss: str
    measured_by: str
    tolerance: float
    level: float | None
    thresholds: list[float]
    candidates: list[list[float]]
    certified: int
    scores: list[float]
    losses: list[float]
    reductions: list[float]
    compute_reduction: float
    task: str
    run: dict[str, Any]
    model: dict[str, Any]
    fingerprint: str
    seed: int
    population: int
    calibration_documents: list[str] = field(repr=False)
    test: dict[str, Any] | None
    created: str
    version: str

    @property
    def guarantee(self) -> str:
        """The guarantee in words."""
        lost = f"the expected {self.loss} loss ({self.measured_by}) per document is at most {self.tolerance:g}"
        if self.level is None:
            return f"{lost}, averaged over calibration samples"
        return f"with probability {1 - self.level:g} over calibration samples, {lost}"

    @property
    def certifies_exits(self) -> bool:
        """Says whether anything may exit; nothing may where no candidate passed, or none of them saves."""
        return any(threshold < 1 for threshold in self.thresholds)

    def to_json(self) -> dict[str, Any]:
        return {"promise": self.guarantee, **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """Returns the certificate for result files, with a count in place of the documents."""
        data = {"format": FORMAT.name, "format_version": FORMAT.version, **self.to_json()}
        data["calibration_documents"] = len(self.calibration_documents)
        return data

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Reads a certificate.

        Raises:
            UserError: the file is missing, damaged, or no certificate.
        """
        called = f"threshold={str(path)!r}"
        data = FORMAT.read(path, called)
        data.pop("promise", None)
        try:
            certificate = cls(**data)
            tuple(float(threshold) for threshold in certificate.thresholds)
        except (TypeError, ValueError) as error:
            raise UserError(f"{called} is damaged ({error}); {FORMAT.remedy}") from error
        return certificate

    def save(self, path: Path) -> None:
        FORMAT.write(path, self.to_json())

    def check_policy(self, policy: Mapping[str, Any]) -> None:
        """Compares a policy (``ExitPolicy.describe``) with the certified one, thresholds aside.

        Raises:
            UserError: it is another.
        """
        self._check(_policy_binding(policy), {name for name in self.model if name.startswith("policy.")})

    def check_model(self, identity: Mapping[str, Any]) -> None:
        """Compares the whole identity (``DynamaxLM.identity``) with the certified one, thresholds aside.

        Raises:
            UserError: it is another.
        """
        self._check(binding(identity), set(self.model))

    def _check(self, now: Mapping[str, Any], names: Iterable[str]) -> None:
        stored = {name: self.model.get(name) for name in {*names, *now}}
        if changed := changed_settings(stored, _as_json(now)):
            raise UserError(
                f"this certificate was made for another model or policy, it differs in {changed}; give the same "
                "arguments as in calibration, or calibrate for these: dynamax-lm-eval calibrate ..."
            )

    def check_task(self, name: str, run: Mapping[str, Any], documents: Sequence[str], any_task: bool) -> bool:
        """Says whether the guarantee holds for these documents (hashes) of a task.

        Raises:
            UserError: the task or its settings are others (unless ``any_task``), or documents are among those that
                the threshold was chosen on.
        """
        used = set(self.calibration_documents).intersection(documents)
        if used:
            raise UserError(
                f"{len(used)} of the {len(documents)} documents of {name} are among those that this threshold was "
                "chosen on; evaluate others: --samples test_samples.json, which calibrate wrote beside its certificate"
            )
        changed = "" if name == self.task else f"task ({self.task!r}, now {name!r})"
        changed = changed or changed_settings(self.run, _as_json(run))
        if changed and not any_task:
            raise UserError(
                f"this certificate guarantees nothing here: it differs in {changed}; calibrate on {name}, or add "
                "certificate_any_task=true to use its thresholds without a guarantee"
            )
        if changed:
            logger.warning("No guarantee for %s: the certificate differs in %s", name, changed)
        return not changed


class CertifiedRun:
    """A run whose thresholds come from a certificate."""

    def __init__(self, path: Path, certificate: Certificate, any_task: bool) -> None:
        """Logs what the certificate guarantees.

        ``any_task``: other tasks than the certificate's may be run, without a guarantee.
        """
        self.path = path
        self.certificate = certificate
        self._any_task = any_task
        self._guaranteed: dict[str, bool] = {}
        logger.info("%s: thresholds %s; %s", path, certificate.thresholds, certificate.guarantee)
        if not certificate.certifies_exits:
            logger.warning("%s certifies no exit: this run is the full model", path)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the certificate: one, or one per exit."""
        return tuple(self.certificate.thresholds)

    def check_tasks(self, settings: Mapping[str, Mapping[str, Any]], documents: Callable[[str], Sequence[str]]) -> None:
        """Takes note of the tasks that the guarantee holds for.

        Args:
            settings: of each task, see :func:`run_settings`.
            documents: gives the hashes of a task's documents.

        Raises:
            UserError: the certificate does not allow a task.
        """
        self._guaranteed = {
            name: self.certificate.check_task(name, run, documents(name), self._any_task)
            for name, run in settings.items()
        }

    def describe(self) -> dict[str, Any]:
        """Returns for result files the certificate and what it guarantees of this run."""
        return {"path": str(self.path), "guarantee": self._guaranteed, **self.certificate.summary()}


def binding(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a model's identity that a certificate depends on, flat."""
    bound = {name: value for name, value in identity.items() if name not in _UNBOUND}
    return dict(_as_json({**bound, **_policy_binding(identity["policy"])}))


def _policy_binding(policy: Mapping[str, Any]) -> dict[str, Any]:
    return {f"policy.{name}": value for name, value in policy.items() if name not in _DECIDED}


def run_settings(
    task: Any, apply_chat_template: Any, system_instruction: str | None, fewshot_as_multiturn: bool | None
) -> dict[str, Any]:
    """Returns the settings of a task's run that decide its documents' losses.

    Call it when the harness has seeded the task's sampler of few-shot examples and has drawn none.
    """
    config = task.config
    count = config.num_fewshot or 0
    return dict(
        _as_json(
            {
                "num_fewshot": count,
                **_fewshot(task, count),
                # Without a chat template the harness joins all turns to one text.
                "fewshot_as_multiturn": bool(fewshot_as_multiturn) if apply_chat_template else None,
                "output_type": config.output_type,
                "generation_kwargs": config.generation_kwargs,
                "version": getattr(task, "VERSION", None),
                "apply_chat_template": apply_chat_template or False,
                "system_instruction": system_instruction,
            }
        )
    )


def _fewshot(task: Any, count: int) -> dict[str, str | None]:
    """Returns what tells one choice of few-shot examples from another.

    ``fewshot_examples`` is a digest of those that a first prompt would show, and ``fewshot_draw`` one of the generator
    that draws them, as the harness's few-shot seed left it; None where nothing is drawn and the seed is free.
    """
    if count == 0:
        return {"fewshot_examples": None, "fewshot_draw": None}
    sampler: Any = getattr(task, "sampler", None)
    if not type(sampler).__module__.startswith("lm_eval."):
        # A task that draws by its own means, which one more draw might change: only its seed can be told.
        generator = getattr(sampler, "rnd", None) or getattr(task, "fewshot_rnd", None)
        return {"fewshot_examples": None, "fewshot_draw": _digest(repr(generator and generator.getstate()))}
    generator = sampler.rnd
    before = generator.getstate()
    examples = json.dumps(list(sampler.sample(count)), sort_keys=True, default=str)
    draws = generator.getstate() != before
    generator.setstate(before)
    return {"fewshot_examples": _digest(examples), "fewshot_draw": _digest(repr(before)) if draws else None}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(certificate: Certificate, scorer: str, state_mode: str) -> str:
    """Returns a name that says what a certificate is for; another guarantee on the same task has another name."""
    guarantee = [certificate.method, certificate.loss, f"{certificate.tolerance:g}"]
    guarantee += [f"{certificate.level:g}"] if certificate.level is not None else []
    # One that rests on other documents or candidates stands beside it: a run must not lose the one that it names.
    basis = {name: getattr(certificate, name) for name in _BASIS}
    guarantee.append(checksum(_as_json(basis))[:6])
    return short_name("-".join([certificate.task, scorer, state_mode, *guarantee])) + ".json"


def directory(backbone: str, fingerprint: str, exits: ExitCheckpoint | None) -> Path:
    """Returns where certificates of a backbone are kept: beside its exits, or else among the user's own files."""
    return _directories(backbone, fingerprint, exits)[0]


def _directories(backbone: str, fingerprint: str | None, exits: ExitCheckpoint | None) -> list[Path]:
    """Returns where certificates of a backbone can be; without ``fingerprint``, those of all backbones of its name."""
    if exits is not None and not is_shipped(exits) and os.access(exits.path, os.W_OK):
        return [exits.path / "certificates"]
    name = clean_name(Path(backbone).name)
    own = cache_dir() / "certificates"
    return [own / f"{name}-{fingerprint[:12]}"] if fingerprint is not None else sorted(own.glob(f"{name}-*"))


def for_run(
    args: DynamaxArgs,
    policy_for: Callable[[DynamaxArgs], ExitPolicy],
    fingerprints: Fingerprints | None,
    exits: ExitCheckpoint | None,
) -> CertifiedRun | None:
    """Returns the certificate that a run's arguments name, if they name one.

    Args:
        args: of the run.
        policy_for: gives the policy that arguments mean for the backbone.
        fingerprints: of the backbone's weight files; None where they are not known yet.
        exits: trained exits at hand.

    Raises:
        UserError: as :func:`find_certificate`.
    """
    if args.certificate is None:
        return None
    policy, fingerprint = policy_for(args).describe(), None if fingerprints is None else fingerprints.current
    path, certificate = find_certificate(args.certificate, args.backbone, fingerprint, exits, policy)
    return CertifiedRun(path, certificate, args.certificate_any_task)


def find_certificate(
    named: str, backbone: str, fingerprint: str | None, exits: ExitCheckpoint | None, policy: Mapping[str, Any]
) -> tuple[Path, Certificate]:
    """Returns the certificate that ``threshold=`` names: a file, or for ``calibrated`` the one of this policy.

    Args:
        named: as the user gave it.
        backbone: as the user gave it.
        fingerprint: of the backbone's weight files; None where it is not known before the weights load.
        exits: trained exits at hand.
        policy: as ``ExitPolicy.describe`` gives it; thresholds do not matter.

    Raises:
        UserError: there is none, or several, or it is for another policy.
    """
    if named != CALIBRATED:
        path = Path(named).expanduser()
        certificate = Certificate.load(path)
        certificate.check_policy(policy)
        return path, certificate
    fitting, reasons = [], []
    for path in (
        path for folder in _directories(backbone, fingerprint, exits) for path in sorted(folder.glob("*.json"))
    ):
        try:
            certificate = Certificate.load(path)
        except UserError as error:  # it must not stand in the way of one that was made since
            logger.warning("%s", error)
            reasons.append(str(error))
            continue
        if fingerprint not in (None, certificate.fingerprint):
            continue
        try:
            certificate.check_policy(policy)
        except UserError as error:
            reasons.append(f"{path.name}: {error}")
        else:
            fitting.append((path, certificate))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(str(path) for path, _ in fitting)
        raise UserError(f"threshold={CALIBRATED}: several certificates fit, name one: threshold=FILE with {names}")
    reason = reasons[0] if reasons else "none was made for this backbone; run dynamax-lm-eval calibrate"
    raise UserError(f"threshold={CALIBRATED}: there is no certificate that fits. {reason}")


def _as_json(data: Any) -> Any:
    """Returns data as they will be when read back."""
    return json.loads(json.dumps(data, sort_keys=True, default=str))
