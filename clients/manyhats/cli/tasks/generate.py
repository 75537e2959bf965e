"""``manyhats generate``: one prompt, one answer; or many prompts of a file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.tasks.prompts import answer_rows, rows_of
from manyhats.cli.terminal.failures import UsageError
from manyhats.cli.terminal.output import print_json
from manyhats.cli.terminal.progress import shown_wait

if TYPE_CHECKING:
    from manyhats.client import Client, GenerateOptions, Generation, Prompt

HELP = """Send a prompt, or those of a file, and print the answer.

[bold]Examples[/bold]

  $ manyhats generate "The capital of France is"

  $ manyhats generate --task sql --stream "List all users older than 30."

  $ manyhats generate --chat --system "Be brief." "Who wrote Hamlet?"

  $ cat article.txt | manyhats generate --task tldr -

  $ manyhats generate --choice yes --choice no "Is water wet?"

  $ manyhats generate --chat --json-schema person.json "Invent a person."

  $ manyhats generate --file prompts.jsonl --json > answers.jsonl

The prompt goes to the model unchanged. With --chat it becomes a user
message in the chat template of the model or the task, which is what
instruction-tuned models expect.

A file has a prompt in each line that is not empty. If its name ends with
.jsonl, each line is a JSON object with "prompt" or "messages", and
possibly "task". Answers come in the same order, between them a line of
dashes, or with --json a line of JSON each. A prompt that fails does not
stop the others; one that meets a full queue, or a server that restarts,
is sent again.
"""

PromptText = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.")
]
PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", metavar="FILE", help="Many prompts; - is stdin.")
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency", min=1, metavar="N", help="With --file: requests at a time.", show_default="32"
    ),
]
Stream = Annotated[bool, typer.Option("--stream", "-s", help="Print the answer as it is generated.")]
Chat = Annotated[bool, typer.Option("--chat", help="Send the prompt as a chat message.")]
NumSequences = Annotated[
    int | None,
    typer.Option(
        "--num-sequences",
        min=1,
        max=16,
        metavar="N",
        help="Answers to the same prompt, each sampled anew; between them a line of dashes.",
        show_default="1",
    ),
]
JsonSchema = Annotated[
    str | None,
    opt.constraint("--json-schema", metavar="FILE|TEXT", help="The answer is JSON that fits this schema."),
]
Regex = Annotated[
    str | None, opt.constraint("--regex", metavar="TEXT", help="The whole answer matches this expression.")
]
Grammar = Annotated[
    str | None,
    opt.constraint("--grammar", metavar="FILE|TEXT", help="The answer is of this grammar (Lark's notation)."),
]
Choice = Annotated[
    list[str] | None,
    opt.constraint("--choice", metavar="TEXT", help="The answer is this text, or that of another --choice."),
]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", min=0, metavar="K", help="With --json: log-probabilities, and the K best."),
]


@takes_connection
def generate(
    prompt: PromptText = None,
    file: PromptFile = None,
    concurrency: Concurrency = None,
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
    speculation: opt.Speculation = None,
    num_sequences: NumSequences = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    choice: Choice = None,
    logprobs: Logprobs = None,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Send a prompt, or those of a file, and print the answer."""
    if (prompt is None) == (file is None):
        raise UsageError("give either PROMPT or --file")
    if file is None and concurrency is not None:
        raise UsageError("--concurrency is for --file")
    if file is not None and stream:
        raise UsageError("--stream is for one prompt, not for --file")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json, which shows them")
    if (stream or file is not None) and (num_sequences or 1) > 1 and not as_json:
        name = "--stream" if stream else "--file"
        raise UsageError(f"{name} shows one answer; with --num-sequences it needs --json")
    is_chat = chat or system is not None
    rows = [] if file is None else rows_of(file, task, lambda line: _as_prompt(line, is_chat, system))
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    if not (rows or text or is_chat):
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
        "speculation": speculation,
        "num_sequences": num_sequences,
        "json_schema": _text_of("--json-schema", json_schema),
        "regex": regex,
        "grammar": _text_of("--grammar", grammar),
        "choice": choice or None,
        "logprobs": None if logprobs is None else True,
        "top_logprobs": logprobs,
    }
    with connect(connection) as client:
        note_beyond_context(client, options)
        if rows:
            answer_rows(client, rows, as_json, options, concurrency)
            return
        run = _stream if stream else _whole
        run(client, _as_prompt(text, is_chat, system), task, options, as_json)


def _text_of(option: str, value: str | None) -> str | None:
    """A schema or grammar that is given as itself or as a file; no text of one is without a colon or a brace."""
    if value is None or ":" in value or "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}: cannot read {value!r}: {error}") from error


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
        typer.echo("\n---\n".join(each.text for each in answer.sequences))
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
        may_be_by_task = options.get("max_new_tokens") is None and answer.adapter is not None
        if may_be_by_task and answer.usage.prompt_tokens + num_tokens < context:
            return  # the task's own default ended it
        typer.echo(
            f"note: cut after {num_tokens} of {wanted} tokens (--max-new-tokens): prompt and answer fill the context of"
            f" {context}",
            err=True,
        )
