"""Classification by a served task: the trainer's accuracy, its scores, its tokens; and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.reserved_labels import Classes
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.errors import FieldInvalidError, ModelError, NumericalError, PromptTooLongError
from manyhats.engine.output import ScoredContinuation, ScoreOutput, TokenOutput, Usage
from manyhats.engine.request import ScoreRequest
from manyhats.engine.text.chat_template import ChatMessage, Rendering
from manyhats.engine.text.ending import find_ends
from manyhats.engine.text.prompt_text import ScoreTokens
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.server.access.tokens import EVERYBODY
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.call import Call
from manyhats.server.service.classification import Classified, classified
from manyhats.server.service.conversations import ChatPrompt
from manyhats.server.service.generations import Generations
from manyhats.server.service.prompts import Encoder, TextPrompt
from manyhats.server.service.text_threads import TextThreads
from manyhats.trainer.data.labels import labelled_items
from manyhats.trainer.data.task_data import read_task_data
from manyhats.trainer.registration import version_labels
from manyhats.trainer.report.served import read_saved
from manyhats.trainer.train import train
from support.factories.spaced_tokenizers import KINDS, spaced_tokenizer
from support.factories.tiny_models import CHAT_TEMPLATE, EOS_TOKEN_ID
from support.factories.training_rows import TOKENIZER, tokenized
from support.factories.training_tasks import TinyTask, make_tiny_task
from support.fakes.server import INFO, EchoEngine, MemoryStore, make_backend
from support.harnesses.engine import running_engine


def generations(engine: Any, store: MemoryStore, model: LoadedModel | None = None) -> Generations:
    backend = make_backend(engine, store, None if model is None else model.tokenizer)
    if model is not None:
        backend = replace(backend, info=replace(INFO, vocab_size=model.architecture.vocab_size))
    return Generations(backend, Metrics(max_task_labels=4))


def call(name: str = "colour") -> Call:
    return Call(method="Classify", caller=EVERYBODY, name=name)


def as_messages(task: TinyTask, system: str) -> None:
    """Rewrite the task's rows as conversations."""
    for name in ("train", "eval"):
        path = task.directory / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        ahead = [{"role": "system", "content": system}] if system else []
        conversations = [
            [
                *ahead,
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            for row in rows
        ]
        path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))


def prompts_in(task: TinyTask) -> list[str]:
    rows = [json.loads(line) for line in (task.directory / "eval.jsonl").read_text().splitlines()]
    return [row["messages"][-2]["content"] if "messages" in row else row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("data", "system", "classes"),
    [
        ({}, None, Classes(("red", "green", "blue"), is_chat=False)),
        ({"chat": True}, None, Classes(("red", "green", "blue"))),
        (
            {"chat": True, "system": "Say\na colour."},
            None,
            Classes(("red", "green", "blue"), system="Say\na colour."),
        ),
        ({"labels": ("auto",)}, "Which?", Classes(("blue", "green", "red"), system="Which?")),
    ],
    ids=["text", "chat", "chat with system", "messages"],
)
def test_a_served_task_is_as_often_right_as_its_training_says(
    data: dict[str, Any], system: str | None, classes: Classes, tmp_path: Path
) -> None:
    task = make_tiny_task(tmp_path, num_eval=40)
    if system is not None:
        as_messages(task, system)
    settings = task.settings(data=data)
    evaluation = train(settings, task.model).evaluation
    assert evaluation is not None
    labels = version_labels(evaluation)
    assert classes.labels().items() <= labels.items()
    saved = read_saved("colour", task.out, task.model.description)
    store = MemoryStore()
    store.register(Registration("colour", Uri("a"), labels=labels))
    items = read_task_data(settings.data, task.model, 0).items

    async def served() -> tuple[list[Classified], list[tuple[float, ...]]]:
        async with running_engine(task.model, lambda record: saved.lowered) as engine:
            found = await generations(engine, store, task.model).classify(call(), prompts_in(task))
            return found, [await scored(engine, item.score_tokens, store) for item in items]

    found, trained = asyncio.run(served())
    assert [each.probabilities for each in found] == trained
    right = sum(each.label == item.label for each, item in zip(found, items, strict=True))
    assert right == evaluation.after.num_right
    assert 0 < right <= 40
    assert {each.classes for each in found} == {classes.texts}


async def scored(engine: Engine, tokens: ScoreTokens, store: MemoryStore) -> tuple[float, ...]:
    """The softmax of the scores that the trainer asks for."""
    output = await engine.score(
        ScoreRequest(
            id="trained",
            prompt_token_ids=tokens.prompt_token_ids,
            continuations=tokens.continuations,
            num_given=tokens.num_given,
            adapter=store.resolve("colour"),
        )
    )
    logprobs = [score.logprob for score in output.scores]
    weights = [math.exp(logprob - max(logprobs)) for logprob in logprobs]
    return tuple(weight / math.fsum(weights) for weight in weights)


def spaced(kind: str) -> Tokenizer:
    backend: Backend = spaced_tokenizer(kind)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, special_tokens=special, chat_template=CHAT_TEMPLATE)


