"""One call's generations: its prompts, the answers to each, and what the texts of all answers share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from manyhats.engine.output import StepOutput, TokenOutput
from manyhats.server.http.openai_answers import Spent, TokenNames
from manyhats.server.http.openai_messages import GenerationBody

if TYPE_CHECKING:
    from manyhats.engine.request import Request

Output = tuple[int, StepOutput]
"""An answer's number, and what a step adds to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One call's generations. Answer j to prompt i has the number i·n + j.

    Attributes:
        body: of the request.
        requests: one for each prompt.
        num_choices: answers to each prompt, n.
        num_top: most likely tokens to show at each position; None for no log-probabilities.
        names: how tokens are written.
        head: fields of every answer and chunk.
        spent: so far.
        prompt_tokens: number of a prompt → its tokens with their log-probabilities, if wanted, once they are there.
    """

    body: GenerationBody
    requests: Sequence[Request]
    num_choices: int
    num_top: int | None
    names: TokenNames
    head: Mapping[str, Any]
    spent: Spent = field(default_factory=Spent)
    prompt_tokens: dict[int, tuple[TokenOutput, ...]] = field(default_factory=dict)

    def prompt_of(self, number: int) -> int:
        """The number of an answer's prompt."""
        return number // self.num_choices

    def take(self, number: int, output: StepOutput) -> None:
        """Account for an output."""
        prompt = self.prompt_of(number)
        if prompt not in self.prompt_tokens:
            self.prompt_tokens[prompt] = output.prompt_tokens
            self.spent.prompt(output.usage)
        self.spent.completion_tokens += len(output.tokens)
        if output.finish_reason is not None:
            self.spent.answer(output.usage)

    def token_ids(self, outputs: Sequence[StepOutput]) -> Any:
        """The ids of generated tokens, if they are wanted."""
        if not self.body.return_token_ids:
            return UNSET
        return [token.id for output in outputs for token in output.tokens]

    def prompt_token_ids(self, number: int) -> Any:
        """The ids of an answer's prompt, if they are wanted."""
        if not self.body.return_token_ids:
            return UNSET
        return list(self.requests[self.prompt_of(number)].prompt_token_ids)

    def stream_usage(self, *, is_last: bool = False) -> Any:
        """The field ``usage`` of a chunk."""
        options = self.body.stream_options
        if options is None or not (options.include_usage or options.continuous_usage_stats):
            return UNSET
        return self.spent.body if is_last or options.continuous_usage_stats else None

    @property
    def ends_with_usage(self) -> bool:
        """Whether a stream's last chunk has nothing but usage."""
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)


async def collected(run: Run, outputs: AsyncGenerator[Output, None]) -> list[list[StepOutput]]:
    """All outputs of each answer."""
    found: list[list[StepOutput]] = [[] for _ in range(len(run.requests) * run.num_choices)]
    async with aclosing(outputs):
        async for number, output in outputs:
            run.take(number, output)
            found[number].append(output)
    return found
