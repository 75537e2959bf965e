"""Texts put to a task that tells classes apart, and what it says of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhats.adapters.reserved_labels import Classes
from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.output import ScoreOutput, Usage
from manyhats.engine.request import ScoreRequest
from manyhats.engine.text.chat_template import ChatMessage
from manyhats.server.service.conversations import MAX_TEXT_BYTES, ChatPrompt
from manyhats.server.service.prompts import TextPrompt

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.text.prompt_text import ScoreTokens
    from manyhats.engine.text.tokenizer import Tokenizer
    from manyhats.server.service.call import Call

MAX_TEXTS = 1024


@dataclass(frozen=True, slots=True)
class Classified:
    """What a task says of one text.

    Attributes:
        classes: all of the task's, in order.
        probabilities: of each: the softmax of their scores.
        index: the likeliest class's; of equal ones the first wins.
        usage: what it cost.
    """

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    index: int
    usage: Usage

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.classes[self.index]


def classified(classes: Classes, output: ScoreOutput) -> Classified:
    """p[i] = exp(s[i]) / Σ exp(s[j]), s the scores of the classes with their ends, in nats."""
    scores = [score.logprob for score in output.scores]
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    total = math.fsum(weights)
    probabilities = tuple(weight / total for weight in weights)
    return Classified(classes.texts, probabilities, scores.index(best), output.usage)


def prompts_of(classes: Classes, texts: Sequence[str]) -> list[TextPrompt | ChatPrompt]:
    """The prompt that each text is, or is in; errors name it as in ``texts[3]``.

    Raises:
        FieldInvalidError: there are none, too many, or they are empty or too long.
    """
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise FieldInvalidError("texts", f"must have 1 to {MAX_TEXTS}, not {len(texts)}")
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > MAX_TEXT_BYTES:
        raise FieldInvalidError("texts", f"have {num_bytes} bytes together; the limit is {MAX_TEXT_BYTES}")
    prompts = [TextPrompt(text, field=f"texts[{index}]") for index, text in enumerate(texts)]
    return [_in_chat(classes, prompt) for prompt in prompts] if classes.is_chat else list(prompts)


def class_request(
    call: Call, index: int, tokens: ScoreTokens, adapter: AdapterRecord, tokenizer: Tokenizer | None
) -> ScoreRequest:
    """The scoring of all classes after one of a call's texts."""
    return ScoreRequest(
        id=f"{call.id}-{index}",
        prompt_token_ids=tokens.prompt_token_ids,
        continuations=tokens.continuations,
        num_given=tokens.num_given,
        adapter=adapter,
        tokenizer=tokenizer,
        deadline_s=call.deadline_s,
        accepted_s=call.received_s,
    )


@contextmanager
def named_text(index: int) -> Iterator[None]:
    """Name the text that is at fault, whatever it became."""
    try:
        yield
    except PromptTooLongError as error:
        field = f"texts[{index}]"
        raise PromptTooLongError(field, error.num_tokens, error.limit, at_least=error.at_least) from None
    except FieldInvalidError as error:
        raise FieldInvalidError(f"texts[{index}]", error.description) from error


def _in_chat(classes: Classes, prompt: TextPrompt) -> ChatPrompt:
    ahead = (ChatMessage("system", classes.system),) if classes.system else ()
    return ChatPrompt((*ahead, ChatMessage("user", prompt.text)))
