"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_MAX_NEW_TOKENS = 256


def _connection(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Connection and output", **settings)


def _stopping(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Stopping", **settings)


def _sampling(*names: str, **settings: Any) -> Any:
    panel = "Sampling (by default the task's, else greedy)"
    return typer.Option(*names, rich_help_panel=panel, **settings)


def constraint(*names: str, **settings: Any) -> Any:
    """An option that says what language the answer must be in."""
    return typer.Option(*names, rich_help_panel="Constraint (at most one)", **settings)


Server: TypeAlias = Annotated[
    str, _connection("--server", metavar="HOST:PORT", envvar="MANYHATS_SERVER", help="The server.")
]
Json: TypeAlias = Annotated[bool, _connection("--json", help="Print JSON on stdout.")]
Timeout: TypeAlias = Annotated[
    float | None, _connection("--timeout", metavar="SECONDS", min=0, help="Fail after this time.")
]

Token: TypeAlias = Annotated[
    str | None,
    _connection(
        "--token",
        metavar="TOKEN",
        envvar="MANYHATS_TOKEN",
        help="Identifies the caller. Other users of this machine can see flags; prefer the environment.",
    ),
]
TokenInClear: TypeAlias = Annotated[
    bool, _connection("--token-in-clear", help="Send the token to another machine even without TLS.")
]
Tls: TypeAlias = Annotated[
    bool,
    _connection(
        "--tls",
        envvar="MANYHATS_TLS",
        help="Encrypt; the server's certificate comes from a public authority.",
    ),
]
TlsCa: TypeAlias = Annotated[
    Path | None,
    _connection(
        "--tls-ca",
        metavar="FILE",
        envvar="MANYHATS_TLS_CA",
        help="Encrypt; the server's certificate comes from an authority in this PEM file.",
    ),
]
TlsCert: TypeAlias = Annotated[
    Path | None,
    _connection(
        "--tls-cert", metavar="FILE", envvar="MANYHATS_TLS_CERT", help="The caller's PEM certificate."
    ),
]
TlsKey: TypeAlias = Annotated[
    Path | None,
    _connection("--tls-key", metavar="FILE", envvar="MANYHATS_TLS_KEY", help="PEM key of that certificate."),
]

Task: TypeAlias = Annotated[
    str,
    typer.Option(
        "--task",
        "-t",
        metavar="TASK[@VERSION]",
        help="Answer as this task.",
        show_default="the base model",
    ),
]
System: TypeAlias = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system message before the conversation.")
]

MaxNewTokens: TypeAlias = Annotated[
    int | None,
    _stopping(
        "--max-new-tokens",
        "-n",
        metavar="N",
        min=1,
        help="Longest answer, in tokens; it also ends where the context does.",
        show_default=f"{DEFAULT_MAX_NEW_TOKENS}, or the task's",
    ),
]
Stop: TypeAlias = Annotated[
    list[str] | None,
    _stopping("--stop", metavar="TEXT", help="End the answer at this text or special token. Repeatable."),
]

SkipSpecialTokens: TypeAlias = Annotated[
    bool | None,
    _stopping(
        "--skip-special-tokens/--show-special-tokens",
        help="Whether the answer leaves special tokens out; the one that ends it is never part of it.",
        show_default="skip",
    ),
]

Temperature: TypeAlias = Annotated[
    float | None,
    _sampling("--temperature", metavar="T", min=0.0, help="0 is greedy, 1 the model's own distribution."),
]
TopK: TypeAlias = Annotated[
    int | None, _sampling("--top-k", metavar="K", min=0, help="Only the k most likely tokens; 0 is all.")
]
TopP: TypeAlias = Annotated[
    float | None,
    _sampling("--top-p", metavar="P", help="Only the most likely tokens, up to this total probability."),
]
MinP: TypeAlias = Annotated[
    float | None,
    _sampling(
        "--min-p", metavar="P", help="Only tokens with at least this fraction of the best one's probability."
    ),
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None,
    _sampling("--repetition-penalty", metavar="X", help="Above 1: repeat less of what was already said."),
]
Seed: TypeAlias = Annotated[
    int | None, _sampling("--seed", metavar="N", min=0, help="The same seed gives the same answer.")
]
Speculation: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--speculation",
        metavar="N",
        min=0,
        max=16,
        help="Guess up to N tokens ahead: the same answer, sooner where it repeats its prompt.",
        show_default="the task's, or 0",
    ),
]
