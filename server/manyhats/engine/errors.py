"""The engine's errors. They know nothing of gRPC; the server's table turns each into a status.

EngineError
├── RequestError                the caller's fault; names the field
│   ├── FieldInvalidError
│   └── PromptTooLongError
├── ModelError                  a model that cannot be loaded or served, and why
├── QueueFullError              try again later
│   └── QueueTooSlowError       it would not be answered by its deadline
├── AdapterCapacityError        no room to preload an adapter
├── PinLimitError               pinned adapters would not fit in memory
├── DrainingError               shutting down; running requests finish
├── DeadlineExceededError
├── RequestCancelledError
├── NumericalError              non-finite logits of one request
├── NoTokenAllowedError         bias, penalties or masks left a request no token to choose
├── StreamUnreadError           nobody read a request's answer
├── NoMemoryError               there was no memory for this one request
├── RequestFailedError          anything unexpected in one request or step; it is logged
└── EngineDeadError             the engine thread ended
"""

from __future__ import annotations

import errno
import re


def clipped(text: str, max_bytes: int) -> str:
    """Text from outside, made safe for a message: no halves of surrogate pairs, at most ``max_bytes`` in UTF-8."""
    return text.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")


class EngineError(Exception):
    """Any error the engine raises on purpose."""


class RequestError(EngineError):
    """A request that can never be served; ``field`` is its name in the request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message

    def renamed(self, field: str) -> None:
        """Give the field the name that its caller knows."""
        self.field, self.args = field, (f"{field}: {self.description}",)


class FieldInvalidError(RequestError):
    """A field's value is outside its range."""


class PromptTooLongError(RequestError):
    """Prompt and adapter prefix leave no room for one output token; ``limit`` is in tokens.

    With ``at_least``, ``num_tokens`` is a lower bound for a text that was not tokenized.
    """

    def __init__(self, field: str, num_tokens: int, limit: int, *, at_least: bool = False) -> None:
        least = "at least " if at_least else ""
        super().__init__(field, f"has {least}{num_tokens} tokens; the limit is {limit}")
        self.num_tokens = num_tokens
        self.limit = limit
        self.at_least = at_least


class ModelError(EngineError):
    """The model cannot be loaded or served."""


class QueueFullError(EngineError):
    """Too many requests are waiting, or tokens of their prompts; ``retry_after_s`` is a hint."""

    def __init__(
        self, limit: int, retry_after_s: float, num_waiting: int | None = None, unit: str = "requests"
    ) -> None:
        num = limit if num_waiting is None else num_waiting
        rest = "; the places that are left are for tasks with fewer" if num < limit else ""
        super().__init__(f"the queue is full: {num} {unit} are waiting{rest}")
        self.limit = limit
        self.retry_after_s = retry_after_s


class QueueTooSlowError(QueueFullError):
    """A request would not be answered by its deadline, for what waits before it; ``retry_after_s`` is a hint."""

    def __init__(
        self, limit: int, retry_after_s: float, num_ahead: int, needed_s: float, left_s: float
    ) -> None:
        super().__init__(limit, retry_after_s)
        self.args = (
            f"the queue is too slow: with {num_ahead} requests ahead an answer takes about {needed_s:.1f} s, "
            f"and the deadline leaves {max(left_s, 0.0):.1f} s",
        )


class AdapterCapacityError(EngineError):
    """The memory for adapters was full of those in use or being loaded for as long as a load could wait."""

    def __init__(self, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"the memory for adapters, {limit} bytes, is full of adapters in use or being loaded"
        )
        self.limit = limit
        self.retry_after_s = retry_after_s


class PinLimitError(EngineError):
    """Adapters that are to stay in memory would take more of it than all may; bytes."""

    def __init__(self, num_bytes: int, pinned_bytes: int, limit: int) -> None:
        super().__init__(
            f"it takes {num_bytes} bytes in memory, and {pinned_bytes} are pinned; "
            f"together they exceed the memory for adapters, {limit} bytes"
        )
        self.limit = limit


class DrainingError(EngineError):
    """The engine accepts no new requests; it is shutting down."""


class DeadlineExceededError(EngineError):
    """The request's deadline passed before it finished."""


class RequestCancelledError(EngineError):
    """The request was cancelled by its caller."""


class NumericalError(EngineError):
    """The logits of this request were not finite."""


class NoTokenAllowedError(EngineError):
    """Bias, penalties, forbidden tokens and masks together leave a request no possible next token."""

    def __init__(self) -> None:
        super().__init__("no token may come next: the request forbids every one")


class StreamUnreadError(EngineError):
    """Nobody read a request's answer for ``limit_s`` seconds."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the answer was not read for {limit_s:g} s, so it was ended")
        self.limit_s = limit_s


class NoMemoryError(EngineError):
    """There was no memory for this request; ``retry_after_s`` is a hint."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__("the server has no memory left for this request at the moment; try again soon")
        self.retry_after_s = retry_after_s


# As torch says it, which has no class for it on the CPU, and Python, of a thread.
_NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory|can't start new thread")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an unexpected error says that the system has no memory, or no more threads, to give."""
    if isinstance(error, RuntimeError):
        return _NO_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


class RequestFailedError(EngineError):
    """Something unexpected ended the request; it is this error's cause, logged under ``error_id``."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"the request failed in the engine; the server's log says why, under {error_id}")
        self.error_id = error_id


class EngineDeadError(EngineError):
    """The engine thread has ended; the process must be restarted."""
