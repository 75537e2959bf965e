"""Constraints are compiled where hostile ones do no harm, and kept for those that come again."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from manyhats.engine.constraint import Constraint, ConstraintKind
from manyhats.engine.errors import DrainingError, FieldInvalidError
from manyhats.engine.sampling import grammars as grammars_module
from manyhats.engine.sampling.grammars import Grammars
from manyhats.engine.sampling.matcher import Matcher
from manyhats.engine.text.tokenizer import Tokenizer
from support.factories.tiny_models import EOS_TOKEN_ID, TINY_VOCAB_SIZE
from support.fakes.server import eventually
from support.harnesses.grammars import allowed_ids

EOS = frozenset({EOS_TOKEN_ID})
YES = Constraint("choice", ("yes", "no"))


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    made = Grammars(lambda tokenizer: TINY_VOCAB_SIZE)
    yield made
    made.close()


def chain(length: int) -> str:
    rules = (f"a{index}: a{index + 1}" for index in range(length))
    return "\n".join(["start: a0", *rules, f'a{length}: "x"'])


HOSTILE: list[tuple[ConstraintKind, str, str]] = [
    # Interrupted by nothing, it takes 14 s.
    ("json_schema", '{"type": "integer", "multipleOf": 999983}', "takes over 0.2 s of processor time"),
    # It overflows the stack, which ends a process.
    ("grammar", chain(4000), "nested too deeply"),
    ("grammar", "start: A\nA: " + " & ".join(f"/.*a.{{{index}}}/" for index in range(200)), "processor time"),
    ("regex", "(" * 30_000 + ")" * 30_000, "nest"),
    ("regex", "((a{1000}){1000}){1000}", ""),
    ("grammar", "start: " + "(" * 30_000, "nested"),
    ("json_schema", '{"anyOf": [' + ",".join(['{"oneOf": [{"type": "object"}, {}]}'] * 1000) + "]}", "oneOf"),
]


@pytest.mark.parametrize(("kind", "source", "problem"), HOSTILE)
async def test_hostile_constraints_are_refused_and_leave_no_trace(
    grammars: Grammars,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    kind: ConstraintKind,
    source: str,
    problem: str,
) -> None:
    monkeypatch.setattr(grammars_module, "COMPILE_CPU_S", 0.2)
    with pytest.raises(FieldInvalidError) as refused:
        await grammars.matcher(Constraint(kind, source), tokenizer, EOS)
    assert refused.value.field == kind
    assert problem in refused.value.description
    assert allowed_ids(await grammars.matcher(YES, tokenizer, EOS), TINY_VOCAB_SIZE)
    assert grammars.num_waiting == 0


async def test_the_event_loop_runs_while_a_constraint_compiles(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    compiling = asyncio.create_task(
        grammars.matcher(Constraint("json_schema", HOSTILE[0][1]), tokenizer, EOS)
    )
    num_turns = 0
    while not compiling.done():
        await asyncio.sleep(0.01)
        num_turns += 1
    assert num_turns > 10
    with pytest.raises(FieldInvalidError):
        await compiling


async def test_equal_constraints_are_compiled_once(grammars: Grammars, tokenizer: Tokenizer) -> None:
    compiled: list[float] = []
    grammars.on_compile = compiled.append
    matchers = await asyncio.gather(
        *(grammars.matcher(Constraint("choice", ["yes", "no"]), tokenizer, EOS) for _ in range(8))
    )
    first = min(allowed_ids(matchers[0], TINY_VOCAB_SIZE))
    assert matchers[0].advance(first)
    assert len(compiled) == 1
    assert first in allowed_ids(matchers[1], TINY_VOCAB_SIZE), "answers share a state"
    for other in (Constraint("choice", ("yes",)), Constraint("regex", "yes|no")):
        await grammars.matcher(other, tokenizer, EOS)
    await grammars.matcher(YES, tokenizer.with_text(chat_template="{{ messages }}"), EOS)
    assert len(compiled) == 3, "another template alone makes no other vocabulary"
    await grammars.matcher(YES, tokenizer, frozenset({0}))
    assert len(compiled) == 4


async def test_the_latest_are_kept(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "MAX_GRAMMARS", 3)
    compiled: list[float] = []
    grammars.on_compile = compiled.append
    for word in ("a", "b", "c", "a", "d", "a", "b"):
        await grammars.matcher(Constraint("choice", (word,)), tokenizer, EOS)
    assert len(compiled) == 5


async def test_a_caller_that_leaves_does_not_end_what_others_wait_for(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    left = asyncio.create_task(grammars.matcher(YES, tokenizer, EOS))
    stays = asyncio.create_task(grammars.matcher(YES, tokenizer, EOS))
    await asyncio.sleep(0)
    assert grammars.num_waiting == 2
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    assert allowed_ids(await stays, TINY_VOCAB_SIZE)


async def test_what_nobody_waits_for_any_more_is_not_compiled(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    compiled: list[float] = []
    grammars.on_compile = compiled.append
    words = [Constraint("choice", (f"word {index}",)) for index in range(20)]
    left = [asyncio.create_task(grammars.matcher(word, tokenizer, EOS)) for word in words]
    await asyncio.sleep(0)
    for each in left:
        each.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    assert allowed_ids(await grammars.matcher(YES, tokenizer, EOS), TINY_VOCAB_SIZE)
    assert len(compiled) <= 2, "the first may have begun"
    assert allowed_ids(await grammars.matcher(words[5], tokenizer, EOS), TINY_VOCAB_SIZE), "it may come again"


async def test_an_error_that_nobody_waits_for_is_not_logged(
    grammars: Grammars, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()  # what other tests left would be logged here
    caplog.clear()
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    grammars.on_compile = lambda seconds: loop.call_soon_threadsafe(done.set) and None
    left = asyncio.create_task(grammars.matcher(Constraint("regex", "("), tokenizer, EOS))
    # It has begun, and cannot be taken back.
    await eventually(lambda: grammars.num_waiting > 0 and grammars._threads._work_queue.empty())
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    await done.wait()
    await asyncio.sleep(0.05)
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_nothing_is_compiled_after_the_end(tokenizer: Tokenizer) -> None:
    grammars = Grammars(lambda tokenizer: TINY_VOCAB_SIZE)
    waiting = [
        asyncio.create_task(grammars.matcher(Constraint("choice", (word,)), tokenizer, EOS)) for word in "ab"
    ]
    await asyncio.sleep(0)
    grammars.close()
    first, second = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(second, DrainingError)
    assert isinstance(first, Matcher | DrainingError), "what has begun may end"
    with pytest.raises(DrainingError):
        await grammars.matcher(Constraint("choice", ("c",)), tokenizer, EOS)


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, manyhats.engine.opening; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
