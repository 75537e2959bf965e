"""What the client is asked: prompts and options, free of protobuf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation (each turn a ``ChatMessage`` or ``{"role": …, "content": …}``)."""

Continuation: TypeAlias = str | Sequence[int]
"""What ``score`` scores: text, or token ids."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told, as an upload goes on, how many bytes are sent and how many there are."""


class PromptOptions(TypedDict, total=False):
    """Options of every call that takes a prompt; what is left out, or None, takes the server's default.

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
    """Keyword arguments of ``generate`` and ``generate_stream``, beside those of ``PromptOptions``.

    Without any of the sampling options the most likely token is taken at each step. With one of them,
    ``temperature`` is 1 unless it is given too.

    Keys, sampling:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the smallest set of tokens with at least this probability mass, in (0, 1].
        min_p: keeps tokens with at least this fraction of the most likely token's probability.
        typical_p: locally typical sampling's mass, in (0, 1].
        repetition_penalty: above 1 makes tokens of prompt and answer less likely.
        presence_penalty: subtracted once from the logits of tokens already in the answer.
        frequency_penalty: subtracted per occurrence.
        seed: makes the answer reproducible, whatever else the server is doing.
        logit_bias: token id → added to its logit.

    Keys, stopping:
        max_new_tokens: 256 by default.
        min_new_tokens: nothing ends the answer before.
        stop_sequences: texts that end the answer; one string, or several. Special tokens' literals count.
        stop_token_ids: token ids that end the answer.
        include_stop_sequence: whether the text keeps the stop that ended it.
        ignore_eos: whether EOS is an ordinary token.
        time_limit_ms: what is there by then is the answer (``timeout_s`` makes the call fail instead).

    Keys, response:
        logprobs: each token's log-probability and rank.
        top_logprobs: with ``logprobs``, as many of the most likely tokens at each step.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: whether the text leaves special tokens out; true by default.
    """

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
    logprobs: bool | None
    top_logprobs: int | None
    prompt_logprobs: bool | None
    skip_special_tokens: bool | None


class RegisterOptions(TypedDict, total=False):
    """Keyword arguments of ``register_adapter`` and ``upload_adapter``; None is the same as left out.

    Keys:
        activate: whether the new version becomes the one the bare task id means; true by default.
        validate_only: checks everything and stores nothing.
        expected_digest: ``sha256:…`` the files must have; empty for any.
        request_id: makes a repeat safe; the same id with another body is refused.
        labels: kept with the version.
        assume_base: the server's base is meant, whatever name the adapter records.
    """

    activate: bool | None
    validate_only: bool | None
    expected_digest: str | None
    request_id: str | None
    labels: Mapping[str, str] | None
    assume_base: bool | None
