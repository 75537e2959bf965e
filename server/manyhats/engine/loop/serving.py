"""What every request needs to begin: facts of the model, and a sequence of its tokens on its adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from manyhats.engine.request import Request, ScoreRequest
from manyhats.engine.residency.lease import Lease
from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.scheduling.virtual_tokens import PLACEHOLDER_ID
from manyhats.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServingModel:
    """What requests need to know of the model.

    Attributes:
        base_digest: of weights and quantization.
        tokenizer: of the base.
        eos_token_ids: any of them ends a generation, as do those of a request's own tokenizer.
        max_context_length: prompt and output tokens together, at most.
        vocab_size: token ids are below.
    """

    base_digest: str
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_context_length: int
    vocab_size: int

    def tokenizer_of(self, request: Request | ScoreRequest) -> Tokenizer:
        """What reads and writes a request's text."""
        return request.tokenizer or self.tokenizer

    def eos_of(self, request: Request) -> frozenset[int]:
        """The ids that end a request's answer."""
        if request.tokenizer is None:
            return self.eos_token_ids
        own = {token_id for token_id in request.tokenizer.eos_token_ids if token_id < self.vocab_size}
        return self.eos_token_ids | own


def new_sequence(
    job_id: str,
    request: Request | ScoreRequest,
    token_ids: Seq[int],
    max_new_tokens: int,
    lease: Lease,
    model: ServingModel,
    shared: SharedPrefix | None = None,
) -> Sequence:
    """A sequence of a request's tokens, behind its adapter's virtual ones.

    ``shared`` is KV to start from that includes the virtual tokens; None is none but theirs.
    """
    num_tokens = lease.num_virtual_tokens + len(token_ids)
    return Sequence(
        id=job_id,
        token_ids=[PLACEHOLDER_ID] * lease.num_virtual_tokens + list(token_ids),
        max_num_tokens=min(num_tokens + max_new_tokens, model.max_context_length),
        cache_key=_cache_key(model.base_digest, request),
        placement=lease.placement,
        priority=request.priority,
        arrival=request.accepted_s,
        shared=shared,
        virtual=lease.virtual,
        has_waited=lease.has_waited,
    )


def _cache_key(base_digest: str, request: Request | ScoreRequest) -> bytes:
    """Root of the prefix cache's keys: what besides the tokens decides a KV block's content.

    The adapter counts by the digest of its bytes, never by name, so a replaced one shares nothing; its virtual
    tokens and their positions follow from it.
    """
    adapter = "" if request.adapter is None else request.adapter.digest
    digest = hashlib.blake2b(digest_size=16)
    for part in (base_digest, adapter, request.cache_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()
