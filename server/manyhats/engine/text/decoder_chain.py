"""The decoders of the ``tokenizers`` library, and chains of them, one token at a time.

A decoder turns the tokens of a text into other tokens, which are joined at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders
from tokenizers.decoders import Decoder

from manyhats.engine.text.decoder_steps import (
    ByteRuns,
    Bytes,
    Ctc,
    Each,
    FirstDiffers,
    LastDiffers,
    ReplaceInParts,
    Spaced,
    Step,
    StripParts,
    Unchanged,
    stripped,
)

# Where transformers' clean_up_tokenization removes spaces, in its order.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def steps_for(descriptions: Sequence[Mapping[str, Any]]) -> Callable[[], list[Step]] | None:
    """Make the steps of a decoder chain for one text.

    Args:
        descriptions: of its decoders, as ``tokenizer.json`` has them; none if there is no decoder.

    Returns:
        None if the output of one of them is certain only at the end.
    """
    if not descriptions:
        return lambda: [Spaced()]
    makers: list[Callable[[], Step]] = []
    is_one_token = False
    for description in descriptions:
        maker = (_part_step if is_one_token else _token_step)(description)
        if maker is None:
            return None
        makers.append(maker)
        is_one_token = is_one_token or description["type"] in ("Fuse", "ByteLevel")
    return lambda: [maker() for maker in makers]


def clean_up_steps() -> list[Step]:
    """The steps of ``clean_up_spaces`` for a text that comes in parts."""
    return [ReplaceInParts(spaced, spaced.strip()) for spaced in _SPACED]


def clean_up_spaces(text: str) -> str:
    """A text without the spaces that word tokenizers leave before punctuation and English contractions.

    Source: ``clean_up_tokenization`` of transformers.
    """
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip())
    return text


def push_through(steps: Sequence[Step], token: str) -> str:
    """What becomes certain after all ``steps`` with one more token."""
    tokens: Sequence[str] = (token,)
    for step in steps:
        tokens = [out for each in tokens for out in step.push(each)]
    return "".join(tokens)


def end_through(steps: Sequence[Step]) -> str:
    """What remains in all ``steps`` when no more tokens come."""
    tokens: list[str] = []
    for step in steps:
        tokens = [out for each in tokens for out in step.push(each)] + [*step.end()]
    return "".join(tokens)


def _token_step(description: Mapping[str, Any]) -> Callable[[], Step] | None:
    """The step of a decoder that takes tokens one by one."""
    match description:
        case {"type": "Replace", "pattern": pattern, "content": content}:
            decoder = _replace(pattern, content)
            return lambda: Each(lambda token: decoder.decode([token]))
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return lambda: Each(lambda token: stripped(token, content, start, stop))
        case {"type": "Metaspace"}:
            metaspace = _metaspace(description)
            return lambda: FirstDiffers(metaspace)
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            word_piece = decoders.WordPiece(prefix=prefix, cleanup=cleanup)
            return lambda: FirstDiffers(word_piece)
        case {"type": "BPEDecoder", "suffix": suffix}:
            bpe = decoders.BPEDecoder(suffix=suffix)
            return lambda: LastDiffers(bpe)
        case {"type": "CTC", "pad_token": pad, "word_delimiter_token": delimiter, "cleanup": cleanup}:
            ctc = decoders.CTC(pad_token=pad, word_delimiter_token=delimiter, cleanup=cleanup)
            return lambda: Ctc(ctc)
        case {"type": "ByteFallback"}:
            return ByteRuns
        case {"type": "ByteLevel"}:
            return Bytes
        case {"type": "Fuse"}:
            return Unchanged
        case _:
            return None


def _part_step(description: Mapping[str, Any]) -> Callable[[], Step] | None:
    """The step of a decoder that gets one token in parts; None if it must see the whole."""
    match description:
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            return lambda: ReplaceInParts(pattern, content)
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return lambda: StripParts(content, start, stop)
        case {"type": "Metaspace"}:
            metaspace = _metaspace(description)  # treats each character of the first token separately
            return lambda: Each(lambda part: metaspace.decode([part]))
        case {"type": "Fuse"}:
            return Unchanged
        case _:
            return None


def _replace(pattern: Mapping[str, str], content: str) -> Decoder:
    return decoders.Replace(pattern["String"] if "String" in pattern else Regex(pattern["Regex"]), content)


def _metaspace(description: Mapping[str, Any]) -> Decoder:
    return decoders.Metaspace(
        replacement=description["replacement"],
        prepend_scheme=description["prepend_scheme"],
        split=description["split"],
    )
