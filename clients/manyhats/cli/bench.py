"""``manyhats bench``: a load on a server, and how well it is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.terminal.extras import needs_extra
from manyhats.cli.terminal.failures import CommandError, UsageError
from manyhats.cli.terminal.output import print_json, print_table
from manyhats.cli.terminal.progress import shown_wait

if TYPE_CHECKING:
    from manyhats.client import AdapterInfo, Client
    from manyhats.load.report import Report
    from manyhats.load.run import Answer
    from manyhats.load.workload import Workload

HELP = """Put a load on a server, and print how well it is served.

Requests come at random times at a given rate, whether or not others have
been answered, as those of many callers do. Latencies count from when a
request was due. An answer is good if it is whole, its first token came in
time, and so did nearly all others.

[bold]Examples[/bold]

  $ manyhats bench --rate 4 --duration 60 --popularity zipf

  $ manyhats bench --preset churn --plot churn.png --report churn.json

  $ manyhats bench --task sql --task mood --prompt-tokens 100:2000 --rate 1

Without --task all tasks take part that generate; --base adds the base
model. Presets: steady (the default), zipf, cold (each task in turn),
overload, churn (callers leave, versions change), and greedy: for half of the
time the first task asks for four fifths of --rate, which should be its share
of what the server can answer, then for 50 times as much, while the others go
on as before. Options go before a preset's values. The answers are of no use:
prompts are random words, and EOS is ignored.
"""


@takes_connection
def bench(
    *,
    preset: Annotated[str, typer.Option(metavar="NAME", help="A load by name.")] = "steady",
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="TASK", help="One to ask, the most popular first. Repeatable."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, too.")] = False,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Requests a second.")] = None,
    duration: Annotated[float | None, typer.Option(metavar="S", help="Seconds in which they come.")] = None,
    popularity: Annotated[
        str | None,
        typer.Option(metavar="uniform|zipf|skewed|cold|greedy", help="How they spread over tasks."),
    ] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(metavar="A:B", help="Tokens of a prompt, about, from A to B.")
    ] = None,
    answer_tokens: Annotated[
        str | None, typer.Option(metavar="A:B", help="Tokens of an answer, from A to B.")
    ] = None,
    cancel: Annotated[
        float | None, typer.Option(metavar="SHARE", min=0, max=1, help="Of callers that leave early.")
    ] = None,
    swap_every: Annotated[
        float | None,
        typer.Option(metavar="S", min=0, help="Move a task to another of its versions so often."),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(metavar="S", help="Of each request; those that miss it fail.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same load again.")] = None,
    slo_first: Annotated[
        float, typer.Option(metavar="S", help="A good answer's first token comes within this time.")
    ] = 2.0,
    slo_gap: Annotated[
        float, typer.Option(metavar="S", help="Of its other tokens, 99 % come this soon after another.")
    ] = 0.5,
    top: Annotated[int, typer.Option(metavar="N", min=0, help="How many tasks the table shows.")] = 10,
    report_to: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write all numbers as JSON.")
    ] = None,
    plot_to: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture (.png, .svg, .pdf).")
    ] = None,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Put a load on a server, and print how well it is served."""
    from manyhats.load.report import COLUMNS, Objective, report, rows

    given = {
        "rate": _positive("--rate", rate),
        "duration_s": _positive("--duration", duration),
        "popularity": _popularity(popularity),
        "prompt_tokens": _range("--prompt-tokens", prompt_tokens),
        "answer_tokens": _range("--answer-tokens", answer_tokens),
        "cancel_share": cancel,
        "swap_every_s": swap_every,
        "deadline_s": _positive("--deadline", deadline),
        "seed": seed,
    }
    workload = _workload(preset, given)
    plot = _plot() if plot_to is not None else None
    with connect(connection) as client:
        tasks, versions = _tasks(client, task, base)
        with shown_wait() as show:
            answers = _run(connection, workload, tasks, versions, show)
    try:
        found = report(workload, Objective(slo_first, slo_gap), answers)
    except ValueError as error:
        raise CommandError(str(error)) from error
    _write(found, answers, report_to, plot_to, plot)
    if as_json:
        print_json(found.as_json())
        return
    print_table(COLUMNS, rows(found, top))
    typer.echo(_totals(found))


def _workload(preset: str, given: dict[str, Any]) -> Workload:
    from manyhats.load.workload import PRESETS

    if preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, not {preset}")
    return replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})


def _popularity(text: str | None) -> str | None:
    from manyhats.load.workload import POPULARITIES

    if text is not None and text not in POPULARITIES:
        raise UsageError(f"--popularity must be one of {', '.join(POPULARITIES)}, not {text}")
    return text


def _positive(option: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"{option} must be above 0, not {value:g}")
    return value


def _range(option: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise UsageError(f"{option} must be A:B, whole numbers with 1 ≤ A ≤ B, or one number, not {text}")
    return found


def _plot() -> Callable[[Sequence[Answer], Path], None]:
    """What draws; found before the load, not after it."""
    with needs_extra("train"):
        import matplotlib.figure  # noqa: F401

        from manyhats.load.plot import plot
    return plot


def _tasks(client: Client, names: list[str] | None, base: bool) -> tuple[list[str], dict[str, list[int]]]:
    """The tasks to ask, and the versions that each has."""
    versions: dict[str, list[int]] = {}
    generating: dict[str, None] = {}
    for info in client.list_adapters():
        versions.setdefault(info.task_id, []).append(info.version)
        if _generates(info):
            generating[info.task_id] = None
    missing = [name for name in names or () if name not in versions]
    if missing:
        raise CommandError(
            f"no such task: {', '.join(missing)}; `manyhats adapters list` shows what there is"
        )
    tasks = [*(names or generating), *([""] if base else [])]
    if not tasks:
        raise CommandError("the server has no task that generates; register some, or ask the --base")
    return tasks, {name: versions[name] for name in tasks if name}


def _generates(info: AdapterInfo) -> bool:
    return info.state == "active" and info.kind in ("", "generate")


def _run(
    connection: Connection,
    workload: Workload,
    tasks: list[str],
    versions: dict[str, list[int]],
    show: Callable[[str], None],
) -> list[Answer]:
    from manyhats.client import AsyncClient
    from manyhats.load.run import run_load

    async def run() -> list[Answer]:
        credentials = connection.credentials()
        # A refusal is what this is to count.
        async with AsyncClient(connection.server, credentials=credentials, retries=False) as client:
            return await run_load(
                client, workload, tasks, versions, lambda come, ended: show(f"{come} sent, {ended} ended")
            )

    return asyncio.run(run())


def _write(
    found: Report,
    answers: Sequence[Answer],
    report_to: Path | None,
    plot_to: Path | None,
    plot: Callable[[Sequence[Answer], Path], None] | None,
) -> None:
    import json

    try:
        if report_to is not None:
            report_to.write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
        if plot_to is not None and plot is not None:
            plot(answers, plot_to)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write: {error}") from error


def _totals(found: Report) -> str:
    refused = found.all.refused_ms
    said = (
        f"{found.all.num_requests} requests in {found.seconds:.1f} s, {len(found.tasks)} tasks: "
        f"{found.goodput:.2f} good answers and {found.tokens_per_s:.0f} tokens a second"
        + (f"; refusals took {refused[99]:.0f} ms (99 %), {refused[100]:.0f} at most" if refused else "")
    )
    if (beside := found.beside) is not None:
        said += (
            f"\nfirst tokens of the others, p95: {beside.normal_ms:.0f} ms beside the first task, "
            f"{beside.greedy_ms:.0f} ms while it was greedy: {beside.ratio:.2f} times"
        )
    return said
