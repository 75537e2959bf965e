"""``chat.completion``: answers to conversations, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from msgspec import UNSET, Struct, UnsetType

from manyhats.engine.output import StepOutput
from manyhats.server.http.openai_answers import (
    ChatLogprobs,
    PromptLogprobs,
    UsageBody,
    finish_reason,
    stop_reason,
)
from manyhats.server.http.run import Output, Run
from manyhats.server.service.tool_calls import AnswerPiece, CallPiece, CallReader


class CalledFunction(Struct):
    """The function that is called, and its arguments: a JSON object as text."""

    name: str
    arguments: str


class CallAnswer(Struct):
    """A call of a tool."""

    id: str
    function: CalledFunction
    type: str = "function"


class AnswerMessage(Struct):
    """What the assistant said, and which tools it calls."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[CallAnswer] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatAnswer(Struct, kw_only=True):
    """A whole answer."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Struct):
    """What a chunk adds to the function of a call: its name at first, then pieces of its arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(Struct):
    """What a chunk adds to a call; id and type come with the first."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Delta(Struct, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    """A piece of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


NewReader = Callable[[], CallReader | None]
"""Makes the reader of an answer's calls; None if it makes none."""


def chat_answer(run: Run, outputs: Sequence[Sequence[StepOutput]], new_reader: NewReader) -> ChatAnswer:
    """The whole answer, from all outputs of each choice."""
    num_of_prompt = run.body.prompt_logprobs
    return ChatAnswer(
        **run.head,
        choices=[_choice(run, number, each, new_reader()) for number, each in enumerate(outputs)],
        usage=run.spent.body,
        prompt_logprobs=None
        if num_of_prompt is None
        else run.names.prompt(run.prompt_tokens[0], num_of_prompt),
        prompt_token_ids=run.prompt_token_ids(0),
    )


def _choice(run: Run, number: int, outputs: Sequence[StepOutput], reader: CallReader | None) -> ChatChoice:
    tokens = (token for output in outputs for token in output.tokens)
    return ChatChoice(
        index=number,
        message=_message([_piece(output, reader) for output in outputs]),
        logprobs=None if run.num_top is None else run.names.chat(tokens, run.num_top),
        finish_reason=_finish_reason(outputs[-1], reader),
        stop_reason=stop_reason(outputs[-1]),
        token_ids=run.token_ids(outputs),
    )


def _message(pieces: Sequence[AnswerPiece]) -> AnswerMessage:
    text = "".join(piece.text for piece in pieces)
    calls: list[CallAnswer] = []
    arguments: list[list[str]] = []
    for piece in (call for each in pieces for call in each.calls):
        if piece.id:
            calls.append(CallAnswer(piece.id, CalledFunction(piece.name, "")))
            arguments.append([])
        arguments[-1].append(piece.arguments)
    for call, parts in zip(calls, arguments, strict=True):
        call.function.arguments = "".join(parts)
    return AnswerMessage(None if calls and not text else text, tool_calls=calls or UNSET)


def _piece(output: StepOutput, reader: CallReader | None) -> AnswerPiece:
    return AnswerPiece(output.text) if reader is None else reader.push(output)


def _finish_reason(output: StepOutput, reader: CallReader | None) -> str | None:
    if reader is not None and reader.ends_in_calls(output.finish_reason):
        return "tool_calls"
    return finish_reason(output.finish_reason)


async def chat_chunks(
    run: Run, outputs: AsyncGenerator[Output, None], new_reader: NewReader
) -> AsyncGenerator[ChatChunk, None]:
    """The answer as it grows."""
    readers: dict[int, CallReader | None] = {}
    async with aclosing(outputs):
        async for number, output in outputs:
            run.take(number, output)
            if number not in readers:
                readers[number] = new_reader()
                first = ChunkChoice(index=number, delta=Delta("assistant", ""))
                yield _chunk(run, [first], prompt_token_ids=run.prompt_token_ids(number))
            for added in _added(run, number, output, readers[number]):
                yield _chunk(run, [added])
    if run.ends_with_usage:
        yield _chunk(run, [], is_last=True)


def _chunk(
    run: Run,
    choices: list[ChunkChoice],
    *,
    is_last: bool = False,
    prompt_token_ids: list[int] | UnsetType = UNSET,
) -> ChatChunk:
    return ChatChunk(
        **run.head,
        choices=choices,
        usage=run.stream_usage(is_last=is_last),
        prompt_token_ids=prompt_token_ids,
    )


def _added(run: Run, number: int, output: StepOutput, reader: CallReader | None) -> list[ChunkChoice]:
    """What an output adds, each piece of a call by itself; tokens come with the first, the reason with the last."""
    piece = _piece(output, reader)
    deltas = [Delta(content=piece.text)] if piece.text else []
    deltas += [Delta(tool_calls=[_call(each)]) for each in piece.calls]
    ends = output.finish_reason is not None
    shows_tokens = bool(output.tokens) and (run.num_top is not None or bool(run.body.return_token_ids))
    if (ends and piece.calls) or (not deltas and (ends or shows_tokens)):
        deltas.append(Delta())
    choices = [ChunkChoice(index=number, delta=delta, token_ids=run.token_ids([])) for delta in deltas]
    if choices:
        first, last = choices[0], choices[-1]
        first.logprobs = None if run.num_top is None else run.names.chat(output.tokens, run.num_top)
        first.token_ids = run.token_ids([output])
        last.finish_reason = _finish_reason(output, reader)
        last.stop_reason = stop_reason(output) if ends else UNSET
    return choices


def _call(piece: CallPiece) -> CallDelta:
    if piece.id:
        return CallDelta(piece.index, FunctionDelta("", piece.name), piece.id, "function")
    return CallDelta(piece.index, FunctionDelta(piece.arguments))
