"""From the trainer's output to a running server: the artifact becomes a version, active if it is good enough."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.registration import check_labels
from manyhats.adapters.reserved_labels import DEFAULT, Classes
from manyhats.client import Client, Credentials, ManyhatsError, Progress, Registration, ServerInfo
from manyhats.trainer.data.contents import PromptForm
from manyhats.trainer.data.head_task import HeadTask
from manyhats.trainer.errors import RegistrationError, SettingError
from manyhats.trainer.report.report import Evaluation
from manyhats.trainer.settings.settings import TrainSettings

_SETTING = "activate_if"
_METRICS: Mapping[str, Callable[[Evaluation], float | None]] = {
    "loss": lambda evaluation: evaluation.after.loss,
    "perplexity": lambda evaluation: _perplexity(evaluation.after.loss),
    **{
        name: partial(lambda name, evaluation: evaluation.metrics(evaluation.after).get(name), name)
        for name in ("accuracy", "f1", "mrr", "pearson")
    },
}
_OF_HEADS: Mapping[str, frozenset[str]] = {
    "none": frozenset(("loss", "perplexity", "accuracy")),
    "classification": frozenset(("loss", "accuracy", "f1", "pearson")),
    "tokens": frozenset(("loss", "accuracy", "f1")),
    "embedding": frozenset(("loss", "accuracy", "mrr")),
}
_FRACTIONS = ("accuracy", "f1", "mrr")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(
    r"\s*([A-Za-z_]\w*)\s*(>=|<=|>|<)\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(%?)\s*", re.ASCII
)
_FORM = "must be METRIC OPERATOR NUMBER, as in 'accuracy >= 0.9'; join several with 'and'"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationServer:
    """A server that takes artifacts.

    Attributes:
        target: ``host:port``.
        credentials: what it requires of callers; None for none.
        timeout_s: for each call; None waits indefinitely.
    """

    target: str
    credentials: Credentials | None = None
    timeout_s: float | None = None

    def info(self) -> ServerInfo:
        """The server's own description.

        Raises:
            ManyhatsError: it cannot be reached, or does not answer.
        """
        with self._client() as client:
            return client.server_info()

    def register(
        self,
        task: str,
        directory: Path,
        progress: Progress | None = None,
        *,
        activate: bool = True,
        labels: Mapping[str, str] | None = None,
    ) -> Registration:
        """Upload the artifact in a directory as a version of a task.

        Uploading the same artifact again makes no new version.

        Args:
            task: its id.
            directory: the trainer's output; its config and safetensors are sent.
            progress: called with the bytes sent, and the total.
            activate: whether requests for the task use it from now on.
            labels: kept with the version.

        Raises:
            RegistrationError: the server cannot be reached, or refuses it. The directory is unchanged.
        """
        try:
            with self._client() as client:
                return client.upload_adapter(
                    task, directory, activate=activate, labels=labels, progress=progress
                )
        except ManyhatsError as error:
            raise RegistrationError(task, directory, self.target, str(error)) from error

    def _client(self) -> Client:
        return Client(self.target, timeout_s=self.timeout_s, credentials=self.credentials)


def version_labels(evaluation: Evaluation | None) -> dict[str, str]:
    """The labels to register a version with, for a task that answers with labels; none for others.

    It answers greedily, and no longer than a label: a caller that sets no temperature would get random labels where 1
    is usual. Its labels are its classes, unless ``why_no_classes`` says otherwise.
    """
    if evaluation is None or not evaluation.labels:
        return {}
    classes = {} if why_no_classes(evaluation) else _classes(evaluation)
    return {
        f"{DEFAULT}temperature": "0",
        f"{DEFAULT}max_tokens": str(evaluation.label_tokens),
        **classes,
    }


def head_labels(task: HeadTask) -> dict[str, str]:
    """The labels to register a version with a head with: its outputs' names and how they are scores, or its pooling.

    Empty if a server would not take them, see ``why_no_names``.
    """
    return {} if why_no_names(task) else task.labels


def why_no_names(task: HeadTask) -> str:
    """Why the outputs of a head are registered without their names; empty if they are not."""
    try:
        check_labels(task.labels)
    except ArgumentInvalidError as error:
        return str(error)
    return ""


def why_no_classes(evaluation: Evaluation | None) -> str:
    """Why a task that answers with labels is registered without classes; empty if it is not."""
    if evaluation is None or not evaluation.labels:
        return ""
    if evaluation.form is None:
        return "its prompts are made in several ways, or of more than one text"
    if len(evaluation.labels) == 1:
        return "labels: there is only one"
    try:
        check_labels(_classes(evaluation))
    except ArgumentInvalidError as error:
        return str(error)
    return ""


def _classes(evaluation: Evaluation) -> dict[str, str]:
    form = evaluation.form or PromptForm(is_chat=True)
    return Classes(evaluation.labels, form.is_chat, form.system).labels()


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """``metric operator number``, as in ``accuracy >= 0.9``."""

    metric: str
    operator: str
    number: float

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.number:g}"

    def is_met(self, evaluation: Evaluation) -> bool:
        """Whether the trained model meets it; never if the metric is missing or NaN."""
        value = self.value(evaluation)
        return value is not None and _OPERATORS[self.operator](value, self.number)

    def value(self, evaluation: Evaluation) -> float | None:
        """The value of its metric."""
        return _METRICS[self.metric](evaluation)


@dataclass(frozen=True, slots=True)
class ActivationRule:
    """Conditions that must all be met."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str) -> ActivationRule:
        """Parse ``accuracy >= 0.9 and loss < 1.5``. See ``_OF_HEADS`` for the metrics.

        Raises:
            SettingError: it is not of that form, names another metric, or can never be met.
        """
        return cls(tuple(_condition(part) for part in re.split(r"\band\b", text)))

    def __str__(self) -> str:
        return " and ".join(str(each) for each in self.conditions)

    def check(self, settings: TrainSettings) -> None:
        """Check before training that it will have the results the conditions need.

        Raises:
            SettingError: it will not have one.
        """
        head = settings.head.kind
        for each in self.conditions:
            if each.metric not in _OF_HEADS[head]:
                known = ", ".join(sorted(_OF_HEADS[head]))
                raise SettingError(
                    _SETTING, f"{each.metric} is not measured with head {head}; these are: {known}"
                )
            if not settings.data.eval:
                raise SettingError(
                    _SETTING,
                    f"{each.metric} is measured on evaluation data, and {settings.task} has none (eval)",
                )
            if each.metric == "accuracy" and not (settings.data.labels or settings.head.reads):
                raise SettingError(
                    _SETTING, f"accuracy is measured on labels, and {settings.task} has none (labels)"
                )

    def unmet(self, evaluation: Evaluation | None) -> str:
        """What the trained model falls short of, as in ``accuracy 0.8125, not >= 0.9``; empty if nothing."""
        if evaluation is None:
            return "no data was held out"
        return " and ".join(
            f"{each.metric} {_shown(each.value(evaluation))}, not {each.operator} {each.number:g}"
            for each in self.conditions
            if not each.is_met(evaluation)
        )


def _condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise SettingError(_SETTING, f"{_FORM}, not {text.strip()!r}")
    metric, sign, digits, percent = match.groups()
    if metric not in _METRICS:
        near = difflib.get_close_matches(metric.lower(), _METRICS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingError(_SETTING, f"{metric!r} is not a metric; these are: {', '.join(_METRICS)}{hint}")
    try:
        number = float(digits) / (100 if percent else 1)
    except ValueError as error:
        raise SettingError(_SETTING, f"{digits!r} is not a number") from error
    if not math.isfinite(number):
        raise SettingError(_SETTING, f"{digits!r} is too large")
    if metric in _FRACTIONS and not 0 <= number <= 1:
        raise SettingError(
            _SETTING, f"{metric} is a fraction from 0 to 1, or a percentage with %, not {digits}{percent}"
        )
    return Condition(metric=metric, operator=sign, number=number)


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
