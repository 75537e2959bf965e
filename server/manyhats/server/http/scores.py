"""Log-probabilities of continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, Struct, UnsetType

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.call import HttpCall
from manyhats.server.http.models import note_model
from manyhats.server.http.openai_answers import Spent, TokenLogprob, TokenNames, UsageBody
from manyhats.server.http.openai_messages import Message, conversation
from manyhats.server.service.gate import Gate
from manyhats.server.service.generations import Generations
from manyhats.server.service.merging import each_of
from manyhats.server.service.prompts import Prompt, TextPrompt, TokenPrompt, check_continuations

if TYPE_CHECKING:
    from manyhats.engine.output import ScoredContinuation, ScoreOutput
    from manyhats.server.observability.metrics import Metrics

MAX_ITEMS = 256
_AT_ONCE = 8  # further items wait; the engine's queue is everybody's


class ScoreBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/score``: continuations of a prompt; or items of a query, as SGLang scores them."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    continuations: list[str | list[int]] | None = None
    logprobs: bool | None = None
    query: str | list[int] | None = None
    items: str | list[str | int | list[int]] | None = None
    label_token_ids: list[int] | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    user: Any = None


class Score(Struct, kw_only=True):
    """The log-probability of a continuation, in nats, and of each of its tokens if wanted."""

    logprob: float
    num_tokens: int
    tokens: list[TokenLogprob] | UnsetType = UNSET


class ScoreAnswer(Struct, kw_only=True):
    """The scores of continuations, in order."""

    object: str = "list"
    model: str
    scores: list[Score]
    usage: UsageBody


class ItemScores(Struct, kw_only=True):
    """For each item, the probability of each label as the next token."""

    object: str = "scoring"
    model: str
    scores: list[list[float]]
    usage: UsageBody


class Scores:
    """Scores on the backend behind the gate."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def score(self, call: HttpCall, body: ScoreBody) -> ScoreAnswer | ItemScores:
        """``POST /v1/score``."""
        model = note_model(call, self._gate.backend, body.model, body.request_id)
        if body.items is not None:
            return await self._items(call, body, model)
        if body.query is not None or body.label_token_ids is not None:
            raise FieldInvalidError("items", "is required with query and label_token_ids")
        prompt, continuations = await self._gate.backend.text_threads.read(
            lambda: (_prompt(body), _continuations(body.continuations or ())), call.num_bytes
        )
        output, names = await self._scored(call, body, prompt, continuations)
        spent = Spent()
        spent.prompt(output.usage)
        build = partial(_answer, body, output, names, model, spent)
        num_tokens = sum(len(each.tokens) for each in output.scores)
        return await self._gate.backend.text_threads.build(build, num_tokens)

    async def _scored(
        self,
        call: HttpCall,
        body: ScoreBody,
        prompt: Prompt,
        continuations: Sequence[TextPrompt | TokenPrompt],
        number: int = 0,
    ) -> tuple[ScoreOutput, TokenNames]:
        asked = await self._generations.score_request(
            call, prompt, continuations, cache_salt=body.cache_salt or "", priority=-(body.priority or 0)
        )
        if asked.adapter is not None:
            call.headers["x-manyhats-version"] = asked.adapter.name
        output = await self._generations.score(call, replace(asked, id=f"{asked.id}-{number}"))
        return output, TokenNames(asked.tokenizer or self._gate.backend.tokenizer)

    async def _items(self, call: HttpCall, body: ScoreBody, model: str) -> ItemScores:
        if body.prompt is not None or body.messages is not None or body.continuations is not None:
            raise FieldInvalidError("items", "come with query and label_token_ids alone")
        if not body.label_token_ids:
            raise FieldInvalidError("label_token_ids", "is required with items")
        prompts = _item_prompts(body)
        labels = [TokenPrompt([each], field="label_token_ids") for each in body.label_token_ids]
        check_continuations([""] * len(labels))

        async def one(number: int) -> ScoreOutput:
            return (await self._scored(call, body, prompts[number], labels, number))[0]

        outputs = await each_of(one, len(prompts), at_once=_AT_ONCE)
        spent = Spent()
        for output in outputs:
            spent.prompt(output.usage)
        scores = [_probabilities(output.scores, bool(body.apply_softmax)) for output in outputs]
        return ItemScores(model=model, scores=scores, usage=spent.body)

    @property
    def _generations(self) -> Generations:
        return Generations(self._gate.backend, self._metrics)


def _prompt(body: ScoreBody) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise FieldInvalidError("prompt", "exactly one of prompt and messages must be given")
    if body.messages is not None:
        return conversation(body)
    return _text_or_ids(body.prompt or "", body, "prompt")


def _text_or_ids(given: str | list[int], body: ScoreBody, field: str) -> TextPrompt | TokenPrompt:
    if isinstance(given, str):
        return TextPrompt(given, add_special_tokens=body.add_special_tokens is not False, field=field)
    return TokenPrompt(given, field=field)


def _continuations(given: Sequence[str | list[int]]) -> list[TextPrompt | TokenPrompt]:
    check_continuations([each if isinstance(each, str) else "" for each in given])
    return [
        TextPrompt(each, add_special_tokens=False, field=f"continuations[{index}]")
        if isinstance(each, str)
        else TokenPrompt(each, field=f"continuations[{index}]")
        for index, each in enumerate(given)
    ]


def _item_prompts(body: ScoreBody) -> list[TextPrompt | TokenPrompt]:
    """The query with each item, texts with texts and token ids with token ids."""
    items: list[Any] = [body.items] if isinstance(body.items, str) else body.items or []
    if items and all(isinstance(each, int) for each in items):
        items = [items]
    if not 1 <= len(items) <= MAX_ITEMS:
        raise FieldInvalidError("items", f"must have 1 to {MAX_ITEMS}, not {len(items)}")
    query: Any = body.query if body.query is not None else "" if isinstance(items[0], str) else []
    prompts: list[TextPrompt | TokenPrompt] = []
    for index, item in enumerate(items):
        if type(item) is not type(query):
            raise FieldInvalidError(f"items[{index}]", "must be a text or token ids, as the query is")
        whole = item + query if body.item_first else query + item
        prompts.append(_text_or_ids(whole, body, f"items[{index}]"))
    return prompts


def _answer(body: ScoreBody, output: ScoreOutput, names: TokenNames, model: str, spent: Spent) -> ScoreAnswer:
    scores = [
        Score(
            logprob=each.logprob,
            num_tokens=len(each.tokens),
            tokens=(names.chat(each.tokens, 0).content) if body.logprobs else UNSET,
        )
        for each in output.scores
    ]
    return ScoreAnswer(model=model, scores=scores, usage=spent.body)


def _probabilities(scores: Sequence[ScoredContinuation], applies_softmax: bool) -> list[float]:
    """Of each label, among all tokens or among the labels."""
    logprobs = [each.logprob for each in scores]
    if not applies_softmax:
        return [math.exp(each) for each in logprobs]
    largest = max(logprobs)
    weights = [math.exp(each - largest) for each in logprobs]
    return [each / sum(weights) for each in weights]
