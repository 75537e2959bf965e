"""What the answers of OpenAI's API have in common: usage, log-probabilities, reasons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import UNSET, Struct, UnsetType

from manyhats.engine.output import FinishReason, StepOutput, TokenOutput, TopToken, Usage
from manyhats.server.service.text_threads import paced_tokens

if TYPE_CHECKING:
    from manyhats.engine.text.tokenizer import Tokenizer

_FINISH_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TIME_LIMIT: "length",
}


class PromptDetails(Struct, frozen=True):
    """How much of a prompt was in the prefix cache."""

    cached_tokens: int


class CompletionDetails(Struct, frozen=True):
    """How many guessed tokens came, and how many did not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageBody(Struct, frozen=True):
    """What a request cost; details of its answers only if anything was guessed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class TopLogprob(Struct, frozen=True):
    """One of the most likely tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    """A token of an answer, and the most likely ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Of a chat answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    """Of a completion's tokens, in parallel lists; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct, frozen=True):
    """A token of a prompt or one of the most likely in its place, by vLLM's names."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


def finish_reason(reason: FinishReason | None) -> str | None:
    """Why an answer ended, in OpenAI's words; None while it continues."""
    return None if reason is None else _FINISH_REASONS[reason]


def stop_reason(output: StepOutput) -> str | int | None:
    """The stop sequence or token that ended an answer, or that its time was over; vLLM's field."""
    return "time_limit" if output.finish_reason is FinishReason.TIME_LIMIT else output.stop


@dataclass(slots=True)
class Spent:
    """Usage of one call: its prompts, each counted once, and the tokens of all its answers."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    def prompt(self, usage: Usage) -> None:
        """Count a prompt."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_prompt_tokens

    def answer(self, usage: Usage) -> None:
        """Count what was guessed of an answer that has ended."""
        self.draft_tokens += usage.draft_tokens
        self.accepted_draft_tokens += usage.accepted_draft_tokens

    @property
    def body(self) -> UsageBody:
        """So far."""
        total = self.prompt_tokens + self.completion_tokens
        details = PromptDetails(self.cached_tokens)
        accepted = self.accepted_draft_tokens
        guessed = CompletionDetails(accepted, self.draft_tokens - accepted) if self.draft_tokens else UNSET
        return UsageBody(self.prompt_tokens, self.completion_tokens, total, details, guessed)


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How the tokens of an answer are written.

    Attributes:
        tokenizer: of the answer's task.
        as_ids: as ``token_id:42`` instead of their texts.
    """

    tokenizer: Tokenizer
    as_ids: bool = False

    def name(self, token: TokenOutput | TopToken) -> str:
        """What stands for a token."""
        return f"token_id:{token.id}" if self.as_ids else token.text

    def chat(self, tokens: Iterable[TokenOutput], num_top: int) -> ChatLogprobs:
        """Log-probabilities of a chat answer's tokens, with ``num_top`` others each."""
        return ChatLogprobs([self._chat_token(token, num_top) for token in paced_tokens(tokens)])

    def _chat_token(self, token: TokenOutput, num_top: int) -> TokenLogprob:
        top = [
            TopLogprob(self.name(each), each.logprob, self._bytes(each.id)) for each in token.top[:num_top]
        ]
        return TokenLogprob(self.name(token), _logprob(token), self._bytes(token.id), top)

    def _bytes(self, token_id: int) -> list[int]:
        return list(self.tokenizer.token_bytes(token_id))

    def completion(self, tokens: Iterable[TokenOutput], num_top: int, offset: int) -> CompletionLogprobs:
        """Log-probabilities of a completion's tokens; ``offset`` is where the first begins in the text."""
        found = CompletionLogprobs([], [], [], [])
        for token in paced_tokens(tokens):
            found.tokens.append(self.name(token))
            found.token_logprobs.append(token.logprob)
            found.top_logprobs.append(None if token.logprob is None else self._tops(token, num_top))
            found.text_offset.append(offset)
            offset += len(token.text)
        return found

    def _tops(self, token: TokenOutput, num_top: int) -> dict[str, float]:
        """Name → log-probability; of several tokens with one name, the most likely counts."""
        tops: dict[str, float] = {}
        for each in token.top[:num_top]:  # the most likely first
            tops.setdefault(self.name(each), each.logprob)
        tops[self.name(token)] = max(_logprob(token), tops.get(self.name(token), float("-inf")))
        return tops

    def prompt(self, tokens: Sequence[TokenOutput], num_top: int) -> PromptLogprobs:
        """Log-probabilities of a prompt's tokens."""
        return [self._prompt_token(token, num_top) for token in paced_tokens(tokens)]

    def _prompt_token(self, token: TokenOutput, num_top: int) -> dict[int, PromptLogprob] | None:
        if token.logprob is None:
            return None
        found = {
            each.id: PromptLogprob(each.logprob, rank, each.text)
            for rank, each in enumerate(token.top[:num_top], 1)
        }
        found.setdefault(token.id, PromptLogprob(token.logprob, token.rank, token.text))
        return found


def _logprob(token: TokenOutput) -> float:
    assert token.logprob is not None, "asked for without log-probabilities"
    return token.logprob
