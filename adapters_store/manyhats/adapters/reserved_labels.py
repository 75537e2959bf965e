"""Labels of a version that the server reads.

``default.*`` says what holds for fields that callers leave out, ``class.0``, ``class.1``, … are the classes that its
task tells apart, ``classify.*`` how a text is put to it, or how its head's logits become scores, and ``embed.pooling``
what makes a text's vector. ``share`` and ``limit.*`` say what a task may take of a busy server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.heads import Pooling, ScoreActivation

DEFAULT = "default."
STOP = "default.stop."
CLASS = "class."
SYSTEM = "classify.system"
ACTIVATION = "classify.activation"
POOLING = "embed.pooling"
SHARE = "share"
MAX_CONCURRENCY = "limit.concurrency"
MAX_TOKENS_PER_SECOND = "limit.tokens_per_second"
MAX_CLASSES = 256

_EMBED = "embed."
_CLASSIFY = "classify."
_PROMPT = "classify.prompt"
_CHAT, _TEXT = "chat", "text"
_LIMIT = "limit."
_LARGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes that a task tells apart, as answers to a text.

    Attributes:
        texts: the answers, in order.
        is_chat: whether the text is a user's message in the chat template; otherwise it is the whole prompt.
        system: a system message before it; empty for none.
    """

    texts: tuple[str, ...]
    is_chat: bool = True
    system: str = ""

    def labels(self) -> dict[str, str]:
        """The labels that say so."""
        said = numbered(CLASS, self.texts)
        if not self.is_chat:
            said[_PROMPT] = _TEXT
        if self.system:
            said[SYSTEM] = self.system
        return said


@dataclass(frozen=True, slots=True)
class Entitlement:
    """How much of a server a task may take while others want it, and at all.

    Attributes:
        share: its weight: of two tasks that both wait, one of share 2 is served twice as many tokens as one of share 1.
        max_concurrency: how many of its sequences run at a time; None for as many as there is room for.
        max_tokens_per_second: of prompts and answers together, on average; None for no limit.
    """

    share: float = 1.0
    max_concurrency: int | None = None
    max_tokens_per_second: float | None = None


EQUAL = Entitlement()
"""That of a task whose labels say nothing, and of the base model."""


def read_classes(labels: Mapping[str, str]) -> Classes | None:
    """The classes among a version's labels; None if it has none.

    Raises:
        ArgumentInvalidError: they are not numbered in order, too many, empty or the same, or it is not known how a text
            is put or how scores are made; names the label.
    """
    for key in labels:
        if key.startswith(_CLASSIFY) and key not in (_PROMPT, SYSTEM, ACTIVATION):
            raise label_error(key, f"is not known; these are: {_PROMPT}, {SYSTEM}, {ACTIVATION}")
    read_activation(labels)
    texts = listed(labels, CLASS)
    prompt, system = labels.get(_PROMPT, _CHAT), labels.get(SYSTEM, "")
    if prompt not in (_CHAT, _TEXT):
        raise label_error(_PROMPT, f"must be {_CHAT} or {_TEXT}, not {prompt!r}")
    if system and prompt == _TEXT:
        raise label_error(SYSTEM, f"does not apply to a prompt that is {_TEXT}")
    if not texts:
        unused = next((key for key in (_PROMPT, SYSTEM) if key in labels), None)
        if unused is not None:
            raise label_error(unused, f"needs classes: {CLASS}0, {CLASS}1, …")
        return None
    _check_classes(texts)
    return Classes(texts, prompt == _CHAT, system)


def read_activation(labels: Mapping[str, str]) -> ScoreActivation | None:
    """How a version's labels say that logits become scores; None if they do not.

    Raises:
        ArgumentInvalidError: it is not known; names the label.
    """
    given = labels.get(ACTIVATION)
    known = {each.value: each for each in ScoreActivation}
    if given is not None and given not in known:
        raise label_error(ACTIVATION, f"must be one of {', '.join(known)}, not {given!r}")
    return None if given is None else known[given]


