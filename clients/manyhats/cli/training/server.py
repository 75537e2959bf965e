"""The server that ``manyhats train`` registers with, as its flags say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import typer

from manyhats.cli.options import common as options
from manyhats.cli.options.address import check_address
from manyhats.cli.options.connection import Connection
from manyhats.cli.terminal.failures import UsageError


def _register(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Registration", **settings)


Register: TypeAlias = Annotated[
    str | None,
    _register(
        "--register",
        metavar="HOST:PORT",
        help="Send the artifact to this server at the end, and make it the task's active version.",
    ),
]
NoActivate: TypeAlias = Annotated[
    bool, _register("--no-activate", help="Leave the task on the version that is active now.")
]
ActivateIf: TypeAlias = Annotated[
    str | None,
    _register(
        "--activate-if",
        metavar="CONDITION",
        help="Make it the active version only if this holds of its held-out results: loss, perplexity or accuracy,"
        " and of a head f1, mrr or pearson, as in 'accuracy >= 0.9 and loss < 1.5'. It is registered in any case.",
    ),
]
RegisterTimeout: TypeAlias = Annotated[
    float | None,
    _register("--timeout", metavar="SECONDS", min=0, help="How long the server may take to accept it."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The server that artifacts are registered with, and how it is reached."""

    register: Register = None
    no_activate: NoActivate = False
    activate_if: ActivateIf = None
    timeout: RegisterTimeout = None
    tls: options.Tls = False
    tls_ca: options.TlsCa = None
    tls_cert: options.TlsCert = None
    tls_key: options.TlsKey = None
    token: options.Token = None
    token_in_clear: options.TokenInClear = False

    @property
    def connection(self) -> Connection | None:
        """How to reach the server; None if nothing is to be registered.

        Raises:
            UsageError: the address is malformed, or the flags about activation contradict each other.
        """
        if self.register is None:
            for flag, is_given in (("--no-activate", self.no_activate), ("--activate-if", self.activate_if)):
                if is_given:
                    raise UsageError(f"{flag} needs --register HOST:PORT: nothing is activated without it")
            return None
        if self.no_activate and self.activate_if is not None:
            raise UsageError("--no-activate and --activate-if contradict each other")
        return Connection(
            server=check_address("--register", self.register),
            timeout=self.timeout,
            tls=self.tls,
            tls_ca=self.tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            token=self.token,
            token_in_clear=self.token_in_clear,
        )
