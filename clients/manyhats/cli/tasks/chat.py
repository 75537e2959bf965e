"""``manyhats chat``: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, describe, takes_connection
from manyhats.cli.tasks.generate import note_beyond_context, note_cut
from manyhats.cli.terminal.failures import print_error
from manyhats.cli.terminal.output import print_json

if TYPE_CHECKING:
    from manyhats.client import ChatMessage, Client, GenerateOptions

HELP = """Chat with a task, or with the base model.

[bold]Examples[/bold]

  $ manyhats chat

  $ manyhats chat --task sql --system "The tables are users and orders."

/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops
an answer. If stdin is not a terminal, each of its lines is a message.
"""


class Conversation:
    """What was said so far; the system message survives a reset."""

    def __init__(self, client: Client, task: str, system: str | None, options: GenerateOptions) -> None:
        from manyhats.client import ChatMessage

        self._client = client
        self._task = task
        self._options = options
        self._system = [] if system is None else [ChatMessage("system", system)]
        self._turns: list[ChatMessage] = []

    def reset(self) -> None:
        """Forget every turn."""
        self._turns.clear()

    def say(self, text: str, as_json: bool) -> None:
        """Send a message and print the answer as it comes; a message that fails is not remembered."""
        from manyhats.client import ChatMessage

        message = ChatMessage("user", text)
        prompt = [*self._system, *self._turns, message]
        with self._client.generate_stream(prompt, task_id=self._task, **self._options) as stream:
            for chunk in stream:
                if not as_json:
                    typer.echo(chunk.text, nl=False)
                    sys.stdout.flush()
            answer = stream.result()
        if as_json:
            print_json(answer, indent=None)
        else:
            typer.echo()
        note_cut(self._client, answer, self._options)
        self._turns += [message, ChatMessage("assistant", answer.text)]


@takes_connection
def chat(
    task: opt.Task = "",
    system: opt.System = None,
    max_new_tokens: opt.MaxNewTokens = None,
    stop: opt.Stop = None,
    skip_special_tokens: opt.SkipSpecialTokens = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    speculation: opt.Speculation = None,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Chat with a task, or with the base model."""
    options: GenerateOptions = {
        "max_new_tokens": max_new_tokens,
        "stop_sequences": stop or None,
        "skip_special_tokens": skip_special_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "speculation": speculation,
    }
    is_interactive = sys.stdin.isatty()
    with connect(connection) as client:
        note_beyond_context(client, options)
        if is_interactive:
            _greet(client, task)
        conversation = Conversation(client, task, system, options)
        for line in _messages(is_interactive):
            if line == "/exit":
                return
            if line == "/reset":
                conversation.reset()
            elif is_interactive:
                _say_and_survive(conversation, line, as_json)
            else:
                conversation.say(line, as_json)


def _greet(client: Client, task: str) -> None:
    """Say who is answering, which also detects an unreachable server or unknown task before the first message."""
    who = client.get_adapter(task).name if task else client.server_info().base_model
    typer.echo(f"{who}: /reset forgets the conversation, /exit leaves.", err=True)


def _messages(is_interactive: bool) -> Iterator[str]:
    """Lines that are not blank, until the end of input."""
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing and history
    with contextlib.suppress(EOFError):
        while True:
            line = input("> " if is_interactive else "").strip()
            if line:
                yield line


def _say_and_survive(conversation: Conversation, text: str, as_json: bool) -> None:
    """At a terminal, an error or Ctrl-C ends the answer, not the conversation."""
    from manyhats.client import ManyhatsError

    try:
        conversation.say(text, as_json)
    except KeyboardInterrupt:
        typer.echo()
    except ManyhatsError as error:
        print_error(describe(error))
