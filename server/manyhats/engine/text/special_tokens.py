"""Which tokens a tokenizer's files declare besides its vocabulary, if several files say so.

The rules are those of transformers' ``AutoTokenizer``. ``tokenizer_config.json`` names tokens by their role
(``eos_token``) and lists others. If it has ``added_tokens_decoder``, that table alone decides the flags of added
tokens; otherwise the older files count: ``special_tokens_map.json`` overrides the config, and the added tokens are
those of ``added_tokens.json``, with what ``tokenizer.json`` says about them. Everything declared is then added to the
tokenizer, special if a role or list names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from manyhats.engine.text.tokenizer_files import (
    ADDED_TOKENS_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
)

Token = str | AddedToken

STANDARD_PARTS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The roles that any tokenizer may have a token for; a model may have others, such as ``image_token``."""

_EXTRA = "extra_special_tokens"
_OLDER_EXTRA = "additional_special_tokens"
_ADDED = "added_tokens_decoder"


@dataclass(frozen=True, slots=True)
class Declarations:
    """What the files declare.

    Attributes:
        fields: the config's, overridden by the older files.
        own_parts: a model's own role, such as ``image_token`` → its token.
        added: tokens besides the vocabulary, in the order of their ids.
    """

    fields: Mapping[str, Any]
    own_parts: Mapping[str, Token]
    added: tuple[AddedToken, ...]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        parts: role → token; the standard roles first.
        others: those without a role.
    """

    parts: Mapping[str, Token]
    others: tuple[Token, ...]


def read_declarations(files: TokenizerFiles) -> Declarations:
    """What ``files`` declare.

    Raises:
        ModelError: a token is neither a string nor an object with ``content`` and flags.
    """
    fields = dict(files.config)
    if _OLDER_EXTRA in fields and not fields.get(_EXTRA):
        fields[_EXTRA] = fields.pop(_OLDER_EXTRA)
    own_parts = {
        name: fields.pop(name)
        for name, value in files.config.items()
        if _is_own_part(name) and isinstance(value, str)
    }
    _move_named_extras(fields, own_parts)
    if _ADDED in fields:
        declared = _table(files, fields[_ADDED])
    else:
        _apply_special_tokens_map(files, fields)
        _move_named_extras(fields, own_parts)
        declared = [*_older_added(files, fields), *_file_added(files)]
    added = dict(declared)
    by_content = {token.content: token for _, token in declared}
    for name, value in fields.items():
        if (name in STANDARD_PARTS or _is_own_part(name)) and isinstance(value, dict):
            fields[name] = _token(files, TOKENIZER_CONFIG_FILE, name, value)
        elif name in (_EXTRA, _OLDER_EXTRA):
            fields[name] = _tokens(files, name, value)
    for name in STANDARD_PARTS:
        if fields.get(name) is not None:
            value = _token(files, TOKENIZER_CONFIG_FILE, name, fields[name])
            fields[name] = by_content.get(str(value), value)
    return Declarations(
        fields,
        {name: _token(files, TOKENIZER_CONFIG_FILE, name, value) for name, value in own_parts.items()},
        tuple(token for _, token in sorted(added.items())),
    )


def special_tokens(
    declarations: Declarations, defaults: Mapping[str, str | None], padding_token: str | None
) -> SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
        declarations: what its files declare.
        defaults: role → token, of the tokenizer's class; the files override them, even with ``null``.
        padding_token: what ``tokenizer.json`` pads with, if anything: the pad token if nothing else names one.
    """
    fields = {**defaults, **declarations.fields}
    if padding_token is not None:
        fields.setdefault("pad_token", padding_token)
    others = fields.get(_EXTRA, fields.get(_OLDER_EXTRA)) or ()
    parts = {name: fields[name] for name in STANDARD_PARTS if fields.get(name) is not None}
    own = {
        name: value
        for name, value in fields.items()
        if _is_own_part(name) and isinstance(value, str | AddedToken)
    }
    return SpecialTokens({**parts, **own, **declarations.own_parts}, tuple(others))


def add_tokens(backend: Backend, added: tuple[AddedToken, ...], special: SpecialTokens) -> None:
    """Add the missing tokens to a tokenizer, and give those it has their flags."""
    tokens: list[Token] = list(added)
    known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *added)}
    for token in (*special.parts.values(), *special.others):
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    named = {str(token) for token in special.parts.values()}
    objects = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for each in objects:
        each.special = each.special or each.content in named
    backend.add_tokens(objects)


