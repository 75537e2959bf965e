"""What callers ask the client for: prompts and options, free of protobuf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user``, ``assistant``, ``tool`` or another that the chat template knows.
        content: what is said; None where it is only ``tool_calls``.
        name: of the speaker, or of the tool that answers.
        tool_calls: the assistant's, in OpenAI's form: ``{"id": …, "function": {"name": …, "arguments": …}}``, where the
            arguments are an object, or JSON of one.
        tool_call_id: which of them a tool's answer is to.
    """

    role: str
    content: str | None
    name: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    tool_call_id: str | None = None


Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, Any]]
"""Text, token ids, or a conversation (each turn a ``ChatMessage`` or ``{"role": …, "content": …}``)."""

Continuation: TypeAlias = str | Sequence[int]
"""Text or token ids that ``score`` scores."""

TextToRead: TypeAlias = (
    str | tuple[str, str] | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, Any]]
)
"""Text, a pair of texts, token ids, or a conversation that ``embed`` and ``classify`` read."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called, as a call progresses, with how much is done and how much there is: bytes of an upload, prompts of many."""

OnError: TypeAlias = Literal["raise", "return"]
"""What becomes of a call for many prompts if one fails: the error ends it, or stands in the place of the answer."""


class ChatOptions(TypedDict, total=False):
    """Options for a conversation; any left out, or None, take the server's default.

    Keys:
        tools: what the assistant may call, each a JSON object in OpenAI's form; the chat template must read them.
        template_arguments: what else the template reads, such as ``{"enable_thinking": False}``.
        continue_final_message: whether the answer continues the last message instead of beginning a new one.
        add_generation_prompt: whether the prompt ends with the beginning of the assistant's turn; true by default,
            unless the last message is continued.
    """

    tools: Sequence[Mapping[str, Any]] | None
    template_arguments: Mapping[str, Any] | None
    continue_final_message: bool | None
    add_generation_prompt: bool | None


class PromptOptions(ChatOptions, total=False):
    """Options of every call that takes a prompt, besides those of ``ChatOptions``; None takes the server's default.

    Keys:
        request_id: names the request in logs and errors; the server makes one if it is missing.
        add_special_tokens: whether a text prompt gets the tokenizer's special tokens; true by default.
        cache_salt: requests with different salts never share cached work.
        priority: higher goes first; 0 by default.
    """

    request_id: str | None
    add_special_tokens: bool | None
    cache_salt: str | None
    priority: int | None


class GenerateOptions(PromptOptions, total=False):
    """Keyword arguments of ``generate`` and ``generate_stream``, besides those of ``PromptOptions``.

    What is left out is as the task's defaults say, if its version was registered with any (``default.temperature`` and
    so on among its labels). Otherwise, without sampling options the most likely token is taken at each step; with any
    of them, ``temperature`` is 1 unless it is given too.

    Keys:
        num_sequences: how many answers to generate, from 1 to 16; 1 by default. The prompt is computed once.

    Keys, sampling:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the smallest set of tokens with at least this probability mass, in (0, 1].
        min_p: keeps tokens with at least this fraction of the most likely token's probability.
        typical_p: the mass of locally typical sampling, in (0, 1].
        repetition_penalty: above 1 makes tokens of prompt and answer less likely.
        presence_penalty: subtracted once from the logits of tokens already in the answer.
        frequency_penalty: subtracted per occurrence.
        seed: makes the answer reproducible, whatever else the server is doing; with ``num_sequences``, the answer of
            index j has ``seed + j``.
        logit_bias: token id → added to its logit.

    Keys, stopping:
        max_new_tokens: 256 by default, unless the task says otherwise.
        min_new_tokens: until then, nothing ends the answer.
        stop_sequences: texts that end the answer; one string, or several. Special tokens' literals count.
        stop_token_ids: token ids that end the answer.
        include_stop_sequence: whether the text keeps the stop that ended it.
        ignore_eos: whether to treat EOS as an ordinary token.
        time_limit_ms: whatever was generated by then is the answer (``timeout_s`` makes the call fail instead).

    Keys, constraint, of which one may be given:
        json_schema: the answer is JSON that fits this schema; its text, or the object itself.
        regex: the answer matches this regular expression as a whole.
        grammar: the answer is of this grammar, in Lark's notation.
        choice: the answer is one of these texts.

    Keys, speculation:
        speculation: how many tokens to guess in one step, from 0 to 16; guesses are checked, so that the answer is the
            same, and comes sooner where it repeats much of its prompt. 0 by default, unless the task says otherwise.

    Keys, response:
        logprobs: each token's log-probability and rank.
        top_logprobs: with ``logprobs``, this many of the most likely tokens at each step.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: whether the text leaves special tokens out; true by default.
    """

    num_sequences: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop_sequences: Sequence[str] | str | None
    stop_token_ids: Sequence[int] | None
    include_stop_sequence: bool | None
    ignore_eos: bool | None
    time_limit_ms: float | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    speculation: int | None
    logprobs: bool | None
    top_logprobs: int | None
    prompt_logprobs: bool | None
    skip_special_tokens: bool | None


