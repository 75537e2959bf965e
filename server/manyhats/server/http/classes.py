"""Classes of texts: vLLM's route, and that of Text Embeddings Inference (TEI)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from manyhats.adapters.heads import TaskKind
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.call import HttpCall
from manyhats.server.http.inputs import RightOnly
from manyhats.server.http.models import note_model
from manyhats.server.http.openai_answers import Spent, UsageBody
from manyhats.server.service.encodings import Encodings
from manyhats.server.service.gate import Gate
from manyhats.server.service.generations import Generations
from manyhats.server.service.prompts import TextPrompt, check_num_inputs
from manyhats.server.service.tasks import Tasks
from manyhats.server.service.text_threads import paced

if TYPE_CHECKING:
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.class_scores import Scored

T = TypeVar("T")


class ClassifyBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/classify``: a text, or several."""

    model: str | None = None
    input: str | list[str]
    request_id: str | None = None
    user: Any = None


class ClassProbabilities(Struct, kw_only=True):
    """What the task says of one text: the likeliest class, and the probability of each."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyAnswer(Struct, kw_only=True):
    """Of each text, in order."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[ClassProbabilities]
    usage: UsageBody


class PredictBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /predict``: a text, a pair of texts, or a list of lists of either, in TEI's form."""

    model: str | None = None
    inputs: str | list[str | list[str]]
    truncate: bool | None = None
    truncation_direction: RightOnly | None = None
    raw_scores: bool | None = None


class Prediction(Struct):
    """One class of a text, and its score."""

    score: float
    label: str


class Classification:
    """Classifies on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def classify(self, call: HttpCall, body: ClassifyBody) -> ClassifyAnswer:
        """``POST /v1/classify`` and ``/classify``: by the task's head, or by the scores of its classes as answers."""
        model = note_model(call, self._gate.backend, body.model, body.request_id)
        texts = [body.input] if isinstance(body.input, str) else body.input
        adapter = Tasks(self._gate.backend).resolved(call)
        generates = adapter is None or adapter.kind is TaskKind.GENERATE
        spent, data = await (self._by_answers if generates else self._by_head)(call, texts)
        call.show_version()
        return ClassifyAnswer(
            id=f"classify-{call.request_id}",
            created=int(time.time()),
            model=model,
            data=data,
            usage=spent.body,
        )

    async def predict(self, call: HttpCall, body: PredictBody) -> list[Prediction] | list[list[Prediction]]:
        """``POST /predict``."""
        note_model(call, self._gate.backend, body.model, reads_header=True)
        inputs = body.inputs
        is_batch = isinstance(inputs, list) and any(isinstance(each, list) for each in inputs)
        given: Sequence[Any] = inputs if is_batch else [inputs]
        check_num_inputs(len(given))
        prompts = [
            _text_or_pair(each, f"inputs[{index}]" if is_batch else "inputs")
            for index, each in enumerate(given)
        ]
        found = await self._encodings.classify(
            call, prompts, raw_scores=bool(body.raw_scores), truncates=bool(body.truncate)
        )
        call.show_version()
        predictions = await self._built(_predictions, found.results)
        return predictions if is_batch else predictions[0]

    async def _by_head(self, call: HttpCall, texts: Sequence[str]) -> tuple[Spent, list[ClassProbabilities]]:
        check_num_inputs(len(texts))
        prompts = [TextPrompt(text, field=f"inputs[{index}]") for index, text in enumerate(texts)]
        found = await self._encodings.classify(call, prompts)
        spent = Spent()
        spent.prompt(found.usage)
        return spent, await self._built(_probabilities, found.results)

    async def _by_answers(
        self, call: HttpCall, texts: Sequence[str]
    ) -> tuple[Spent, list[ClassProbabilities]]:
        generations = Generations(self._gate.backend, self._metrics)
        found = await generations.classify(call, texts)
        spent = Spent()
        for each in found:
            spent.prompt(each.usage)
        return spent, [
            ClassProbabilities(
                index=index,
                label=each.label,
                probs=list(each.probabilities),
                num_classes=len(each.classes),
            )
            for index, each in enumerate(found)
        ]

    async def _built(
        self, build: Callable[[Sequence[Scored]], list[T]], results: Sequence[Scored]
    ) -> list[T]:
        """What ``build`` makes of the classes of texts; of many, off the event loop."""
        num_classes = sum(len(each.classes) for each in results)
        return await self._gate.backend.text_threads.build(partial(build, results), num_classes)

    @property
    def _encodings(self) -> Encodings:
        return Encodings(self._gate.backend, self._metrics)


def _text_or_pair(given: str | list[str], field: str) -> TextPrompt:
    """One text, or two that are read as a pair.

    Raises:
        FieldInvalidError: it is neither, or one of them is empty or too long.
    """
    texts = [given] if isinstance(given, str) else given
    match texts:
        case [text]:
            return TextPrompt(text, field=field)
        case [first, second]:
            TextPrompt(first, field=field)  # is checked as the second is
            return TextPrompt(second, field=field, first=first)
    raise FieldInvalidError(
        field, f"must be a text or a pair of them, not {len(texts)} texts; a batch is a list of lists"
    )


def _probabilities(results: Sequence[Scored]) -> list[ClassProbabilities]:
    return [
        ClassProbabilities(
            index=index,
            label=each.classes[0].label,
            probs=[one.score for one in sorted(each.classes, key=lambda one: one.index)],
            num_classes=len(each.classes),
        )
        for index, each in enumerate(paced(results, lambda each: len(each.classes)))
    ]


def _predictions(results: Sequence[Scored]) -> list[list[Prediction]]:
    return [
        [Prediction(one.score, one.label) for one in each.classes]
        for each in paced(results, lambda each: len(each.classes))
    ]
