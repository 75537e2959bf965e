"""What becomes of a page of docs/ on the site: files of other folders as pages, links between them, generated parts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from references import command_line, openapi, protos, versions

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Pages that show a file from outside docs/, which a page cannot link to on the site.
SHOWN = {
    "project/architecture": ROOT / "ARCHITECTURE.md",
    "project/changelog": ROOT / "CHANGELOG.md",
    "project/examples": ROOT / "examples/README.md",
    "project/kubernetes": ROOT / "deploy/kubernetes/README.md",
    "reference/typescript-client": ROOT / "clients/typescript/README.md",
}
# Pages that end in what the sources say.
GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/command-line": command_line.markdown,
    "reference/grpc": protos.markdown,
    "reference/openapi": openapi.markdown,
    "reference/versions": versions.markdown,
}
# Stands in the index for the pages that nobody put into a group.
_OTHERS = "OTHER PAGES"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#|/)([^)#\s]+)(#[^)\s]*)?\)")


def page(name: str, text: str) -> str:
    """The Markdown that the site shows as the page ``name`` ("reference/grpc"), whose file has ``text``."""
    file = SHOWN.get(name)
    if file is not None:
        return linked(name, file.read_text(encoding="utf-8"), file.parent)
    text = linked(name, text, (DOCS / name).parent)
    if name == "index":
        found = sorted({path.stem for path in DOCS.glob("*.md")} - {name})
        text = text.replace(
            _OTHERS, "\n".join(each for each in found if not re.search(rf"^{each}$", text, re.MULTILINE))
        )
    make = GENERATED.get(name)
    return f"{text}\n{make()}" if make else text


def linked(name: str, text: str, folder: Path) -> str:
    """``text``, whose links are from ``folder``, with links as the page ``name`` of the site has them.

    A link to what the site does not have becomes its own text: what it names is in the repository.
    """
    pages = {file: DOCS / f"{shown}.md" for shown, file in SHOWN.items()}

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[2]))
        target = pages.get(target, target)
        if not target.is_relative_to(DOCS) or target.is_dir():
            return match[1]
        return f"[{match[1]}]({os.path.relpath(target, (DOCS / name).parent)}{match[3] or ''})"

    return _LINK.sub(link, text)
