"""The strings of a vocabulary's tokens, and which of them decoding skips."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend

from manyhats.engine.text.decoder_steps import byte_of, bytes_of


class Vocabulary:
    """Token strings by id; special ones separately if they are skipped."""

    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._special = _skipped_tokens(backend) if skip_special_tokens else {}

    def special(self, token_id: int) -> str | None:
        """The literal of a special token that is skipped; None for any other."""
        return self._special.get(token_id)

    def token(self, token_id: int) -> str | None:
        """The string of a token as the vocabulary has it; None for skipped and unknown ones."""
        if token_id in self._special or token_id < 0:
            return None
        return self._backend.id_to_token(token_id)


def _skipped_tokens(backend: Backend) -> dict[int, str]:
    """Id → literal of the tokens that decoding skips.

    Their flags do not say so: when a token is added again, special or not, the library may keep its old flag. So each
    is tried between two ordinary tokens; the backend may be in use meanwhile and stays unchanged.
    """
    added = backend.get_added_tokens_decoder()
    ordinary = (i for i in range(backend.get_vocab_size()) if i not in added and text_of(backend, i))
    around = next(ordinary, None)
    return {
        token_id: token.content
        for token_id, token in added.items()
        if (token.special if around is None else _is_skipped(backend, token_id, around, token.special))
    }


def _is_skipped(backend: Backend, token_id: int, around: int, has_flag: bool) -> bool:
    ids = [around, token_id, around]
    try:
        with_literal = decoded(backend, ids, skip_special_tokens=False)
        if decoded(backend, ids, skip_special_tokens=True) != with_literal:
            return True
        # A literal that does not show even here makes no difference that could be tried.
        is_seen = decoded(backend, [around, around], skip_special_tokens=False) != with_literal
    except ValueError:
        return has_flag
    return has_flag and not is_seen


def text_of(backend: Backend, token_id: int) -> str:
    """What the decoder makes of one token, or its literal if the decoder fails."""
    if token_id < 0:
        return ""
    try:
        return decoded(backend, [token_id], skip_special_tokens=False)
    except ValueError:
        return backend.id_to_token(token_id) or ""


def bytes_of_token(backend: Backend, token_id: int, *, is_byte_level: bool) -> bytes:
    """UTF-8 of one token's text, in which parts of characters are as they are."""
    token = backend.id_to_token(token_id) if token_id >= 0 else None
    if token is None:
        return b""
    if is_byte_level:
        return bytes_of(token)
    byte = byte_of(token)
    return text_of(backend, token_id).encode() if byte is None else bytes([byte])


def decoded(backend: Backend, ids: list[int], skip_special_tokens: bool) -> str:
    """What the decoder makes of tokens.

    Raises:
        ValueError: it fails, as some do on tokens that they were not made for.
    """
    try:
        return backend.decode(ids, skip_special_tokens=skip_special_tokens)
    except BaseException as error:
        # The library's panics are not an Exception, and would end the engine.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer's decoder failed: {error}") from error
