"""Who may call what: one table from the API's methods to roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from manyhats.adapters.errors import shown
from manyhats.server.access.errors import PriorityNotAllowedError, RoleMissingError, TaskNotAllowedError
from manyhats.server.access.tokens import Caller, Role


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method requires of its caller.

    Attributes:
        roles: one of these.
        runs_model: a call that names no task is about the base model.
    """

    roles: frozenset[Role]
    runs_model: bool = False


_GENERATES = Rule(frozenset({Role.GENERATE}), runs_model=True)
_MANAGES = Rule(frozenset({Role.MANAGE}))
_READS = Rule(frozenset(Role))
_IS_CLOSED = Rule(frozenset())

# Every method that needs a token. Lists of all tasks show those in the caller's scope.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Generate": _GENERATES,
        "GenerateStream": _GENERATES,
        "Score": _GENERATES,
        "Tokenize": _GENERATES,
        "Detokenize": _GENERATES,
        "TokenizerInfo": _GENERATES,
        "ChatCompletions": _GENERATES,
        "Completions": _GENERATES,
        "Responses": _GENERATES,
        "Embed": _GENERATES,
        "Classify": _GENERATES,
        "ClassifyTokens": _GENERATES,
        "Rerank": _GENERATES,
        "ListModels": _READS,
        "GetModel": Rule(frozenset(Role), runs_model=True),
        "RegisterAdapter": _MANAGES,
        "UploadAdapter": _MANAGES,
        "ActivateAdapter": _MANAGES,
        "PinAdapter": _MANAGES,
        "UnpinAdapter": _MANAGES,
        "DeleteAdapter": _MANAGES,
        "GetAdapter": _READS,
        "ListAdapters": _READS,
        "GetServerInfo": _READS,
        "GetCaller": _READS,
        "ServerReflectionInfo": _READS,
    }
)


def check_access(method: str, task: str | None, caller: Caller) -> None:
    """Check that a caller may make a call. A method without a rule is closed to everyone.

    Args:
        method: the API's name for it.
        task: what the call is about, "" if it names none; None before that is known: then only the role counts.
        caller: who makes it.

    Raises:
        RoleMissingError: none of the caller's roles allows the method.
        TaskNotAllowedError: the caller's scope does not include the task, whether or not it exists.
    """
    rule = RULES.get(method, _IS_CLOSED)
    if not caller.roles & rule.roles:
        raise RoleMissingError(method, [role.value for role in Role if role in rule.roles])
    is_about_none = task is None or not (task or rule.runs_model)
    if not is_about_none and not caller.scope.reaches(task or ""):
        raise TaskNotAllowedError(shown(task or ""))


def check_priority(priority: int, caller: Caller) -> int:
    """The priority that a call asks for, higher first.

    Raises:
        PriorityNotAllowedError: it is above what the caller may ask for.
    """
    if caller.max_priority is not None and priority > caller.max_priority:
        raise PriorityNotAllowedError(priority, caller.max_priority)
    return priority
