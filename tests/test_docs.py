"""What README and docs name is there: paths of a clone, commands and flags, make's targets."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
import yaml

import write_models
from manyhats.cli.main import app
from manyhats.engine.model.families.reading import FAMILIES, REFUSED
from write_settings import with_tables

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted(path for path in (ROOT / "examples").glob("*.md"))
DOCUMENTS += sorted((ROOT / "deploy").rglob("*.md"))
DOCUMENTS += [ROOT / "clients" / "typescript" / "README.md"]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
TOP = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} | {".ci"}
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
INLINE = re.compile(r"`([^`\n]+)`")
ANCHORED = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Made by the commands that the text is about, not part of a clone.
MADE = ("examples/data/", "benchmarks/results/")


def code_lines(text: str) -> Iterator[str]:
    """The lines of code blocks, continued ones joined, prompts and comments taken off."""
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.removeprefix("$ ").removeprefix(".venv/bin/").strip()


def paths_in(text: str) -> set[str]:
    """What looks like a path below one of the clone's folders."""
    words = {word for span in INLINE.findall(text) for word in span.split()}
    words |= {word for line in code_lines(text) for word in line.partition(" #")[0].split()}
    words = {word.strip("'\",;").removeprefix("./") for word in words}
    named = {word for word in words if word.partition("/")[0] in TOP and "/" in word}
    return {word for word in named if not re.search(r"[*{}<>…=$]|::", word) and not word.startswith(MADE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_path_and_link_is_in_a_clone(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = {link for link in LINK.findall(text) if "://" not in link}
    missing = {link for link in links if not (document.parent / link).exists()}
    missing |= {path for path in paths_in(text) if not (ROOT / path).exists()}
    assert missing == set()


def anchors_of(document: Path) -> set[str]:
    """Anchors of the headings, as code hosts and the site make them."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_link_to_a_heading_finds_it(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    lost = set()
    for path, anchor in ANCHORED.findall(text):
        target = document.parent / path if path else document
        if "://" not in path and target.suffix == ".md" and anchor not in anchors_of(target):
            lost.add(f"{path}#{anchor}")
    assert lost == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_block_of_code_can_be_read(document: Path) -> None:
    """Python compiles, data parses; shells' lines are looked at above, and what calls a server is run elsewhere."""
    for kind, block in FENCE.findall(document.read_text(encoding="utf-8")):
        if kind == "python":
            compile(block, str(document), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif kind == "json":
            json.loads(block)
        elif kind == "yaml":
            yaml.safe_load(block)


def commands_in(text: str) -> list[list[str]]:
    """Calls of ``manyhats`` in code blocks, as words."""
    lines = (line.partition(" #")[0].strip() for line in code_lines(text))
    return [shlex.split(line) for line in lines if line.startswith("manyhats ")]


def resolved(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words begin with, and the words that follow."""
    command: click.Command = typer.main.get_command(app)  # type: ignore[assignment]
    rest = words[1:]
    while hasattr(command, "commands"):
        assert rest, f"{words} names no command"
        assert rest[0] in command.commands, f"{words}: there is no command {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_command_and_flag_exists(document: Path) -> None:
    for words in commands_in(document.read_text(encoding="utf-8")):
        command, rest = resolved(words)
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        flags = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert flags <= known | {"--help"}, f"{words}: no flag {flags - known}"


def test_readme_has_commands_and_paths_to_look_at() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(commands_in(text)) >= 12
    assert {"examples/adapters", "docs/benchmarks.md", ".ci/run"} <= paths_in(text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_target_of_make_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = {span for span in INLINE.findall(text) if span.startswith("make ")} | set(code_lines(text))
    targets = {match[1] for span in named if (match := re.match(r"make ([a-z-]+)", span))}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_readme_does_not_say_that_an_index_has_manyhats() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"pip install\s+['\"]?manyhats\b", document.read_text(encoding="utf-8"))


def test_readme_says_where_files_are_kept() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "MANYHATS_HOME" in text
    assert "~/.cache/manyhats" in text


def test_settings_are_listed_as_they_are_declared() -> None:
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert with_tables(text) == text, "python scripts/write_settings.py writes the tables anew"
    assert "| `max_sequences` | `--max-sequences N` | 64 | Sequences that run at once. |" in text


def test_models_are_listed_as_they_are_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write_models.main(["--check"]) == 0, "python scripts/write_models.py writes the tables anew"
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    for model_type in (*FAMILIES, *REFUSED):
        assert f"`{model_type}`" in text
    changed = tmp_path / "models.md"
    changed.write_text(text.replace("`distilbert`, ", ""), encoding="utf-8")
    monkeypatch.setattr(write_models, "PAGE", changed)
    assert write_models.main(["--check"]) == 1
    assert "+| prefix tuning | PEFT | every other family | `albert`, `distilbert`" in capsys.readouterr().out
