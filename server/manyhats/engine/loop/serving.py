"""What every request needs to start: a check against facts about the model, and a sequence on its adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from manyhats.adapters.heads import Pooling
from manyhats.adapters.reserved_labels import EQUAL, read_entitlement
from manyhats.engine.errors import FieldInvalidError, PromptTooLongError
from manyhats.engine.request import MAX_CONTINUATIONS, MAX_INPUTS, EncodeRequest, Request, ScoreRequest
from manyhats.engine.residency.lease import Lease
from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.scheduling.virtual_tokens import PLACEHOLDER_ID
from manyhats.engine.text.stopping import StopChecker
from manyhats.engine.text.tokenizer import Tokenizer

ANY_VOCAB_SIZE = 2**31
"""More tokens than any task has: that of an adapter is known once it is loaded."""


@dataclass(frozen=True, slots=True)
class ServingModel:
    """What requests need to know about the model.

    Attributes:
        base_digest: of weights and quantization.
        tokenizer: the base's.
        eos_token_ids: any of them ends a generation, as do those of a request's own tokenizer.
        max_context_length: the maximum of prompt and output tokens together.
        vocab_size: token ids are below.
        sees_all: whether tokens of a text see those that follow them.
        pooling: of texts, unless a task or a request says otherwise.
        padding_id: a token that no text may have; None for none. RoBERTa's kin do not count it in positions.
    """

    base_digest: str
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_context_length: int
    vocab_size: int
    sees_all: bool = False
    pooling: Pooling = Pooling.LAST
    padding_id: int | None = None

    def tokenizer_of(self, request: Request | ScoreRequest) -> Tokenizer:
        """The tokenizer of a request."""
        return request.tokenizer or self.tokenizer

    def eos_of(self, request: Request) -> frozenset[int]:
        """The ids that end a request's answer."""
        return self.eos_with(request.tokenizer)

    def eos_with(self, tokenizer: Tokenizer | None) -> frozenset[int]:
        """The ids that end an answer in a task's own tokenizer; None for the base's."""
        if tokenizer is None:
            return self.eos_token_ids
        # What a task adds beyond the base's tokens has rows of its own; what the base itself has there has none.
        missing = {token_id for token_id in self.tokenizer.eos_token_ids if token_id >= self.vocab_size}
        return self.eos_token_ids | (set(tokenizer.eos_token_ids) - missing)

    def num_ids(self, tokenizer: Tokenizer) -> int:
        """The ids that a tokenizer may give: the base's, and those that a task's adds to them."""
        return self.vocab_size if tokenizer is self.tokenizer else max(self.vocab_size, tokenizer.vocab_size)

    def vocab_size_of(self, lease: Lease) -> int:
        """The number of tokens of a request's task."""
        return self.vocab_size if lease.vocab_size is None else lease.vocab_size


def new_sequence(
    job_id: str,
    request: Request | ScoreRequest | EncodeRequest,
    token_ids: Seq[int],
    max_new_tokens: int,
    lease: Lease,
    model: ServingModel,
    shared: SharedPrefix | None = None,
) -> Sequence:
    """A sequence of a request's tokens, after its adapter's virtual ones.

    ``shared`` is KV to start from, including that of the virtual tokens; None for theirs only.
    """
    num_tokens = lease.num_virtual_tokens + len(token_ids)
    return Sequence(
        id=job_id,
        token_ids=[PLACEHOLDER_ID] * lease.num_virtual_tokens + list(token_ids),
        max_num_tokens=min(num_tokens + max_new_tokens, model.max_context_length),
        cache_key=_cache_key(model.base_digest, request),
        placement=lease.placement,
        task="" if request.adapter is None else request.adapter.task_id,
        entitlement=EQUAL if request.adapter is None else read_entitlement(request.adapter.labels),
        priority=request.priority,
        deadline_s=request.deadline_s,
        arrival=request.accepted_s,
        shared=shared,
        virtual=lease.virtual,
        has_waited=lease.has_waited,
    )


def _cache_key(base_digest: str, request: Request | ScoreRequest | EncodeRequest) -> bytes:
    """Root of the prefix cache's keys: everything besides the tokens that determines a KV block's content.

    The adapter enters by the digest of its bytes, never by name, so a replaced one shares nothing; its virtual tokens
    and their positions follow from the digest.
    """
    adapter = "" if request.adapter is None else request.adapter.digest
    digest = hashlib.blake2b(digest_size=16)
    for part in (base_digest, adapter, request.cache_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def check_generation(request: Request, vocab_size: int, eos_token_ids: AbstractSet[int]) -> None:
    """Check that every token id of a generation is valid, and that some token may come first.

    Args:
        request: the one to check.
        vocab_size: token ids are below.
        eos_token_ids: the ones that end this request.

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
            f"must be 0 here: EOS and stop tokens may not come until then, and they are all {vocab_size} tokens",
        )


def check_scoring(request: ScoreRequest, vocab_size: int, max_tokens: int) -> None:
    """Check that every token id of a scoring is valid, and that it is not too large.

    Args:
        request: the one to check.
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
            "continuations",
            f"have {request.num_tokens} tokens including the prompt; the limit is {max_tokens}",
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


def check_encoding(request: EncodeRequest, vocab_size: int, padding_id: int | None) -> None:
    """Check that there are texts, and that every token id is valid.

    Raises:
        FieldInvalidError: there is none, or too many; a text is empty, or has padding, or an id outside the vocabulary.
    """
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise FieldInvalidError("inputs", f"must be 1 to {MAX_INPUTS}, not {len(request.inputs)}")
    for index, token_ids in enumerate(request.inputs):
        if not token_ids:
            raise FieldInvalidError(f"inputs[{index}]", "is empty")
        _check_ids(f"inputs[{index}]", token_ids, vocab_size)
        if padding_id in token_ids:
            raise FieldInvalidError(
                f"inputs[{index}]", f"has the token {padding_id}, which is padding in this model, and no text"
            )


def check_length(
    request: Request | ScoreRequest | EncodeRequest, num_virtual_tokens: int, max_context_length: int
) -> None:
    """Check that the prompt leaves room for what follows: one output token, or the longest continuation.

    Of an encoding, every text must fit.

    Raises:
        PromptTooLongError: it does not, counting the adapter's virtual tokens.
    """
    if isinstance(request, EncodeRequest):
        limit = max_context_length - num_virtual_tokens
        for index, token_ids in enumerate(request.inputs):
            if len(token_ids) > limit:
                raise PromptTooLongError(f"inputs[{index}]", len(token_ids), max(limit, 0))
        return
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
