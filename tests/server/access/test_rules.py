"""The rules of access: roles, scopes, the base model, and methods that have no rule."""

from __future__ import annotations

import pytest

from manyhats.server.access.errors import PriorityNotAllowedError, RoleMissingError, TaskNotAllowedError
from manyhats.server.access.rules import RULES, check_access, check_priority
from manyhats.server.access.tokens import EVERYBODY, Caller, Role, Scope

ALL = frozenset(Role)


def scoped(*globs: str) -> Caller:
    return Caller(name="ci", roles=ALL, scope=Scope(globs))


@pytest.mark.parametrize("caller", [EVERYBODY, Caller(name="ops", roles=ALL)])
def test_a_method_without_a_rule_is_closed_to_everybody(caller: Caller) -> None:
    with pytest.raises(RoleMissingError, match="is closed to everyone"):
        check_access("Nothing", None, caller)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("task", [None, "", "hats"])
def test_everybody_may_call_whatever_has_a_rule(method: str, task: str | None) -> None:
    check_access(method, task, EVERYBODY)


@pytest.mark.parametrize("method", RULES)
def test_a_caller_without_roles_may_call_nothing(method: str) -> None:
    with pytest.raises(RoleMissingError):
        check_access(method, "", Caller(name="", roles=frozenset()))


@pytest.mark.parametrize("method", RULES)
def test_a_task_outside_the_scope_is_refused_and_before_it_is_known_nothing_is(method: str) -> None:
    check_access(method, None, scoped("mine"))
    check_access(method, "mine", scoped("mine"))
    with pytest.raises(TaskNotAllowedError):
        check_access(method, "hats", scoped("mine"))


@pytest.mark.parametrize("method", RULES)
def test_no_task_is_the_base_model_only_where_a_model_runs(method: str) -> None:
    check_access(method, "", scoped("_base"))
    if RULES[method].runs_model:
        with pytest.raises(TaskNotAllowedError):
            check_access(method, "", scoped("*"))
    else:
        check_access(method, "", scoped("mine"))


def test_a_priority_is_bounded_from_above_alone() -> None:
    bounded = Caller(name="ci", roles=ALL, max_priority=2)
    assert [check_priority(each, bounded) for each in (-9, 2)] == [-9, 2]
    assert check_priority(2**31 - 1, EVERYBODY) == 2**31 - 1
    with pytest.raises(PriorityNotAllowedError):
        check_priority(3, bounded)
