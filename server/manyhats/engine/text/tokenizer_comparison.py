"""Whether a tokenizer is another one plus added tokens, and which tokens those are.

Two tokenizers are compared by what they do: how their files are laid out, other ways of saying the same thing, and
whatever affects only offsets, padding and truncation do not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from manyhats.engine.text.special_tokens import added_flags
from manyhats.engine.text.tokenizer_files import TOKENIZER_FILE, steps_of
from manyhats.engine.text.tokenizer_parts import read_tokenizer

_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MAX_SHOWN = 80
# Only about offsets, which nobody uses here.
_IDLE_KEYS = frozenset({"trim_offsets"})


def compare_with_base(files: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, object]:
    """Read a tokenizer's files, and compare it with the base's.

    Args:
        files: name, one of ``tokenizer_files.TEXT_FILES``, → content. Without ``tokenizer.json`` the others refer to
            the base's tokenizer.
        base: the same of the base's tokenizer.

    Returns:
        ``difference``, the first; or ``added_tokens`` (``[id, *flags_of]`` each), ``special_tokens``,
        ``chat_template``, ``cleans_up_spaces`` and ``splits_special_tokens``.

    Raises:
        ModelError: a file cannot be read; the message begins with its name.
    """
    ours = read_tokenizer(base, "base").backend
    if TOKENIZER_FILE not in files:
        files = {**files, TOKENIZER_FILE: ours.to_str().encode()}
    read = read_tokenizer(files, "")
    if difference := first_difference(read.backend, ours):
        return {"difference": difference}
    return {
        "added_tokens": [[token_id, *flags] for token_id, flags in added_flags(read.backend)],
        "special_tokens": dict(read.special_tokens),
        "chat_template": read.chat_template,
        "cleans_up_spaces": read.cleans_up_spaces,
        "splits_special_tokens": bool(read.backend.encode_special_tokens),
    }


def first_difference(theirs: Backend, ours: Backend) -> str:
    """How a tokenizer differs from ``ours`` plus added tokens; empty if it does not."""
    mine, other = json.loads(ours.to_str()), json.loads(theirs.to_str())
    return next(_differences(mine, other), "") or _missing(theirs, ours)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    our_model, their_model = ours["model"], theirs["model"]
    yield from _value_differences("model.type", our_model.get("type"), their_model.get("type"))
    yield from _vocabulary_differences(_vocabulary(our_model), _vocabulary(their_model))
    yield from _merge_differences(our_model.get("merges") or [], their_model.get("merges") or [])
    for key in sorted({*our_model, *their_model} - {"vocab", "merges", "type"}):
        yield from _value_differences(
            f"model.{key}", our_model.get(key) or None, their_model.get(key) or None
        )
    for name in _PIPELINE:
        yield from _value_differences(name, _essence(ours.get(name), name), _essence(theirs.get(name), name))


def _vocabulary(model: Mapping[str, Any]) -> dict[str, Any]:
    """Token → id, or token → id and score for a Unigram model, whose ids are positions."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {token: (index, score) for index, (token, score) in enumerate(vocabulary)}


def _vocabulary_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    if ours == theirs:
        return
    for token, value in theirs.items():
        if token not in ours:
            yield f"model.vocab has {_shown(token)}, which the base's does not have"
        elif value != ours[token]:
            yield f"model.vocab has {_shown(token)} as {_shown(value)}, the base's as {_shown(ours[token])}"
    for token in ours:
        if token not in theirs:
            yield f"model.vocab lacks {_shown(token)} of the base's"


def _merge_differences(ours: list[Any], theirs: list[Any]) -> Iterator[str]:
    if ours == theirs:
        return
    for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            yield f"model.merges[{index}] is {_shown(their)}, the base's {_shown(our)}"
    yield f"model.merges has {len(theirs)} entries, the base's {len(ours)}"


def _value_differences(name: str, ours: Any, theirs: Any) -> Iterator[str]:
    if ours != theirs:
        yield f"{name} is {_shown(theirs)}, the base's {_shown(ours)}"


def _essence(component: Any, name: str) -> Any:
    """A step of the pipeline without the settings that change neither tokens nor text."""
    if isinstance(component, list):
        return [_essence(each, name) for each in component]
    if not isinstance(component, dict):
        return component
    if component.get("type") == "TemplateProcessing":
        return _added_around(component)
    if component.get("type") == "ByteLevel" and name in ("decoder", "post_processor"):
        return {"type": "ByteLevel"} if name == "decoder" else None
    steps = steps_of(component)
    if steps is not None:
        kept = [step for step in (_essence(each, name) for each in steps) if step is not None]
        return kept[0] if len(kept) == 1 else kept or None
    return {key: _essence(value, name) for key, value in component.items() if key not in _IDLE_KEYS}


def _added_around(component: dict[str, Any]) -> list[Any] | None:
    """What a template puts around a single text, as ids, with None for the text; None if nothing."""
    ids = {name: token.get("ids") for name, token in component.get("special_tokens", {}).items()}
    pieces = [
        ids.get(piece["SpecialToken"]["id"]) if "SpecialToken" in piece else None
        for piece in component["single"]
    ]
    return None if pieces == [None] else pieces


def _missing(theirs: Backend, ours: Backend) -> str:
    """Whether a token of ours is different or missing in theirs."""
    their_tokens = theirs.get_added_tokens_decoder()
    for token_id, token in sorted(ours.get_added_tokens_decoder().items()):
        found = their_tokens.get(token_id)
        content = theirs.id_to_token(token_id) if found is None else found.content
        if content != token.content:
            what = "lacks" if content is None else f"has {_shown(content)} in place of"
            return f"added_tokens {what} the base's {_shown(token.content)} (id {token_id})"
    return ""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
    return repr(text) if isinstance(value, str) else text
