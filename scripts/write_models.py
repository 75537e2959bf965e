"""Writes the tables of docs/models.md anew, from the families, methods and heads as the code declares them.

With ``--check`` it writes nothing, shows how the page differs from what it would be, and exits 1 if it does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from families_as_text import computes, files, title
from generated_file import write_or_check
from manyhats.adapters.errors import AdapterUnsupportedError
from manyhats.adapters.formats.adapterhub.places import places_of
from manyhats.adapters.formats.peft.task_head import KINDS
from manyhats.adapters.formats.saved_head import Part, alternatives, pooling_of
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.lowering.lowering import ADAPTERHUB_METHODS, METHODS
from manyhats.adapters.method import Method
from manyhats.adapters.methods.bottleneck import BottleneckMethod
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.model.describe import describe
from manyhats.engine.model.families.reading import FAMILIES, REFUSED, read_family
from manyhats.engine.model.layout import Family

PAGE = Path(__file__).resolve().parents[1] / "docs/models.md"
Rows = Iterable[tuple[str, ...]]


def table(*columns: str, rows: Rows) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_tables(text: str) -> str:
    """The page with what follows its headings, up to the next, replaced by tables."""
    found = {name: read_family({"model_type": name}) for name in sorted(FAMILIES)}
    bases = {name: _described(family) for name, family in found.items()}
    tables: Mapping[str, Callable[[], str]] = {
        "## Decoders": lambda: _families(found, is_decoder=True),
        "## Encoders": lambda: _families(found, is_decoder=False),
        "## Methods": lambda: _methods(bases),
        "## Heads": lambda: _heads(bases),
        "## Places of AdapterHub's bottlenecks": lambda: _places(bases),
        "## Refused families": lambda: table(
            "`model_type`", "why", rows=((_listed(names), why) for why, names in _by_reason(REFUSED).items())
        ),
    }
    for heading, make in tables.items():
        before, found_heading, rest = text.partition(f"{heading}\n")
        if not found_heading:
            raise ValueError(f"docs/models.md has no {heading!r}")
        prose, _, after = rest.partition("\n| ")
        _, mark, after = after.partition("\n## ")
        text = f"{before}{heading}\n{prose}\n{make()}{mark}{after}"
    return text


def _described(family: Family) -> BaseDescription:
    """A base of its default sizes, with all that its files may have."""
    return describe(family, names=(), digest="", has_pooler=bool(family.layout.pooler))


def _families(found: Mapping[str, Family], *, is_decoder: bool) -> str:
    rows = (
        (f"`{name}`", title(FAMILIES[name]), computes(family), files(family))
        for name, family in found.items()
        if (family.architecture.head is not None) == is_decoder
    )
    return table("`model_type`", "", "computes", "modules in files", rows=rows)


def _methods(bases: Mapping[str, BaseDescription]) -> str:
    rows: list[tuple[str, ...]] = []
    for library, methods in (("PEFT", METHODS), ("AdapterHub", ADAPTERHUB_METHODS)):
        for name, method in methods.items():
            title = name.value.replace("_", " ").replace("p tuning", "P-tuning")
            rows.append((title, library, *_served_and_refused(_refusals(method, bases), bases)))
    return table("method", "files of", "served on", "refused on", rows=rows)


def _served_and_refused(refused: Mapping[str, str], bases: Iterable[str]) -> tuple[str, str]:
    """The shorter of the two as lists of families, and the reasons."""
    served = [model_type for model_type in bases if model_type not in refused]
    groups = sorted(_by_reason(refused).items(), key=lambda group: -len(group[1]))
    if len(served) > len(refused):
        reasons = "; ".join(f"{_listed(names)}: {reason}" for reason, names in groups)
        return ("every other family", reasons) if refused else ("every family", "–")
    (reason, _), *others = groups
    reasons = "; ".join([*(f"{_listed(names)}: {why}" for why, names in others), f"others: {reason}"])
    return _listed(served), reasons


def _refusals(method: Method, bases: Mapping[str, BaseDescription]) -> dict[str, str]:
    """``model_type`` → why a method is not served there."""
    found = {}
    for model_type, base in bases.items():
        try:
            method.check_base(base)
        except AdapterUnsupportedError as error:
            found[model_type] = re.sub(rf"\b{re.escape(model_type)}\b", "it", error.description)
    return found


def _by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """Families by reason, without what it says of those that are served."""
    families: dict[str, list[str]] = {}
    for model_type, reason in refused.items():
        why = re.split("; (?:they are|it is) served on", reason)[0].removeprefix("asks for ")
        families.setdefault(why, []).append(model_type)
    return families


def _heads(bases: Mapping[str, BaseDescription]) -> str:
    kinds = {task_type: kind for task_type, kind in KINDS.items() if kind is not TaskKind.EMBED}
    rows: dict[tuple[str, ...], list[str]] = {}
    for model_type, base in bases.items():
        cells = (_head(kind, base) for kind in kinds.values())
        rows.setdefault((pooling_of(TaskKind.CLASSIFY, base).value, *cells), []).append(model_type)
    return table(
        "`model_type`",
        "a text's class is read from the",
        *(f"`{task_type}`" for task_type in kinds),
        rows=((_listed(names), f"{pooling} token", *cells) for (pooling, *cells), names in rows.items()),
    )


def _head(kind: TaskKind, base: BaseDescription) -> str:
    """The layers of a family's head; the last one may have several names."""
    choices = alternatives(kind, base)
    if not choices:
        return "–"
    last = " or ".join(_layer(parts[-1]) for parts in choices)
    return ", then ".join([*map(_layer, choices[0][:-1]), last])


def _layer(part: Part) -> str:
    more = [part.activation or "", f"normed by `{part.norm}`" if part.norm else ""]
    more.append("the base's unless saved" if part.is_base_s else "")
    notes = ", ".join(filter(None, more))
    return f"`{part.module}` ({notes})" if notes else f"`{part.module}`"


def _places(bases: Mapping[str, BaseDescription]) -> str:
    refused = _refusals(BottleneckMethod(), bases)
    return table(
        "`model_type`",
        "behind the attention",
        "behind the feed-forward",
        "",
        rows=_place_rows(bases, refused),
    )


def _place_rows(
    bases: Mapping[str, BaseDescription], refused: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    for model_type, base in bases.items():
        if model_type in refused:
            continue
        places = places_of(model_type)
        modules = (
            f"`{base.prefix}{places.module(0, name)}`".replace(".0.", ".{i}.", 1)
            for name in ("attention", "feed_forward")
        )
        notes = ["before the norm of the stream"] if places.is_normed else []
        notes += ["the attention's arguments are swapped"] if places.is_swapped else []
        yield (f"`{model_type}`", *modules, "; ".join(notes))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check; returns the exit code."""
    return write_or_check(PAGE, with_tables(PAGE.read_text(encoding="utf-8")), "write_models.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
