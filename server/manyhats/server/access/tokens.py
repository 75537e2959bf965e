"""Bearer tokens: who a caller is, and what its token allows.

The token file is a YAML list with one entry per token. It has digests, never tokens:

    - name: ci                       # what logs call it
      sha256: 9f86d081884c7d65…      # SHA-256 of the token, in hexadecimal
      roles: [generate]              # generate, manage or both
      tasks: [sql, "team-a.*", _base]  # globs of task ids, and _base for the base model; left out: everything
      max_priority: 0               # the highest that its calls may ask for; left out: any if it manages, else 0

``manyhats token new`` makes a token of 256 random bits and its entry. A plain digest is enough: a token that cannot be
guessed cannot be found from its digest either.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from manyhats.server.access.errors import ConfigError, CredentialInvalidError, CredentialMissingError
from manyhats.server.access.followed_files import FollowedFiles
from manyhats.server.observability.task_labels import BASE_LABEL

_PREFIX = "mh_"  # so that scanners for leaked secrets can find one
_TOKEN_BYTES = 32
_MAX_FILE_BYTES = 4 * 1024 * 1024
_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}"
_GLOB = re.compile(r"[a-z0-9._*-]{1,64}")


class Role(Enum):
    """What a token is for."""

    GENERATE = "generate"
    MANAGE = "manage"


@dataclass(frozen=True, slots=True)
class Scope:
    """The tasks that a token covers; ``globs`` of None covers all of them, and the base model.

    ``*`` in a glob matches any characters; only ``_base`` covers the base model.
    """

    globs: tuple[str, ...] | None = None

    @property
    def is_everything(self) -> bool:
        """Whether it covers every task."""
        return self.globs is None

    def reaches(self, task_id: str) -> bool:
        """Whether it covers a task; "" is the base model."""
        if self.globs is None:
            return True
        if not task_id:
            return BASE_LABEL in self.globs
        return any(fnmatchcase(task_id, glob) for glob in self.globs if glob != BASE_LABEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The holder of a token, and what it may do."""

    name: str
    roles: frozenset[Role]
    scope: Scope = Scope()
    max_priority: int | None = None
    """The highest that it may ask for; None for any."""


EVERYBODY = Caller(name="", roles=frozenset(Role))
"""The caller if there are no tokens."""


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    caller: Caller


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one file."""

    _entries: tuple[_Entry, ...]

    @property
    def callers(self) -> tuple[Caller, ...]:
        """The holders of all tokens."""
        return tuple(entry.caller for entry in self._entries)

    def caller(self, token: str) -> Caller | None:
        """The holder of ``token``; None if it is unknown."""
        digest = token_digest(token)
        found: Caller | None = None
        # All are compared, each in constant time, so the time taken reveals nothing about any of them.
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        return found


class TokenFile:
    """The tokens of a file, reloaded when it changes. Thread-safe.

    Raises:
        ConfigError: the file cannot be read, or is not a token file.
    """

    def __init__(self, path: Path) -> None:
        self._tokens = FollowedFiles([path], lambda: read_tokens(path))

    @property
    def is_outdated(self) -> bool:
        """Whether the file has changed and cannot be read: then tokens are those that it had."""
        return self._tokens.is_outdated

    def caller(self, token: str) -> Caller | None:
        """The holder of ``token``; None if it is unknown."""
        return self._tokens.current.caller(token)

    def bearer(self, headers: Sequence[str], keys: Sequence[str] = ()) -> Caller:
        """The caller whose token is in the header ``authorization``, or in one that has nothing but the token.

        Args:
            headers: all values of ``authorization``.
            keys: all values of the others.

        Raises:
            CredentialMissingError, CredentialInvalidError: the caller is unknown, or gives two different tokens.
        """
        if not headers and not keys:
            raise CredentialMissingError
        if len(headers) > 1:
            raise CredentialInvalidError
        tokens = {key.strip() for key in keys}
        for header in headers:
            scheme, _, token = header.partition(" ")
            if scheme.lower() != "bearer":
                raise CredentialInvalidError
            tokens.add(token.strip())
        if len(tokens) > 1:
            raise CredentialInvalidError("the call shows two different tokens")
        caller = self.caller(tokens.pop())
        if caller is None:
            raise CredentialInvalidError
        return caller


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file.

    Raises:
        ConfigError: it cannot be read, or is not a token file.
    """
    return parse_tokens(_read(path), path.name)


class _EntryModel(BaseModel):
    """One entry as in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=rf"^{_NAME}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    max_priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


_ENTRIES = TypeAdapter(tuple[_EntryModel, ...])


def parse_tokens(text: str, file: str) -> Tokens:
    """The tokens of a token file's text; ``file`` is its name, for errors.

    Raises:
        ConfigError: it is not a token file; names the entry, never its content.
    """
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError("token_file", f"{file} is not YAML") from None
    try:
        entries = _ENTRIES.validate_python(() if content is None else content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the list"
        raise ConfigError("token_file", f"{file}: {place}: {first['msg']}") from None
    _check_entries(entries, file)
    return Tokens(tuple(_Entry(bytes.fromhex(each.sha256), _caller(each)) for each in entries))


def _check_entries(entries: Sequence[_EntryModel], file: str) -> None:
    _check_distinct((each.name for each in entries), f"{file} has two tokens with the name")
    _check_distinct((each.sha256.lower() for each in entries), f"{file} has a token twice, with digest")
    for entry in entries:
        for glob in entry.tasks or ():
            if glob != BASE_LABEL and _GLOB.fullmatch(glob) is None:
                text = f"a task consists of a-z 0-9 . _ - and *, or is {BASE_LABEL}"
                raise ConfigError("token_file", f"{file}: {entry.name}: {text}")


def _check_distinct(values: Iterable[str], fault: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ConfigError("token_file", f"{fault} {value}")
        seen.add(value)


def _caller(entry: _EntryModel) -> Caller:
    own = None if Role.MANAGE in entry.roles else 0
    return Caller(
        name=entry.name,
        roles=frozenset(entry.roles),
        scope=Scope(entry.tasks),
        max_priority=own if entry.max_priority is None else entry.max_priority,
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise ConfigError("token_file", f"{path} has over {_MAX_FILE_BYTES} bytes")
        return data.decode()
    except OSError as error:
        raise ConfigError("token_file", f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError("token_file", f"{path} is not UTF-8") from error


def new_token() -> str:
    """A token of 256 random bits, in characters that need no quoting anywhere."""
    return _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)


def token_digest(token: str) -> bytes:
    """SHA-256 of a token."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def token_entry(
    name: str,
    token: str,
    roles: Sequence[Role],
    tasks: Sequence[str] = (),
    max_priority: int | None = None,
) -> str:
    """The token file lines for one token; no ``tasks`` means everything, no ``max_priority`` that of its roles.

    Raises:
        ConfigError: the name or a task is invalid.
    """
    fields: dict[str, object] = {
        "name": name,
        "sha256": token_digest(token).hex(),
        "roles": [role.value for role in roles],
    }
    if tasks:
        fields["tasks"] = list(tasks)
    if max_priority is not None:
        fields["max_priority"] = max_priority
    text = yaml.safe_dump([fields], sort_keys=False, default_flow_style=None, width=10_000)
    parse_tokens(text, name)
    return text
