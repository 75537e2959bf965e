"""How commands reach a server: the options of a connection, and a client whose errors become the command's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from manyhats.cli.options import common as opt
from manyhats.cli.options.address import check_address, explain
from manyhats.cli.terminal.failures import CommandError

if TYPE_CHECKING:
    from manyhats.client import Client, Credentials, ManyhatsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where a server is and how to reach it; every field is an option of the commands that use it."""

    server: opt.Server = opt.DEFAULT_SERVER
    timeout: opt.Timeout = None
    tls: opt.Tls = False
    tls_ca: opt.TlsCa = None
    tls_cert: opt.TlsCert = None
    tls_key: opt.TlsKey = None
    token: opt.Token = None
    token_in_clear: opt.TokenInClear = False

    def credentials(self) -> Credentials:
        """The encryption and token that the options ask for."""
        from manyhats.client import Credentials

        return Credentials(
            token=self.token,
            tls=self.tls,
            ca_file=self.tls_ca,
            cert_file=self.tls_cert,
            key_file=self.tls_key,
            allow_clear_token=self.token_in_clear,
        )


def takes_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of ``Connection`` as options, instead of its parameter ``connection``."""
    options = inspect.signature(Connection, eval_str=True).parameters
    names = [field.name for field in fields(Connection)]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        command(connection=Connection(**given), **values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        taken = options.values() if name == "connection" else [parameter]
        parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in taken]
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded


@contextmanager
def connect(connection: Connection) -> Iterator[Client]:
    """A client of a server.

    Raises:
        UsageError: the address is malformed.
        CommandError: for every ``ManyhatsError``, from connecting or in the block.
    """
    from manyhats.client import Client, ManyhatsError

    check_address("--server", connection.server)
    credentials = connection.credentials()
    try:
        with Client(connection.server, timeout_s=connection.timeout, credentials=credentials) as client:
            yield client
    except ManyhatsError as error:
        explanation = explain(connection.server, credentials.uses_tls) if _got_no_answer(error) else None
        raise CommandError(explanation or describe(error)) from error


def _got_no_answer(error: ManyhatsError) -> bool:
    """Whether gRPC itself raised it, not a server."""
    return not error.reason and error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "UNIMPLEMENTED")


def describe(error: ManyhatsError) -> str:
    """The error's message, with what someone at a terminal can do about it."""
    from manyhats.client import (
        AuthenticationError,
        CredentialsError,
        NoActiveVersionError,
        QueueFullError,
        TaskNotFoundError,
        UnavailableError,
    )

    match error:
        case UnavailableError() if not error.reason:
            return f"{error}; is `manyhats serve` running there?"
        case QueueFullError(retry_after_s=float(seconds)):
            return f"{error}; try again in {seconds:g} s"
        case TaskNotFoundError():
            return f"{error}; `manyhats adapters list` shows what there is"
        case NoActiveVersionError():
            return f"{error}; `manyhats adapters activate TASK@VERSION` activates one"
        case AuthenticationError():
            return f"{error} (MANYHATS_TOKEN, or --token)"
        case CredentialsError() if "without TLS" in error.message:
            return f"{error}; encrypt with --tls or --tls-ca FILE, or give --token-in-clear"
        case _:
            return str(error)
