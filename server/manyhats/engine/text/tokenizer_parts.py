"""From a model's text files to its tokenizer, as transformers' ``AutoTokenizer`` reads them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from manyhats.engine.errors import ModelError
from manyhats.engine.text.special_tokens import (
    SpecialTokens,
    add_tokens,
    add_tokens_as_special,
    read_declarations,
    special_tokens,
)
from manyhats.engine.text.tokenizer_class import REBUILDS, Rebuild, class_name
from manyhats.engine.text.tokenizer_files import (
    TEXT_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
    parse_files,
)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerParts:
    """What a tokenizer is made of.

    Attributes:
        backend: neither truncates nor pads.
        special_tokens: role, such as ``eos_token`` → literal.
        chat_template: Jinja source; None if the files have none.
        cleans_up_spaces: whether decoding removes the spaces before punctuation, as WordPiece models need.
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    chat_template: str | None
    cleans_up_spaces: bool


def read_tokenizer(files: Mapping[str, bytes], origin: str) -> TokenizerParts:
    """The tokenizer parts that ``files`` describe.

    Args:
        files: name, one of ``TEXT_FILES``, → content. A tokenizer that comes without its model's ``config.json`` is
            read by ``tokenizer_config.json`` alone.
        origin: what errors call the place they come from.

    Raises:
        ModelError: there is no ``tokenizer.json``, or one of the files cannot be read.
    """
    parsed = parse_files(files, origin)
    name = class_name(parsed)
    if name is None or parsed.config.get("fix_mistral_regex"):
        return _by_transformers(files, parsed)
    declarations = read_declarations(parsed)
    backend = _backend(parsed)
    padding = backend.padding
    rebuild = REBUILDS.get(name)
    special = special_tokens(
        declarations,
        {} if rebuild is None else rebuild.defaults,
        None if padding is None else padding["pad_token"],
    )
    if rebuild is not None:
        backend = _rebuilt(parsed, backend, rebuild, declarations.fields, special)
    backend.encode_special_tokens = bool(declarations.fields.get("split_special_tokens"))
    add_tokens(backend, declarations.added, special)
    if rebuild is not None and rebuild.adds_named:
        add_tokens_as_special(backend, special)
    literals = {part: str(token) for part, token in special.parts.items()}
    return _parts(backend, literals, parsed.chat_template, declarations.fields)


def _backend(files: TokenizerFiles) -> Backend:
    try:
        return Backend.from_buffer(files.tokenizer_json)
    except Exception as error:  # the library raises plain Exception for anything malformed
        raise files.error(TOKENIZER_FILE, f"not a tokenizer: {error}") from error


def _rebuilt(
    files: TokenizerFiles,
    backend: Backend,
    rebuild: Rebuild,
    fields: Mapping[str, Any],
    special: SpecialTokens,
) -> Backend:
    unknown = str(special.parts.get("unk_token"))
    try:
        rebuilt = rebuild.set_up(files.tokenizer, fields, unknown)
    except Exception as error:  # as above
        raise files.error(TOKENIZER_FILE, f"does not fit its tokenizer_class: {error}") from error
    if backend.post_processor is not None:
        rebuilt.post_processor = backend.post_processor
    return rebuilt


def _parts(
    backend: Backend, special_tokens: Mapping[str, str], template: str | None, fields: Mapping[str, Any]
) -> TokenizerParts:
    backend.no_truncation()
    backend.no_padding()
    # transformers considers it harmful for BPE text, unless the config insists.
    insists = fields.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    cleans_up = fields.get("clean_up_tokenization_spaces") and (
        insists or not isinstance(backend.model, models.BPE)
    )
    return TokenizerParts(backend, special_tokens, template, bool(cleans_up))


def _by_transformers(files: Mapping[str, bytes], parsed: TokenizerFiles) -> TokenizerParts:
    """The tokenizer of a class that only transformers knows: exact, but importing it takes seconds."""
    from transformers import AutoTokenizer

    # Code that the files name is never run.
    config = {name: value for name, value in parsed.config.items() if name != "auto_map"}
    contents = {**files, TOKENIZER_CONFIG_FILE: json.dumps(config).encode()}
    with tempfile.TemporaryDirectory(prefix="manyhats-tokenizer-") as directory:
        for name in TEXT_FILES:
            if name in contents:
                Path(directory, name).write_bytes(contents[name])
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
            backend = tokenizer.backend_tokenizer
        except Exception as error:
            named = config.get("tokenizer_class") or parsed.model_config.get("model_type")
            raise ModelError(
                f"{parsed.origin}: transformers cannot read this tokenizer ({named}): {error}"
            ) from error
    fields = {
        name: getattr(tokenizer, name)
        for name in (
            "clean_up_tokenization_spaces",
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        )
    }
    return _parts(backend, tokenizer.special_tokens_map, parsed.chat_template, fields)
