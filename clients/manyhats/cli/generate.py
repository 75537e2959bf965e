"""``manyhats generate``: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli import options as opt
from manyhats.cli.connection import Connection, connect, takes_connection
from manyhats.cli.output import print_json

if TYPE_CHECKING:
    from manyhats.client import Client, GenerateOptions, Prompt

HELP = """Send one prompt and print the answer.

[bold]Examples[/bold]

  $ manyhats generate "The capital of France is"

  $ manyhats generate --task sql --stream "List all users older than 30."

  $ manyhats generate --chat --system "Be brief." "Who wrote Hamlet?"

  $ cat article.txt | manyhats generate --task tldr -

The prompt goes to the model as it is. With --chat it becomes a user
message in the chat template of the model or the task, which is what
instruction-tuned models expect.
"""

PromptText = Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.")]
Stream = Annotated[bool, typer.Option("--stream", "-s", help="Print the answer as it grows.")]
Chat = Annotated[bool, typer.Option("--chat", help="Send the prompt as a chat message.")]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", min=0, metavar="K", help="With --json: log-probabilities, and the K best."),
]


@takes_connection
def generate(
    prompt: PromptText,
    task: opt.Task = "",
    stream: Stream = False,
    chat: Chat = False,
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
    logprobs: Logprobs = None,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Send one prompt and print the answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
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
        "logprobs": None if logprobs is None else True,
        "top_logprobs": logprobs,
    }
    with connect(connection) as client:
        run = _stream if stream else _whole
        run(client, _as_prompt(text, chat or system is not None, system), task, options, as_json)


def _as_prompt(text: str, chat: bool, system: str | None) -> Prompt:
    from manyhats.client import ChatMessage

    if not chat:
        return text
    ahead = [] if system is None else [ChatMessage("system", system)]
    return [*ahead, ChatMessage("user", text)]


def _whole(client: Client, prompt: Prompt, task: str, options: GenerateOptions, as_json: bool) -> None:
    answer = client.generate(prompt, task_id=task, **options)
    if as_json:
        print_json(answer)
    else:
        typer.echo(answer.text)


def _stream(client: Client, prompt: Prompt, task: str, options: GenerateOptions, as_json: bool) -> None:
    with client.generate_stream(prompt, task_id=task, **options) as stream:
        for chunk in stream:
            if as_json:
                print_json(chunk, indent=None)
            else:
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
    if not as_json:
        typer.echo()
