"""Many requests at a time: how many run, which are sent again and when, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from manyhats.client.errors import DeadlineError, ManyhatsError, QueueFullError, UnavailableError
from manyhats.client.fields import invalid
from manyhats.client.progress import shown
from manyhats.client.requests import ManyOptions, OnError, Progress

T = TypeVar("T")
R = TypeVar("R")

UNAVAILABLE_LIMIT_S: Final = 60.0
# Before a request is sent again, unless the server says a longer time: doubled each time.
_FIRST_DELAY_S = 0.2
_LAST_DELAY_S = 5.0
# Those that were refused together do not come again together.
_SPREAD = 0.25


@dataclass(frozen=True, slots=True)
class Plan:
    """How many requests are made.

    Attributes:
        what: they are, for people, such as "prompts".
        on_error: what becomes of one that fails: it ends all (``raise``), or its error is its answer (``return``).
        concurrency: how many run at a time, at most.
        progress: is told how many have ended; True shows it.
        timeout_s: for each, however often it is sent; None for no limit.

    Raises:
        InvalidRequestError: a value does not fit; names it.
    """

    what: str
    on_error: OnError
    concurrency: int = 32
    progress: Progress | bool = True
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.concurrency, int) or self.concurrency < 1:
            raise invalid("concurrency", f"must be a number from 1, not {self.concurrency!r}")
        if self.on_error not in ("raise", "return"):
            raise invalid("on_error", f"must be 'raise' or 'return', not {self.on_error!r}")

    @classmethod
    def taken_from(cls, options: dict[str, Any], what: str, on_error: OnError) -> Plan:
        """The plan that ``ManyOptions`` among a call's options say; removes them."""
        given = {name: options.pop(name, None) for name in ManyOptions.__annotations__}
        return cls(what, on_error, **{name: value for name, value in given.items() if value is not None})


def task_of_each(task_id: str | Iterable[str], count: int) -> list[str]:
    """The task of each of ``count`` prompts.

    Raises:
        InvalidRequestError: there are not as many, or one is no text.
    """
    tasks = [task_id] * count if isinstance(task_id, str) else list(task_id)
    if len(tasks) != count:
        raise invalid("task_id", f"must be one task, or one for each of {count} prompts, not {len(tasks)}")
    for index, task in enumerate(tasks):
        if not isinstance(task, str):
            raise invalid("task_id", f"must be texts; that of prompt {index} is {task!r}")
    return tasks


async def answer_all(
    items: Sequence[T], ask: Callable[[T, float | None], Awaitable[R]], plan: Plan
) -> list[R | ManyhatsError]:
    """Ask for each item, a few at a time, and return the answers in the order of the items.

    A request that the server refuses for now, and says when to try again, is sent again then. So is one that meets a
    server that is not available, as while it restarts, until it has not been for ``timeout_s``, or for
    ``UNAVAILABLE_LIMIT_S`` if there is none.

    Args:
        items: what to ask for.
        ask: sends the request of one item, which may take the seconds given.
        plan: see there.

    Raises:
        ManyhatsError: the first error, with ``on_error`` "raise"; a note says of which item. Others are cancelled.
    """
    run = _Run(items, ask, plan)
    with shown(plan.progress, plan.what) as report:
        return await run.answers(report)


class _Run(Generic[T, R]):
    """One call of ``answer_all``."""

    def __init__(
        self, items: Sequence[T], ask: Callable[[T, float | None], Awaitable[R]], plan: Plan
    ) -> None:
        self._ask = ask
        self._plan = plan
        self._remaining: Iterator[tuple[int, T]] = iter(enumerate(items))
        self._answers: dict[int, R | ManyhatsError] = {}
        self._total = len(items)
        self._outage = _Outage(UNAVAILABLE_LIMIT_S if plan.timeout_s is None else plan.timeout_s)

    async def answers(self, report: Progress) -> list[R | ManyhatsError]:
        report(0, self._total)
        workers = [
            asyncio.create_task(self._work(report)) for _ in range(min(self._plan.concurrency, self._total))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [self._answers[index] for index in range(self._total)]

    async def _work(self, report: Progress) -> None:
        for index, item in self._remaining:  # which all workers take from
            try:
                self._answers[index] = await self._answer(item)
            except ManyhatsError as error:
                error.add_note(f"{self._plan.what}[{index}]")
                if self._plan.on_error == "raise":
                    raise
                self._answers[index] = error
            report(len(self._answers), self._total)

    async def _answer(self, item: T) -> R:
        """The answer to one item, in however many attempts."""
        patience = _Patience(self._plan.timeout_s)
        while True:
            try:
                answer = await self._ask(item, patience.remaining_s)
            except ManyhatsError as error:
                if isinstance(error, DeadlineError) and patience.refused is not None:
                    raise patience.over() from patience.refused
                if not self._outage.may_retry(error):
                    raise
                await asyncio.sleep(patience.delay_after(error))
            else:
                self._outage.end()
                return answer


class _Outage:
    """How long the server has been unavailable to all requests of a run."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began_s: float | None = None

    def end(self) -> None:
        """The server has answered."""
        self._began_s = None

    def may_retry(self, error: ManyhatsError) -> bool:
        """Whether a request that ended so may be sent again."""
        if error.retry_after_s is None and not isinstance(error, UnavailableError):
            if error.reason:
                self.end()  # that was an answer, too
            return False
        if isinstance(error, QueueFullError):
            self.end()  # it is there, and busy
            return True
        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        return now_s - self._began_s < self._limit_s


class _Patience:
    """The time and the attempts of one item.

    Attributes:
        refused: why the last attempt was refused; None if none was.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.refused: ManyhatsError | None = None
        self._timeout_s = timeout_s
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._delay_s = _FIRST_DELAY_S

    @property
    def remaining_s(self) -> float | None:
        """Time left, not below zero; None for no limit."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def delay_after(self, error: ManyhatsError) -> float:
        """How long to wait after an attempt that was refused.

        Raises:
            DeadlineError: longer than there is time.
        """
        self.refused = error
        delay_s = max(error.retry_after_s or 0.0, self._delay_s) * (1 + random.uniform(0, _SPREAD))
        self._delay_s = min(2 * self._delay_s, _LAST_DELAY_S)
        left_s = self.remaining_s
        if left_s is not None and delay_s >= left_s:
            raise self.over() from error
        return delay_s

    def over(self) -> DeadlineError:
        """The error of an item that was refused until its time was over."""
        message = f"no answer within {self._timeout_s:g} s, and the last attempt was refused: {self.refused}"
        return DeadlineError(message, code="DEADLINE_EXCEEDED")
