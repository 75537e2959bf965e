"""``text_completion``: what follows prompts, whole and streamed; with ``echo``, after the prompts themselves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from msgspec import UNSET, Struct, UnsetType

from manyhats.engine.output import FinishReason, StepOutput
from manyhats.server.http.openai_answers import (
    CompletionLogprobs,
    PromptLogprobs,
    UsageBody,
    finish_reason,
    stop_reason,
)
from manyhats.server.http.run import Output, Run

Built = Callable[
    [Callable[[], "CompletionChoice"], Sequence[Sequence[StepOutput]]], Awaitable["CompletionChoice"]
]


class CompletionChoice(Struct, kw_only=True):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    """A whole answer, or a chunk."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody | UnsetType | None = UNSET


def completion(run: Run, outputs: Sequence[Sequence[StepOutput]], texts: Sequence[str]) -> Completion:
    """The whole answer, from all outputs of each choice.

    Args:
        run: the call's.
        outputs: of each choice.
        texts: what each prompt shows of itself; "" for nothing.
    """
    choices = [
        _choice(run, number, texts[run.prompt_of(number)], each) for number, each in enumerate(outputs)
    ]
    return Completion(**run.head, choices=choices, usage=run.spent.body)


async def completion_chunks(
    run: Run, outputs: AsyncGenerator[Output, None], texts: Sequence[str], built: Built
) -> AsyncGenerator[Completion, None]:
    """The answer as it grows; see ``completion``. ``built`` builds a piece that shows outputs, where that is cheap."""
    offsets: dict[int, int] = {}
    shows_tokens = run.num_top is not None or run.body.return_token_ids
    async with aclosing(outputs):
        async for number, output in outputs:
            run.take(number, output)
            is_first = number not in offsets
            text = texts[run.prompt_of(number)] if is_first else ""
            build = partial(_choice, run, number, text, [output], offsets.get(number, 0), is_first=is_first)
            choice = await built(build, [[output]])
            offsets[number] = offsets.get(number, 0) + _length(run, number, output, is_first=is_first)
            shows_prompt = is_first and run.body.prompt_logprobs is not None
            if choice.text or output.finish_reason or shows_prompt or (shows_tokens and output.tokens):
                yield Completion(**run.head, choices=[choice], usage=run.stream_usage())
    if run.ends_with_usage:
        yield Completion(**run.head, choices=[], usage=run.stream_usage(is_last=True))


def _choice(
    run: Run,
    number: int,
    text: str,
    outputs: Sequence[StepOutput],
    offset: int = 0,
    *,
    is_first: bool = True,
) -> CompletionChoice:
    tokens = [token for output in outputs for token in output.tokens]
    of_prompt = run.prompt_tokens[run.prompt_of(number)] if is_first else ()
    if is_first and _is_echoed(run):
        tokens = [*of_prompt, *tokens]
    num_of_prompt = run.body.prompt_logprobs
    wants_prompt = is_first and num_of_prompt is not None
    return CompletionChoice(
        index=number,
        text=text + "".join(output.text for output in outputs),
        logprobs=None if run.num_top is None else run.names.completion(tokens, run.num_top, offset),
        finish_reason=finish_reason(outputs[-1].finish_reason),
        stop_reason=stop_reason(outputs[-1]),
        prompt_logprobs=run.names.prompt(of_prompt, num_of_prompt or 0) if wants_prompt else UNSET,
        token_ids=run.token_ids(outputs),
        prompt_token_ids=run.prompt_token_ids(number) if is_first else UNSET,
    )


def _is_echoed(run: Run) -> bool:
    return bool(getattr(run.body, "echo", False))


def _length(run: Run, number: int, output: StepOutput, *, is_first: bool) -> int:
    """Characters of the tokens that an output adds to a choice's log-probabilities."""
    of_prompt = run.prompt_tokens[run.prompt_of(number)] if is_first and _is_echoed(run) else ()
    return sum(len(token.text) for token in (*of_prompt, *output.tokens))


def of_prompt_only(output: StepOutput) -> StepOutput:
    """An output without what it generated, for a request of no tokens."""
    ended = None if output.finish_reason is None else FinishReason.LENGTH
    return replace(output, text="", tokens=(), finish_reason=ended, stop=None)
