"""``manyhats adapters verify``, ``gc`` and ``export``: maintenance of a store, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.terminal.extras import needs_extra
from manyhats.cli.terminal.failures import CommandError
from manyhats.cli.terminal.output import human_bytes, print_json, print_table

if TYPE_CHECKING:
    from manyhats.adapters.store.store import AdapterStore

_STORE_HELP = """It needs no server, and may run beside one: give the --store and --catalogue
that the server was given. Its output names the store it looked in.
"""
VERIFY_HELP = f"""Read every stored adapter again, and compare it with its digest.

{_STORE_HELP}
A version whose files are damaged or missing is marked failed, and cannot be
activated until it is registered again. The exit code is 1 if there is one.

[bold]Examples[/bold]

  $ manyhats adapters verify --store ./store

  $ manyhats adapters verify --store s3://bucket/manyhats \\
    --catalogue postgresql+psycopg://db/manyhats --json
"""
GC_HELP = f"""Remove stored files that no version of any task needs.

{_STORE_HELP}
A server does this at start for a store in a directory; a store at a URL is
cleaned up only by this command.

[bold]Examples[/bold]

  $ manyhats adapters gc --store ./store

  $ manyhats adapters gc --store s3://bucket/manyhats \\
    --catalogue postgresql+psycopg://db/manyhats --older-than 3600
"""
EXPORT_HELP = f"""Write the files of a version to a directory, as they were registered.

{_STORE_HELP}
adapter_config.json, the weights and the tokenizer's text files are
written; other files of the directory, such as a README.md, were not kept.
The parts of a composed task go to directories part-0, part-1, ...
Without @VERSION, the active version is written.

[bold]Examples[/bold]

  $ manyhats adapters export sql ./sql --store ./store

  $ manyhats adapters export sql@2 ./sql-2 --store ./store
"""

Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="DIR|URL",
        envvar="MANYHATS_STORE",
        help="The store: a directory, or a URL such as s3://bucket/manyhats.",
        show_default="store in the cache's home",
    ),
]
Catalogue = Annotated[
    str,
    typer.Option(
        "--catalogue",
        metavar="URL",
        envvar="MANYHATS_CATALOGUE",
        help="The database of tasks and versions.",
        show_default="a file in the store's directory",
    ),
]
Name = Annotated[str, typer.Argument(metavar="TASK[@VERSION]", help="The task, or one version of it.")]
Target = Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")]
OlderThan = Annotated[
    float,
    typer.Option(
        "--older-than",
        metavar="SECONDS",
        min=0,
        help="At a URL: keep newer files, which a registration in progress may have written.",
    ),
]


def verify(store: Store = "", catalogue: Catalogue = "", as_json: opt.Json = False) -> None:
    """Read every stored adapter again, and compare it with its digest."""
    with opened(store, catalogue) as adapters:
        found = list(adapters.verify())
    where = place(store)
    if as_json:
        print_json(found)
    elif found:
        print_table(
            ("digest", "status", "versions"),
            [(each.digest, each.status, ", ".join(each.names)) for each in found],
        )
    num_bad = sum(each.status != "ok" for each in found)
    if num_bad:
        raise CommandError(f"damaged or missing: {num_bad} of {len(found)} stored adapters in {where}")
    typer.echo(f"stored adapters in {where}: {len(found)}, all as they were registered", err=True)


def gc(
    store: Store = "",
    catalogue: Catalogue = "",
    older_than: OlderThan = 24 * 3600.0,
    as_json: opt.Json = False,
) -> None:
    """Remove stored files that no version of any task needs."""
    with opened(store, catalogue) as adapters:
        swept = adapters.gc(older_than_s=older_than)
    if as_json:
        print_json(swept)
        return
    typer.echo(
        f"removed from {place(store)} what no version needs: {swept.num_artifacts} ({human_bytes(swept.size_bytes)});"
        f" unfinished: {swept.num_unfinished}"
    )


def export(
    name: Name, directory: Target, store: Store = "", catalogue: Catalogue = "", as_json: opt.Json = False
) -> None:
    """Write the files of a version to a directory, as they were registered."""
    with opened(store, catalogue) as adapters:
        written = adapters.export(name, directory)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        typer.echo(path)


@contextmanager
def opened(store: str, catalogue: str) -> Iterator[AdapterStore]:
    """A store without a base model.

    Raises:
        CommandError: it does not exist, or any error of the store in the block; names the store.
    """
    with needs_extra("server"):
        from manyhats.adapters.errors import AdapterError, ArgumentInvalidError
        from manyhats.adapters.store.opening import open_store
    where = place(store)
    try:
        # Nothing is swept: leftovers are for gc to find and count.
        adapters = open_store(where, None, catalogue_url=catalogue, create=False, sweep=False)
        try:
            yield adapters
        finally:
            adapters.close()
    except ArgumentInvalidError as error:
        raise CommandError(str(error).replace("directory: ", "DIR: ", 1)) from error
    except AdapterError as error:
        hint = "" if store else "; --store names the one a server uses"
        raise CommandError(f"{error} (looked in {where}{hint})") from error


def place(store: str) -> str:
    """The directory or URL of a store; the default one if none is named."""
    with needs_extra("server"):
        from manyhats.engine.home import default_home
    return store or str(default_home() / "store")
