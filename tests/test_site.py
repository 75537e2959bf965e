"""What the site adds to the pages of docs/: references from the sources, files of other folders, docstrings.

tests/deploy/test_site_build.py builds it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from manyhats.cli.main import app
from manyhats.v1 import adapter_pb2, encoding_pb2, generation_pb2, server_pb2
from references import command_line, openapi, protos, versions
from references.docstrings import readable
from references.pages import DOCS, GENERATED, SHOWN, page

ROOT = Path(__file__).parent.parent
FILES = [each.DESCRIPTOR for each in (generation_pb2, encoding_pb2, adapter_pb2, server_pb2)]
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def grpc() -> str:
    return protos.markdown()


def check_links(text: str) -> None:
    """What a generated page links to within itself is there, once."""
    targets = re.findall(r"^\(([^)]+)\)=$", text, re.MULTILINE)
    assert len(targets) == len(set(targets))
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert linked - set(targets) == set()
    assert len(linked) > 10


def test_the_grpc_reference_has_every_service_method_message_and_value(grpc: str) -> None:
    headings = HEADING.findall(grpc)
    for file in FILES:
        named = [*file.services_by_name, *file.message_types_by_name, *file.enum_types_by_name]
        named += [method.name for service in file.services_by_name.values() for method in service.methods]
        assert set(named) - set(headings) == set()
        for message in file.message_types_by_name.values():
            for field in message.fields:
                assert f"| `{field.name}` | {field.number} |" in grpc
        for enum in file.enum_types_by_name.values():
            for value in enum.values:
                assert f"| `{value.name}` | {value.number} |" in grpc
    check_links(grpc)


def test_the_grpc_reference_has_the_comments_and_the_forms_of_calls(grpc: str) -> None:
    assert "[GenerateRequest](#grpc-GenerateRequest) → stream of [GenerateStreamResponse]" in grpc
    assert "→ [UploadAdapterResponse](#grpc-UploadAdapterResponse)" in grpc
    assert (
        "Generates one answer and streams it; the pieces concatenated equal the answer of Generate." in grpc
    )
    assert "Errors: `INVALID_ARGUMENT` (`FIELD_INVALID`" in grpc
    assert "| `ids` | 1 | repeated uint32 | At least one; each below the vocabulary's size. |" in grpc
    assert "optional bool" in grpc
    assert "map of string to string" in grpc
    assert "One of `prompt`." in grpc
    assert "buf:lint" not in grpc


def test_the_http_reference_has_every_route_and_message() -> None:
    document = json.loads((ROOT / "docs/openapi.json").read_text(encoding="utf-8"))
    text = openapi.markdown(document)
    headings = HEADING.findall(text)
    for path, methods in document["paths"].items():
        assert {f"`{method.upper()} {path}`" for method in methods} <= set(headings)
    for name, schema in document["components"]["schemas"].items():
        assert name in headings
        for field in schema.get("properties", ()):
            assert f"| `{field}` |" in text
    check_links(text)
    assert "`text/event-stream` of [ChatChunk](#http-ChatChunk) or [ErrorAnswer](#http-ErrorAnswer)" in text
    assert "| `X-Request-Id` | header | string. An id for the call" in text
    assert "list of [ChatChoice](#http-ChatChoice)" in text


def test_the_reference_of_commands_has_every_command_and_flag() -> None:
    text = command_line.markdown()
    headings = HEADING.findall(text)
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:  # type: ignore[union-attr]
            name = command.name or command.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
            assert f"`manyhats {group.name} {name}`" in headings
    assert {"`manyhats serve`", "`manyhats train`", "`manyhats generate`", "`manyhats adapters`"} <= set(
        headings
    )
    assert "| `--max-sequences` `N` | Sequences that run at once. Default: 64. |" in text
    assert "```console\n$ manyhats adapters activate sql@2\n```" in text
    assert "[bold]" not in text
    assert not re.search(r"\[/?[a-z]+\]", re.sub(r"`[^`]*`|```.*?```", "", text, flags=re.DOTALL))


def test_the_list_of_versions_says_the_lowest_and_the_usual_ones() -> None:
    text = versions.markdown()
    assert re.search(r"^\| `grpcio` \| >=1\.\d+\.\d+ \| 1\.\d+\.\d+ \|$", text, re.MULTILINE)
    assert "## The server: `[server]`" in text
    assert re.search(r"^\| `torch` \|", text, re.MULTILINE)
    assert "| `gcsfs` | >=2025.3 | not tested |" in text


def test_every_page_is_in_the_index() -> None:
    """Those that nobody grouped are among the operations."""
    text = page("index", (DOCS / "index.md").read_text(encoding="utf-8"))
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    listed = set(re.findall(r"^[\w/-]+$", text, re.MULTILINE))
    assert {name for name in pages - {"index"} if not name.startswith("decisions/0")} <= listed
    assert len(re.findall(r"^http$", text, re.MULTILINE)) == 1
    assert re.findall(r"^0\*$", (DOCS / "decisions/index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*GENERATED, *SHOWN} <= pages


def test_a_page_shows_a_file_of_another_folder_with_links_that_the_site_has() -> None:
    shown = page("project/architecture", "")
    assert shown.startswith("# Architecture")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", shown)
    assert [link for link in links if not (DOCS / "project" / link).exists()] == []
    assert (
        page("tasks", "see [examples](../examples/README.md#tasks)")
        == "see [examples](project/examples.md#tasks)"
    )
    assert (
        page("tasks", "[a](reading.md#b), [c](https://d/e) [f](#g)")
        == "[a](reading.md#b), [c](https://d/e) [f](#g)"
    )
    assert page("tasks", "[sql](../examples/adapters/sql)") == "sql"
    assert page("http", "![The page](page-wide-light.png)") == "![The page](page-wide-light.png)"


def test_docstrings_have_their_code_trees_and_keys_as_blocks() -> None:
    lines = [
        "Does.",
        "",
        "    with a:",
        "        b()",
        "",
        "After.",
        "",
        "Args:",
        "    x: [N].",
        "        more.",
    ]
    assert readable(lines)[:6] == ["Does.", "", ".. code-block:: python", "", "    with a:", "        b()"]
    assert readable(lines)[-3:] == ["Args:", "    x: [N].", "        more."]
    tree = ["Errors.", "", "Root", "├── A  a", "    └── B", "", "More."]
    block = [".. code-block:: text", "", "    Root", "    ├── A  a", "        └── B", "", "More."]
    assert readable(tree)[2:] == block
    keys = ["Keys, of one kind:", "    a: the first,", "        and more.", "    b: the other."]
    listed = [
        ".. rubric:: Keys, of one kind",
        "",
        "* **a** – the first,",
        "  and more.",
        "* **b** – the other.",
    ]
    assert readable(keys)[1:] == listed