def add_tokens_as_special(backend: Backend, special: SpecialTokens) -> None:
    """Make the special tokens special to a tokenizer, with a special token's default flags."""
    literals = dict.fromkeys(str(token) for token in (*special.parts.values(), *special.others))
    backend.add_tokens([AddedToken(literal, special=True) for literal in literals])


def flags_of(token: AddedToken) -> tuple[str, bool, bool, bool, bool, bool]:
    """Content, single_word, lstrip, rstrip, normalized, special."""
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def added_flags(backend: Backend) -> list[tuple[int, tuple[str, bool, bool, bool, bool, bool]]]:
    """Id and ``flags_of`` of each added token, in the order of the ids."""
    return [
        (token_id, flags_of(token)) for token_id, token in sorted(backend.get_added_tokens_decoder().items())
    ]


def _is_own_part(name: str) -> bool:
    return name.endswith("_token") and name not in STANDARD_PARTS


def _move_named_extras(fields: dict[str, Any], own_parts: dict[str, Any]) -> None:
    if isinstance(fields.get(_EXTRA), dict):
        own_parts.update(fields.pop(_EXTRA))


def _apply_special_tokens_map(files: TokenizerFiles, fields: dict[str, Any]) -> None:
    """Let ``special_tokens_map.json`` override the config; extra tokens are joined."""
    for name, value in files.special_tokens.items():
        if isinstance(value, dict) and name not in (_EXTRA, _OLDER_EXTRA):
            value = _token(files, SPECIAL_TOKENS_FILE, name, {**value, "special": True})
        elif name == _EXTRA and isinstance(value, list):
            joined = list(fields.get(_EXTRA) or ())
            joined += [token for token in _tokens(files, name, value) if token not in joined]
            value = joined
        fields[name] = value


def _older_added(files: TokenizerFiles, fields: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """The tokens of ``added_tokens.json``: literal → id."""
    named = {str(fields[name]) for name in STANDARD_PARTS if fields.get(name)}
    named |= {str(token) for token in fields.get(_EXTRA) or ()}
    tokens = []
    for literal, token_id in files.added_tokens.items():
        if not isinstance(token_id, int):
            raise files.error(ADDED_TOKENS_FILE, f"{literal!r}: its id must be an integer, not {token_id!r}")
        is_special = literal in named
        tokens.append((token_id, AddedToken(literal, normalized=not is_special, special=is_special)))
    return tokens


def _file_added(files: TokenizerFiles) -> list[tuple[int, AddedToken]]:
    tokens = []
    for entry in files.tokenizer.get("added_tokens") or ():
        fields = dict(entry)
        token_id = fields.pop("id")
        tokens.append((token_id, _object(files, TOKENIZER_FILE, "added_tokens", fields)))
    return tokens


def _table(files: TokenizerFiles, table: Any) -> list[tuple[int, AddedToken]]:
    """``added_tokens_decoder``: id, as text, → token."""
    if not isinstance(table, dict):
        raise files.error(TOKENIZER_CONFIG_FILE, f"{_ADDED} must be an object")
    tokens = []
    for key, value in table.items():
        if not (key.isdecimal() and isinstance(value, dict)):
            raise files.error(TOKENIZER_CONFIG_FILE, f"{_ADDED}: {key!r} must be an id with an object")
        token = _object(files, TOKENIZER_CONFIG_FILE, f"{_ADDED}.{key}", value)
        tokens.append((int(key), token))
    return tokens


def _tokens(files: TokenizerFiles, name: str, value: Any) -> tuple[Token, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise files.error(
            TOKENIZER_CONFIG_FILE, f"{name} must be a list of tokens, or an object that names them"
        )
    tokens = []
    for each in value:
        # Objects without a type come from special_tokens_map.json, whose tokens are all special.
        is_typed = not isinstance(each, dict) or "__type" in each
        token = each if is_typed else {**each, "special": True}
        tokens.append(_token(files, TOKENIZER_CONFIG_FILE, name, token))
    return tuple(tokens)


def _token(files: TokenizerFiles, file: str, name: str, value: Any) -> Token:
    if isinstance(value, str | AddedToken):
        return value
    if isinstance(value, dict):
        return _object(files, file, name, value)
    raise files.error(file, f"{name} must be a string, or an object with content, not {value!r}")


def _object(files: TokenizerFiles, file: str, name: str, value: Mapping[str, Any]) -> AddedToken:
    flags = {key: flag for key, flag in value.items() if key != "__type"}
    try:
        return AddedToken(flags.pop("content"), **flags)
    except (TypeError, KeyError) as error:
        raise files.error(file, f"{name} is not a token: {error}") from error
