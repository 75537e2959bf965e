"""A lower bound on a text's tokens, from its bytes alone: what cannot fit is refused before it is tokenized.

If a tokenizer drops and folds nothing of a text, and has a token for each byte, no token stands for more bytes than the
longest one has, so that many bytes need that many tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from manyhats.engine.text.decoder_steps import byte_alphabet
from manyhats.engine.text.tokenizer_files import single_steps

# Unicode's normal forms shorten a text at most fourfold in UTF-8: a mathematical letter of four bytes becomes ASCII.
_UNICODE_SHRINKAGE = 4
_UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_KEEPS_ALL = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"})
_KEEPS_UNLESS_REMOVED = frozenset({"Split", "Punctuation"})
# Vocabularies may lack these: control characters, and bytes that assigned characters do not have. No normal form makes
# or changes them.
_RARE_BYTES = frozenset([*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)])


@dataclass(frozen=True, slots=True)
class TokenBound:
    """A text has at least as many tokens as bytes, without the ``uncounted``, divided by ``bytes_per_token``."""

    bytes_per_token: int
    uncounted: bytes = b""

    def min_tokens(self, text: str) -> int:
        """The least number of tokens in ``text``."""
        num_bytes = len(text.encode().translate(None, self.uncounted))
        return -(-num_bytes // self.bytes_per_token)


def token_bound(backend: Backend) -> TokenBound | None:
    """The bound of a tokenizer.

    Returns:
        None if nothing is certain: a normalizer or pre-tokenizer may drop text (as may an added token that takes
        the white space around it), or the model has one unknown token for any number of characters.
    """
    normalizers, pre_tokenizers = single_steps(backend.normalizer), single_steps(backend.pre_tokenizer)
    shrinkage = _shrinkage(normalizers)
    if shrinkage is None or not all(map(_keeps_text, pre_tokenizers)):
        return None
    if not isinstance(backend.model, models.BPE):
        return None
    reads_bytes = any(step["type"] == "ByteLevel" for step in (*normalizers, *pre_tokenizers))
    ordinary = _bytes_bound(backend) if reads_bytes else _fallback_bound(backend)
    if ordinary is None:
        return None
    return extended_bound(TokenBound(ordinary.bytes_per_token * shrinkage, ordinary.uncounted), backend)


def extended_bound(bound: TokenBound, backend: Backend) -> TokenBound | None:
    """The bound of a tokenizer that differs from another, whose bound is given, only in its added tokens.

    Returns:
        None if nothing is certain.
    """
    added = list(backend.get_added_tokens_decoder().values())
    shrinkage = _shrinkage(single_steps(backend.normalizer))
    if shrinkage is None or any(token.lstrip or token.rstrip for token in added):
        return None
    literals = [token.content for token in added]
    if backend.normalizer is not None:
        literals += [backend.normalizer.normalize_str(literal) for literal in literals]
    longest = max((len(literal.encode()) * shrinkage for literal in literals), default=0)
    return TokenBound(max(bound.bytes_per_token, longest), bound.uncounted)


def _shrinkage(normalizers: Sequence[Mapping[str, Any]]) -> int | None:
    """How many bytes may become one in all the steps together; None if any number may."""
    product = 1
    for step in normalizers:
        if step["type"] in _UNICODE_FORMS:
            product *= _UNICODE_SHRINKAGE
        elif step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            if pattern is None or len(step["content"].encode()) < len(pattern.encode()):
                return None
        elif step["type"] not in ("Prepend", "ByteLevel"):
            return None
    return product


def _keeps_text(pre_tokenizer: Mapping[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    if kind in _KEEPS_UNLESS_REMOVED:
        return bool(pre_tokenizer["behavior"] != "Removed")
    return kind in _KEEPS_ALL


def _bytes_bound(backend: Backend) -> TokenBound | None:
    """For a vocabulary whose characters stand for bytes."""
    missing = {byte for character, byte in byte_alphabet().items() if backend.token_to_id(character) is None}
    if missing - _RARE_BYTES:
        return None
    return TokenBound(max(map(len, backend.get_vocab())), bytes(missing))


def _fallback_bound(backend: Backend) -> TokenBound | None:
    """For a vocabulary whose missing characters fall back to single-byte tokens."""
    if not backend.model.byte_fallback:
        return None
    if any(backend.token_to_id(f"<0x{byte:02X}>") is None for byte in range(0x100)):
        return None
    return TokenBound(max(len(token.encode()) for token in backend.get_vocab()))
