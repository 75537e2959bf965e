"""How tasks whose adapters bring their own text files read and write text.

An adapter's tokenizer must be the base's plus added tokens, so all that a task has of its own are those tokens, names
of special ones, and a chat template; vocabulary and merges are shared. Untrusted files are examined in separate
processes (``text_process``).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError
from manyhats.adapters.formats.text_files import (
    MAX_BYTES,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    decode_template,
    text_of,
)
from manyhats.adapters.sites import TextFacts
from manyhats.engine.errors import ModelError
from manyhats.engine.text.text_process import TextProcesses
from manyhats.engine.text.tokenizer import Tokenizer

_MAX_TOKEN_LENGTH = 1024
_MAX_CACHED = 256
_HOW_TO_GO_ON = "leave out the tokenizer's files, and the task uses the base's"


@dataclass(frozen=True, slots=True)
class TaskText:
    """What a task's text files mean relative to the base's tokenizer.

    Attributes:
        tokenizer: the task's; the base's own if they mean what the base's do.
        facts: what the store keeps about it.
    """

    tokenizer: Tokenizer
    facts: TextFacts


class TaskTexts:
    """Reads tasks' text files on one base; thread-safe. Recent results are cached.

    Args:
        base: the base's tokenizer.
        processes: where untrusted files are examined.
    """

    def __init__(self, base: Tokenizer, processes: TextProcesses) -> None:
        self.base = base
        self.processes = processes
        self._known: OrderedDict[str, TaskText] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, files: Mapping[str, bytes | bytearray]) -> TextFacts:
        """A ``TextCheck`` of the base; raises as ``read`` does."""
        return self.read(files).facts

    def read(self, files: Mapping[str, bytes | bytearray]) -> TaskText:
        """What an artifact's text files mean.

        Args:
            files: name → content; files other than text files are ignored.

        Raises:
            AdapterInvalidError: a file cannot be read, or the template does not compile; ``subject`` is the file.
            AdapterUnsupportedError: the tokenizer is not the base's plus added tokens.
            AdapterTooLargeError: a file is over its limit.
        """
        text = {name: bytes(content) for name, content in text_of(files).items()}
        for name, content in text.items():
            if len(content) > MAX_BYTES[name]:
                raise AdapterTooLargeError(name, f"has {len(content)} bytes; the limit is {MAX_BYTES[name]}")
        key = _digest(text)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        read = self._read(text) if text else TaskText(self.base, TextFacts())
        with self._lock:
            self._known[key] = read
            while len(self._known) > _MAX_CACHED:
                self._known.popitem(last=False)
        return read

    def _read(self, files: Mapping[str, bytes]) -> TaskText:
        new: list[tuple[int, str]] = []
        if set(files) == {TEMPLATE_FILE}:
            tokenizer = self.base.with_text(chat_template=decode_template(files[TEMPLATE_FILE]))
        else:
            tokenizer, new = self._tokenizer(files)
        template = tokenizer.chat_template
        if template is not None and template != self.base.chat_template:
            self._check_template(files, template)
        fingerprint = tokenizer.fingerprint
        if fingerprint == self.base.fingerprint:
            return TaskText(self.base, TextFacts())
        last_id, last_token = max(new, default=(-1, ""))
        return TaskText(tokenizer, TextFacts(fingerprint, self._notes(tokenizer), last_id + 1, last_token))

    def _tokenizer(self, files: Mapping[str, bytes]) -> tuple[Tokenizer, list[tuple[int, str]]]:
        """The task's tokenizer, and id and text of each token that the base's does not have."""
        try:
            found = self.processes.compare(files, self.base.files())
        except ModelError as error:
            file, _, problem = str(error).removeprefix("/").partition(": ")
            raise AdapterInvalidError(file, problem or "cannot be read") from error
        if "difference" in found:
            raise AdapterUnsupportedError(
                TOKENIZER_FILE,
                f"is not the base's tokenizer plus added tokens: {found['difference']}; {_HOW_TO_GO_ON}",
            )
        special_tokens: dict[str, str] = found["special_tokens"]
        if TOKENIZER_FILE not in files:
            special_tokens = {**self.base.special_tokens, **special_tokens}
        added = self._added_tokens(found["added_tokens"])
        tokenizer = self.base.with_text(
            chat_template=found["chat_template"],
            special_tokens=special_tokens,
            added_tokens=[token for _, token in added],
            cleans_up_spaces=found["cleans_up_spaces"],
            splits_special_tokens=found["splits_special_tokens"],
        )
        for token_id, token in added:
            if tokenizer.token_id(token.content) != token_id:
                raise AdapterUnsupportedError(
                    TOKENIZER_FILE,
                    f"gives '{token.content}' the id {token_id}, after ids that are not tokens; {_HOW_TO_GO_ON}",
                )
        new = [(i, token.content) for i, token in added if self.base.token_id(token.content) is None]
        return tokenizer, new

    def _added_tokens(self, found: Sequence[Sequence[Any]]) -> list[tuple[int, AddedToken]]:
        added = []
        for token_id, content, single_word, lstrip, rstrip, normalized, special in found:
            is_new = self.base.token_id(content) is None
            if is_new and len(content) > _MAX_TOKEN_LENGTH:
                raise AdapterTooLargeError(
                    TOKENIZER_FILE,
                    f"adds a token of {len(content)} characters; the limit is {_MAX_TOKEN_LENGTH}",
                )
            token = AddedToken(
                content,
                single_word=single_word,
                lstrip=lstrip,
                rstrip=rstrip,
                normalized=normalized,
                special=special,
            )
            added.append((token_id, token))
        return added

    def _check_template(self, files: Mapping[str, bytes], template: str) -> None:
        file = TEMPLATE_FILE if TEMPLATE_FILE in files else TOKENIZER_CONFIG_FILE
        if len(template.encode()) > MAX_BYTES[TEMPLATE_FILE]:
            raise AdapterTooLargeError(
                file, f"has a chat template of more than {MAX_BYTES[TEMPLATE_FILE]} bytes, the limit"
            )
        if problem := self.processes.compile_error(template):
            raise AdapterInvalidError(file, f"has a chat template that does not compile: {problem}")

    def _notes(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        notes = []
        if tokenizer.chat_template != self.base.chat_template:
            notes.append("has a chat template of its own")
        if num_added := tokenizer.vocab_size - self.base.vocab_size:
            notes.append(f"adds {num_added} tokens to the base's")
        eos = tokenizer.special_tokens.get("eos_token")
        if eos is not None and tokenizer.token_id(eos) is None:
            notes.append(
                f"its end-of-sequence token '{eos[:100]}' is not a token of the model and ends nothing"
            )
        elif eos is not None and eos != self.base.special_tokens.get("eos_token"):
            notes.append(f"its answers also end with '{eos[:100]}'")
        return tuple(notes)


def _digest(files: Mapping[str, bytes]) -> str:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