def as_scored(tokens: ScoreTokens) -> list[tuple[tuple[int, ...], int]]:
    """Each continuation with its prompt, and from where it is scored: however the two share it."""
    begin = len(tokens.prompt_token_ids)
    given = tokens.num_given or (0,) * len(tokens.continuations)
    return [
        ((*tokens.prompt_token_ids, *each), begin + number)
        for each, number in zip(tokens.continuations, given, strict=True)
    ]


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("kind", ["byte-level", *KINDS])
async def test_tokens_are_those_of_the_trainers_evaluation(kind: str, is_chat: bool) -> None:
    tokenizer = TOKENIZER if kind == "byte-level" else spaced(kind)
    eos = frozenset({EOS_TOKEN_ID if kind == "byte-level" else 2})
    classes = ["yes", " no", "ye", "true\n", "false" + tokenizer.piece(2)]
    encoder = Encoder(tokenizer, TextThreads(), tokenizer.vocab_size)
    for text in ("the answer is", "one two ", "x"):
        rows = [{"prompt": text, "completion": label} for label in classes[:4]]
        data = tokenized(rows, tokenizer, eos_token_ids=eos, labels=classes, chat=is_chat)
        prompt = ChatPrompt((ChatMessage("user", text),)) if is_chat else TextPrompt(text)
        tokens = await encoder.encode_answers(prompt, classes, await encoder.ends(eos))
        # Whatever a row's own completion took from its prompt.
        for item in labelled_items(data, classes):
            assert as_scored(item.score_tokens) == as_scored(tokens)


async def test_a_template_of_the_tasks_own_ends_answers_as_the_same_of_the_base_does() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = TOKENIZER.with_text(chat_template=template)

    async def render(messages: Sequence[ChatMessage], rendering: Rendering) -> str:
        return tokenizer.render_chat(messages, rendering=rendering)

    async def refuse(messages: Sequence[ChatMessage], rendering: Rendering) -> str:
        raise FieldInvalidError("chat", "refused")

    ids = frozenset({0, EOS_TOKEN_ID})
    encoder = Encoder(tokenizer, TextThreads(), tokenizer.vocab_size)
    assert await replace(encoder, render=render).ends(ids) == find_ends(tokenizer, ids)
    without = await replace(encoder, render=refuse).ends(ids)
    assert without == find_ends(tokenizer, ids, rendered=())
    with pytest.raises(ModelError):
        await encoder.ends(frozenset())


def test_the_first_of_equally_likely_classes_wins() -> None:
    def output(*logprobs: float) -> ScoreOutput:
        tokens = (TokenOutput(1, "t", -1.0, 1),)
        return ScoreOutput([ScoredContinuation(each, tokens) for each in logprobs], Usage(prompt_tokens=3))

    classes = Classes(("a", "b", "c"))
    assert classified(classes, output(-2000.0, -1000.0, -1000.0)) == Classified(
        classes.texts, (0.0, 0.5, 0.5), 1, Usage(prompt_tokens=3)
    )
    assert classified(classes, output(-1.0 - 1e-17, -1.0, -1.0 + 2**-52)).index == 2
    found = classified(classes, output(math.log(0.1), math.log(0.2), math.log(0.1)))
    assert found.probabilities == pytest.approx((0.25, 0.5, 0.25))
    assert found.label == "b"


class WithEnds(EchoEngine):
    """Has an end of answers."""

    def eos_token_ids(self, tokenizer: object = None) -> frozenset[int]:
        return frozenset({0})


PLAIN = {"class.0": "a", "class.1": "b", "classify.prompt": "text"}


def classifier(labels: Mapping[str, str], engine: EchoEngine | None = None) -> Generations:
    store = MemoryStore()
    store.register(Registration("colour", Uri("a"), labels=labels))
    special = {"eos_token": TOKENIZER.special_tokens["eos_token"]}
    tokenizer = TOKENIZER.with_text(special_tokens=special)
    backend = make_backend(engine or WithEnds(), store, tokenizer)
    backend = replace(backend, info=replace(INFO, vocab_size=tokenizer.vocab_size))
    return Generations(backend, Metrics(max_task_labels=4))


@pytest.mark.parametrize(
    ("labels", "name", "texts", "field"),
    [
        ({}, "colour", ["x"], "task_id"),
        (PLAIN, "", ["x"], "task_id"),
        (PLAIN, "colour", [], "texts"),
        (PLAIN, "colour", ["x"] * 1025, "texts"),
        (PLAIN, "colour", ["x" * 2**19, "y" * 2**19, "z"], "texts"),
        (PLAIN, "colour", ["x", ""], "texts[1]"),
    ],
)
async def test_what_cannot_be_classified_is_refused_by_its_name(
    labels: Mapping[str, str], name: str, texts: list[str], field: str
) -> None:
    with pytest.raises(FieldInvalidError) as caught:
        await classifier(labels).classify(call(name), texts)
    assert caught.value.field == field


async def test_a_text_that_is_too_long_is_named() -> None:
    with pytest.raises(PromptTooLongError) as caught:
        await classifier(PLAIN).classify(call(), ["x", "x y z " * 2000])
    assert caught.value.field == "texts[1]"


async def test_an_error_of_one_text_ends_the_call() -> None:
    with pytest.raises(NumericalError):
        await classifier(PLAIN, WithEnds(error=NumericalError("nan"))).classify(call(), ["x"] * 100)
