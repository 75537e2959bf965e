"""The token file: what it may hold, what a scope reaches, and that changes hold at once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.server.access.errors import ConfigError
from manyhats.server.access.tokens import (
    Caller,
    Role,
    Scope,
    TokenFile,
    new_token,
    parse_tokens,
    token_entry,
)
from support.servers.secure import BOTH, add_token

DIGEST = "ab" * 32


def entry(name: str = "ci", sha256: str = DIGEST, roles: str = "[generate]", rest: str = "") -> str:
    return f"- name: {name}\n  sha256: {sha256}\n  roles: {roles}\n{rest}"


def test_tokens_are_long_random_and_recognisable() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(token.startswith("mh_") and len(token) == 46 and token.isascii() for token in made)


def test_an_entry_is_read_back_as_the_caller_it_was_made_for() -> None:
    token = new_token()
    text = token_entry("ci", token, [Role.GENERATE], ["sql", "team-a.*", "_base"])
    assert token not in text
    assert hashlib.sha256(token.encode()).hexdigest() in text
    caller = parse_tokens(text, "tokens").caller(token)
    scope = Scope(("sql", "team-a.*", "_base"))
    assert caller == Caller(name="ci", roles=frozenset({Role.GENERATE}), scope=scope, max_priority=0)


@pytest.mark.parametrize(
    ("roles", "given", "expected"),
    [
        ([Role.GENERATE], None, 0),
        ([Role.GENERATE], 7, 7),
        ([Role.GENERATE], -1, -1),
        ([Role.GENERATE, Role.MANAGE], None, None),
        ([Role.MANAGE], 3, 3),
    ],
)
def test_a_token_allows_the_priorities_of_its_entry_or_of_its_roles(
    roles: list[Role], given: int | None, expected: int | None
) -> None:
    token = new_token()
    caller = parse_tokens(token_entry("ci", token, roles, max_priority=given), "tokens").caller(token)
    assert caller is not None
    assert caller.max_priority == expected


def test_every_token_of_a_file_is_known_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    made = {name: add_token(path, name) for name in ("a", "b", "c")}
    tokens = TokenFile(path)
    for name, token in made.items():
        caller = tokens.caller(token)
        assert caller is not None
        assert (caller.name, caller.roles, caller.scope.is_everything) == (name, frozenset(BOTH), True)
    for other in ("", "a", made["a"][:-1], made["a"] + "x", made["a"].upper(), new_token(), "\ud800"):
        assert tokens.caller(other) is None


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "[]"])
def test_an_empty_file_knows_nobody(text: str) -> None:
    assert parse_tokens(text, "tokens").caller(new_token()) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{}", "the list"),
        ("tokens: []", "the list"),
        ("- a", "0"),
        ("[", "not YAML"),
        ("!!python/object/apply:os.system [true]", "not YAML"),
        (entry(sha256="ab"), "0.sha256"),
        (entry(sha256="xy" * 32), "0.sha256"),
        (entry(roles="[]"), "0.roles"),
        (entry(roles="[admin]"), "0.roles.0"),
        (entry(roles="generate"), "0.roles"),
        (entry(name="''"), "0.name"),
        (entry(name='"a b"'), "0.name"),
        (entry(name='"a\\n"'), "0.name"),
        (entry(rest="  tasks: []\n"), "0.tasks"),
        (entry(rest="  tasks: sql\n"), "0.tasks"),
        (entry(rest="  tasks: [SQL]\n"), "ci"),
        (entry(rest="  tasks: ['a/b']\n"), "ci"),
        (entry(rest="  tasks: ['sql@1']\n"), "ci"),
        (entry(rest="  tasks: ['[ab]']\n"), "ci"),
        (entry(rest="  task: [sql]\n"), "0.task"),
        (entry(rest="  max_priority: high\n"), "0.max_priority"),
        (entry(rest="  max_priority: 2147483648\n"), "0.max_priority"),
        (entry(rest="  token: mh_abc\n"), "0.token"),
        (entry() + entry(sha256="cd" * 32), "two tokens with the name ci"),
        (entry() + entry(name="other", sha256=DIGEST.upper()), "has a token twice"),
    ],
)
def test_a_file_that_is_none_is_one_error_that_says_where(text: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tokens(text, "tokens.yaml")
    assert caught.value.setting == "token_file"
    assert "tokens.yaml" in str(caught.value)
    assert fault in str(caught.value)


def test_errors_do_not_show_what_stands_in_the_file() -> None:
    for text in (
        entry(sha256="mh_secret"),
        entry(rest="  tasks: [mh_secret!]\n"),
        "mh_secret",
        "- [mh_secret",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_tokens(text, "tokens.yaml")
        assert "secret" not in str(caught.value)


def test_a_missing_file_and_a_binary_one_are_errors(tmp_path: Path) -> None:
    for path, fault in ((tmp_path / "none", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigError, match=fault):
            TokenFile(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        TokenFile(tmp_path / "binary")


@pytest.mark.parametrize(
    ("globs", "reached", "not_reached"),
    [
        (None, ["", "sql", "anything"], []),
        (("sql",), ["sql"], ["", "sql2", "my-sql", "SQL", "sql\n"]),
        (("*",), ["sql", "a.b-c"], [""]),
        (("_base",), [""], ["sql", "_base"]),
        (("*", "_base"), ["", "sql"], []),
        (("team-a.*", "shared"), ["team-a.sql", "shared"], ["team-b.sql", "team-a", ""]),
        (("a*b*c",), ["abc", "axxbxxc"], ["ab", "abcd"]),
    ],
)
def test_scopes_reach_what_their_globs_name(
    globs: tuple[str, ...] | None, reached: list[str], not_reached: list[str]
) -> None:
    scope = Scope(globs)
    assert [task for task in (*reached, *not_reached) if scope.reaches(task)] == reached


@given(st.lists(st.from_regex(r"[a-z0-9.*_-]{1,12}", fullmatch=True), min_size=1), st.text(max_size=10))
def test_no_glob_reaches_the_base_model(globs: list[str], task: str) -> None:
    scope = Scope(tuple(glob for glob in globs if glob != "_base") or ("x",))
    assert not scope.reaches("")
    if "*" in scope.globs or task in (scope.globs or ()):  # type: ignore[operator]
        assert scope.reaches(task) == bool(task)


def test_changes_hold_at_once_and_faulty_ones_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.yaml"
    old = add_token(path, "old")
    tokens = TokenFile(path)
    new = add_token(path, "new")
    assert (known(tokens, old), known(tokens, new)) == ("old", "new")
    good = path.read_text()
    path.write_text(good + "- half written")
    assert (known(tokens, old), known(tokens, new)) == ("old", "new")
    path.unlink()
    assert known(tokens, old) == "old"
    said = capsys.readouterr().out
    assert said.count("the old content stays") == 2
    assert old not in said
    path.write_text("")
    assert (known(tokens, old), known(tokens, new)) == (None, None)


def test_a_link_that_is_moved_to_another_file_is_a_change(tmp_path: Path) -> None:
    tokens = [add_token(tmp_path / name, name) for name in ("first", "second")]
    link = tmp_path / "link"
    link.symlink_to("first")
    followed = TokenFile(link)
    assert known(followed, tokens[0]) == "first"
    (tmp_path / "next").symlink_to("second")
    os.replace(tmp_path / "next", link)
    assert (known(followed, tokens[0]), known(followed, tokens[1])) == (None, "second")


def known(tokens: TokenFile, token: str) -> str | None:
    caller = tokens.caller(token)
    return None if caller is None else caller.name
