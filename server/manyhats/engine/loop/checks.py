"""What a request must be before the engine takes it: checked against the model at hand."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Set as AbstractSet

from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.request import MAX_CONTINUATIONS, Request, ScoreRequest
from manyhats.engine.text.stopping import StopChecker


def check_generation(request: Request, vocab_size: int, eos_token_ids: AbstractSet[int]) -> None:
    """Check that every token id of a generation is one, and that there is one that may come first.

    Args:
        request: to look at.
        vocab_size: token ids are below.
        eos_token_ids: those that end this request.

    Raises:
        FieldInvalidError: an empty prompt, an id outside the vocabulary, or every token forbidden.
    """
    _check_prompt(request.prompt_token_ids, vocab_size)
    _check_ids("sampling.logit_bias", request.sampling.logit_bias, vocab_size)
    _check_ids("stopping.stop_token_ids", request.stopping.stop_token_ids, vocab_size)
    forbidden = StopChecker(request.stopping, eos_token_ids).forbidden_ids(0)
    if len(forbidden) >= vocab_size:
        raise FieldInvalidError(
            "stopping.min_new_tokens",
            f"must be 0 here: until then no EOS and no stop token may come, which are all {vocab_size} tokens",
        )


def check_scoring(request: ScoreRequest, vocab_size: int, max_tokens: int) -> None:
    """Check that every token id of a scoring is one, and that it is not too much.

    Args:
        request: to look at.
        vocab_size: token ids are below.
        max_tokens: prompt and all continuations together.

    Raises:
        FieldInvalidError: an empty prompt or continuation, too many of them or of their tokens, or an id outside the
            vocabulary.
    """
    _check_prompt(request.prompt_token_ids, vocab_size)
    if not 1 <= len(request.continuations) <= MAX_CONTINUATIONS:
        raise FieldInvalidError(
            "continuations", f"must be 1 to {MAX_CONTINUATIONS}, not {len(request.continuations)}"
        )
    if request.num_tokens > max_tokens:
        raise FieldInvalidError(
            "continuations", f"have {request.num_tokens} tokens with the prompt; the limit is {max_tokens}"
        )
    for index, continuation in enumerate(request.continuations):
        if not continuation:
            raise FieldInvalidError(f"continuations[{index}]", "is empty")
        _check_ids(f"continuations[{index}]", continuation, vocab_size)
    if request.num_given and len(request.num_given) != len(request.continuations):
        raise FieldInvalidError("num_given", "must be one number for each continuation")
    for index, (num_given, continuation) in enumerate(
        zip(request.num_given, request.continuations, strict=False)
    ):
        if not 0 <= num_given < len(continuation):
            raise FieldInvalidError(f"num_given[{index}]", f"must be from 0 to {len(continuation) - 1}")


def check_length(request: Request | ScoreRequest, num_virtual_tokens: int, max_context_length: int) -> None:
    """Check that the prompt leaves room for what follows: one output token, or the longest continuation.

    Raises:
        PromptTooLongError: it does not, the adapter's virtual tokens counted.
    """
    after = 1
    if isinstance(request, ScoreRequest):
        after = max(len(continuation) for continuation in request.continuations)
    limit = max_context_length - num_virtual_tokens - after
    if len(request.prompt_token_ids) > limit:
        raise PromptTooLongError("prompt", len(request.prompt_token_ids), max(limit, 0))


def _check_prompt(token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        raise FieldInvalidError("prompt", "is empty")
    _check_ids("prompt", token_ids, vocab_size)


def _check_ids(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise FieldInvalidError(field, f"token id {token_id} is outside the vocabulary of {vocab_size}")