class ManyOptions(TypedDict, total=False):
    """Keyword arguments of every call for many prompts or rows; None is the same as leaving one out.

    Keys:
        concurrency: how many requests run at a time, at most; 32 by default.
        progress: True, the default, shows a bar at a terminal and in notebooks, False nothing; a function is called
            with how many requests have ended, and how many there are.
        timeout_s: for each prompt, with all that it waits for; the client's by default.
    """

    concurrency: int | None
    progress: Progress | bool | None
    timeout_s: float | None


class GenerateManyOptions(GenerateOptions, ManyOptions, total=False):
    """Keyword arguments of ``generate_many`` and ``generate_frame``: those of ``generate`` hold for all prompts."""


class EmbedOptions(TypedDict, total=False):
    """Keyword arguments of ``embed``; None is the same as leaving one out.

    Keys:
        pooling: what is read of each text's hidden values: ``first``, ``last``, ``mean`` or ``max``; by default as the
            task says, else as the base model does. A task that classifies needs it.
        normalize: whether vectors are divided by their length; true by default.
        dimensions: how many of a vector's first values are kept, before it is divided by its length; all by default.
        truncation: ``end`` cuts the end off texts that are too long; by default they are refused.
        request_id, add_special_tokens, cache_salt, priority: as in ``PromptOptions``.
    """

    pooling: str | None
    normalize: bool | None
    dimensions: int | None
    truncation: str | None
    request_id: str | None
    add_special_tokens: bool | None
    cache_salt: str | None
    priority: int | None


class ClassifyOptions(TypedDict, total=False):
    """Keyword arguments of ``classify``; None is the same as leaving one out.

    Keys:
        raw_scores: whether scores are the logits, instead of what the task makes of them.
        top_k: how many classes to tell, best first; all by default.
        truncation: ``end`` cuts the end off texts that are too long; by default they are refused.
        request_id, priority: as in ``PromptOptions``.
    """

    raw_scores: bool | None
    top_k: int | None
    truncation: str | None
    request_id: str | None
    priority: int | None


class EmbedFrameOptions(EmbedOptions, ManyOptions, total=False):
    """Keyword arguments of ``embed_frame``."""


class ClassifyFrameOptions(ClassifyOptions, ManyOptions, total=False):
    """Keyword arguments of ``classify_frame``."""


class ScoreFrameOptions(PromptOptions, ManyOptions, total=False):
    """Keyword arguments of ``score_frame``."""


class TagOptions(TypedDict, total=False):
    """Keyword arguments of ``tag``; None is the same as leaving one out, but for ``aggregation``.

    Keys:
        aggregation: how classes of tokens become entities: each token has its own (``simple``, the default), or a word
            has that of its first token (``first``) or of its surest (``max``). ``none`` or None gives the tokens.
        top_k: of how many classes each token tells, best first; all by default.
        truncation: ``end`` cuts the end off texts that are too long; by default they are refused.
        request_id, priority: as in ``PromptOptions``.
    """

    aggregation: str | None
    top_k: int | None
    truncation: str | None
    request_id: str | None
    priority: int | None


class RerankOptions(TypedDict, total=False):
    """Keyword arguments of ``rerank``; None is the same as leaving one out.

    Keys:
        raw_scores: whether scores are the logits, instead of their sigmoid.
        return_texts: whether the answer repeats the texts.
        top_n: how many of the best texts to tell; all by default.
        truncation: ``end`` cuts the end off texts that are too long; by default they are refused.
        request_id: as in ``PromptOptions``.
    """

    raw_scores: bool | None
    return_texts: bool | None
    top_n: int | None
    truncation: str | None
    request_id: str | None


class RegisterOptions(TypedDict, total=False):
    """Keyword arguments of ``register_adapter`` and ``upload_adapter``; None is the same as leaving one out.

    Keys:
        activate: whether the new version becomes the one that the bare task id refers to; true by default.
        validate_only: checks everything and stores nothing.
        expected_digest: the ``sha256:…`` that the files must have; empty for any.
        request_id: makes repeating safe; the same id with another body is refused. Made anew if it is left out.
        labels: kept with the version; ``default.temperature`` and its like decide what holds for fields that a
            generation leaves out.
        assume_base: assumes that the adapter is meant for the server's base, whatever base it names.
    """

    activate: bool | None
    validate_only: bool | None
    expected_digest: str | None
    request_id: str | None
    labels: Mapping[str, str] | None
    assume_base: bool | None
