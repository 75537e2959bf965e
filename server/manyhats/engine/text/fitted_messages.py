"""Messages as a chat template takes them, where it would refuse or overlook what is said in another way elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

_SHORT_ID_LENGTH = 9
_TAKES_SHORT_IDS = re.compile(r"\bid\s*\|\s*length\s*(!=|==)\s*9\b")


def fitted_to(template: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The messages with ``system`` for ``developer`` if the template does not mention that role.

    And with the last nine characters of calls' ids if it takes no longer ones, as Mistral's.
    """
    if "developer" not in template:
        messages = [
            {**each, "role": "system"} if each.get("role") == "developer" else each for each in messages
        ]
    if _TAKES_SHORT_IDS.search(template):
        messages = [_with_short_ids(each) for each in messages]
    return messages


def _with_short_ids(message: Mapping[str, Any]) -> Mapping[str, Any]:
    changed: dict[str, Any] = {}
    if _is_long(answered := message.get("tool_call_id")):
        changed["tool_call_id"] = answered[-_SHORT_ID_LENGTH:]
    calls = message.get("tool_calls")
    if isinstance(calls, list) and any(
        isinstance(each, Mapping) and _is_long(each.get("id")) for each in calls
    ):
        changed["tool_calls"] = [_with_short_id(call) for call in calls]
    return {**message, **changed} if changed else message


def _with_short_id(call: Any) -> Any:
    if isinstance(call, Mapping) and _is_long(given := call.get("id")):
        return {**call, "id": given[-_SHORT_ID_LENGTH:]}
    return call


def _is_long(given: Any) -> TypeGuard[str]:
    return isinstance(given, str) and len(given) > _SHORT_ID_LENGTH
