"""Settings in environment variables, such as ``MANYHATS_MAX_TASKS``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from manyhats.settings.declaration import Setting
from manyhats.settings.reading import not_a_setting

PREFIX = "MANYHATS_"
# What Kubernetes sets in every container for a Service called manyhats.
_SERVICE_LINK = re.compile(r"MANYHATS_(SERVICE_(HOST|PORT)|PORT)(_|$)")


def read_variables(known: Iterable[Setting], environment: Mapping[str, str]) -> dict[str, str | list[str]]:
    """Setting → its variable's value; the parts between commas if it has several values.

    An empty variable counts as not given.
    """
    given: dict[str, str | list[str]] = {}
    for each in known:
        text = environment.get(each.variable, "")
        if text:
            has_several = each.has_several
            given[each.name] = [part.strip() for part in text.split(",")] if has_several else text
    return given


def check_variables(
    environment: Mapping[str, str], known: Collection[str], error: Callable[[str, str], Exception]
) -> None:
    """Refuse variables that begin like those of settings but are not settings.

    Args:
        environment: name → value.
        known: names of valid variables.
        error: made from a variable's name and what is wrong.

    Raises:
        ``error``: there is one; names the nearest valid one.
    """
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and environment[name]:
            hint = (
                "; Kubernetes sets it for a Service called manyhats, unless the pod has enableServiceLinks: false"
                if _SERVICE_LINK.match(name)
                else ""
            )
            raise error(name, not_a_setting(name, known) + hint)
