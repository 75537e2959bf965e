"""``manyhats generate``: one prompt, one answer."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli import options as opt
from manyhats.cli.connection import Connection, connect, takes_connection
from manyhats.cli.failures import UsageError
from manyhats.cli.output import print_json
from manyhats.cli.progress import shown_wait

if TYPE_CHECKING:
    from manyhats.client import Client, GenerateOptions, Generation, Prompt

HELP = """Send one prompt and print the answer.

[bold]Examples[/bold]

  $ manyhats generate "The capital of France is"

  $ manyhats generate --task sql --stream "List all users older than 30."

  $ manyhats generate --chat --system "Be brief." "Who wrote Hamlet?"

  $ cat article.txt | manyhats generate --task tldr -

The prompt goes to the model unchanged. With --chat it becomes a user
message in the chat template of the model or the task, which is what
instruction-tuned models expect.
"""

PromptText = Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.")]
Stream = Annotated[bool, typer.Option("--stream", "-s", help="Print the answer as it is generated.")]
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
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json, which shows them")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text and not chat and system is None:
        raise UsageError("PROMPT must not be empty")
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
        note_beyond_context(client, options)
        run = _stream if stream else _whole
        run(client, _as_prompt(text, chat or system is not None, system), task, options, as_json)


def _as_prompt(text: str, chat: bool, system: str | None) -> Prompt:
    from manyhats.client import ChatMessage

    if not chat:
        return text
    ahead = [] if system is None else [ChatMessage("system", system)]
    return [*ahead, ChatMessage("user", text)]


def _whole(client: Client, prompt: Prompt, task: str, options: GenerateOptions, as_json: bool) -> None:
    if sys.stderr.isatty():
        answer = _watched(client, prompt, task, options)
    else:
        answer = client.generate(prompt, task_id=task, **options)
    if as_json:
        print_json(answer)
    else:
        typer.echo(answer.text)
    note_cut(client, answer, options)


def _watched(client: Client, prompt: Prompt, task: str, options: GenerateOptions) -> Generation:
    """The same answer, streamed underneath, so that a terminal can show its progress."""
    with shown_wait() as show, client.generate_stream(prompt, task_id=task, **options) as stream:
        num_tokens = 0
        for chunk in stream:
            num_tokens += len(chunk.tokens)
            show(f"{num_tokens} tokens")
        return stream.result()


def _stream(client: Client, prompt: Prompt, task: str, options: GenerateOptions, as_json: bool) -> None:
    with client.generate_stream(prompt, task_id=task, **options) as stream:
        for chunk in stream:
            if as_json:
                print_json(chunk, indent=None)
            else:
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
        answer = stream.result()
    if not as_json:
        typer.echo()
    note_cut(client, answer, options)


def note_beyond_context(client: Client, options: GenerateOptions) -> None:
    """Say on stderr, before the answer, that more tokens are requested than the context has."""
    from manyhats.client import ManyhatsError

    wanted = options.get("max_new_tokens") or opt.DEFAULT_MAX_NEW_TOKENS
    if wanted <= opt.DEFAULT_MAX_NEW_TOKENS:
        return  # note_cut is early enough, and the server need not be asked
    with contextlib.suppress(ManyhatsError):  # the call itself will report what is wrong
        context = client.server_info().max_context_length
        if wanted >= context:
            typer.echo(
                f"note: {wanted} tokens (--max-new-tokens) do not fit: prompt and answer share the context of"
                f" {context}, and the answer ends there",
                err=True,
            )


def note_cut(client: Client, answer: Generation, options: GenerateOptions) -> None:
    """Say on stderr if an answer ended with the context, short of its token limit."""
    from manyhats.client import FinishReason

    wanted = options.get("max_new_tokens") or opt.DEFAULT_MAX_NEW_TOKENS
    num_tokens = answer.usage.generated_tokens
    if answer.finish_reason is FinishReason.LENGTH and num_tokens < wanted:
        context = client.server_info().max_context_length
        typer.echo(
            f"note: cut after {num_tokens} of {wanted} tokens (--max-new-tokens): prompt and answer fill the context of"
            f" {context}",
            err=True,
        )