def read_pooling(labels: Mapping[str, str]) -> Pooling | None:
    """What makes a text's vector, as a version's labels say; None if they do not.

    Raises:
        ArgumentInvalidError: it is not known; names the label.
    """
    for key in labels:
        if key.startswith(_EMBED) and key != POOLING:
            raise label_error(key, f"is not known; this is: {POOLING}")
    given = labels.get(POOLING)
    known = {each.value: each for each in Pooling if each is not Pooling.ALL}
    if given is not None and given not in known:
        raise label_error(POOLING, f"must be one of {', '.join(known)}, not {given!r}")
    return None if given is None else known[given]


def class_names(labels: Mapping[str, str], count: int) -> tuple[str, ...]:
    """The names of a head's outputs: ``LABEL_0``, ``LABEL_1``, … unless a version's labels give them others."""
    return listed(labels, CLASS) or tuple(f"LABEL_{index}" for index in range(count))


def read_entitlement(labels: Mapping[str, str]) -> Entitlement:
    """What a version's labels say of it.

    Raises:
        ArgumentInvalidError: a number is out of range or none, or a limit is not known; names the label.
    """
    for key in labels:
        if key.startswith(_LIMIT) and key not in (MAX_CONCURRENCY, MAX_TOKENS_PER_SECOND):
            raise label_error(key, f"is not known; these are: {MAX_CONCURRENCY}, {MAX_TOKENS_PER_SECOND}")
    if not (SHARE in labels or MAX_CONCURRENCY in labels or MAX_TOKENS_PER_SECOND in labels):
        return EQUAL
    concurrency = _number(labels, MAX_CONCURRENCY, 1)
    if concurrency is not None and concurrency != int(concurrency):
        raise label_error(MAX_CONCURRENCY, f"must be a whole number, not {labels[MAX_CONCURRENCY]!r}")
    return Entitlement(
        share=_number(labels, SHARE, 0.001) or 1.0,
        max_concurrency=None if concurrency is None else int(concurrency),
        max_tokens_per_second=_number(labels, MAX_TOKENS_PER_SECOND, 1),
    )


def _number(labels: Mapping[str, str], key: str, least: float) -> float | None:
    if key not in labels:
        return None
    try:
        value = float(labels[key])
    except ValueError:
        value = math.nan
    if not least <= value <= _LARGEST:
        raise label_error(key, f"must be a number from {least:g} to {_LARGEST:,}, not {labels[key]!r}")
    return value


def _check_classes(texts: tuple[str, ...]) -> None:
    if len(texts) > MAX_CLASSES:
        raise ArgumentInvalidError("labels", f"must have at most {MAX_CLASSES} classes, not {len(texts)}")
    seen: dict[str, int] = {}
    for number, text in enumerate(texts):
        if not text:
            raise label_error(f"{CLASS}{number}", "must not be empty")
        if text in seen:
            raise label_error(f"{CLASS}{number}", f"is the same as {CLASS}{seen[text]}")
        seen[text] = number


def numbered(prefix: str, values: Iterable[str]) -> dict[str, str]:
    """A list as labels: ``{"default.stop.0": "a", "default.stop.1": "b"}``."""
    return {f"{prefix}{number}": value for number, value in enumerate(values)}


def listed(labels: Mapping[str, str], prefix: str) -> tuple[str, ...]:
    """The list that labels have under a prefix, in the order of their numbers; empty if they have none.

    Raises:
        ArgumentInvalidError: they are not numbered 0, 1, 2, … without a gap; names the label.
    """
    found = [key for key in labels if key.startswith(prefix)]
    expected = {f"{prefix}{number}" for number in range(len(found))}
    for key in found:
        if key not in expected:
            raise label_error(
                key, f"the {len(found)} labels {prefix}N must be numbered from 0 to {len(found) - 1}"
            )
    return tuple(labels[f"{prefix}{number}"] for number in range(len(found)))


def label_error(key: str, description: str) -> ArgumentInvalidError:
    """What is wrong with one label."""
    return ArgumentInvalidError(f"labels[{key}]", description)
