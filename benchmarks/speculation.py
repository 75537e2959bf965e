"""``python -m benchmarks.speculation``: the example tasks with speculation and without, by turns.

At one sequence each message is answered both ways in turn, and its tokens are divided by the time of its decoding. With
several at a time, messages of all tasks are answered together, and the whole time counts. It also says whether all
answers are the same both ways.

On a busy machine ``--processor-time --threads 1`` still tells the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.engine import Engine
    from manyhats.engine.request import Request

_EXAMPLES = Path(__file__).parents[1] / "examples"
BASE = "base"


@dataclass(slots=True)
class Spent:
    """What some answers took; ``seconds`` of decoding, or of everything."""

    tokens: int = 0
    seconds: float = 0.0
    drafts: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(slots=True)
class Round:
    """One round of one case: the same messages without speculation and with it."""

    without: Spent = field(default_factory=Spent)
    with_: Spent = field(default_factory=Spent)

    @property
    def ratio(self) -> float:
        """How much faster it is with speculation."""
        return self.with_.rate / self.without.rate


@dataclass(frozen=True, slots=True)
class Message:
    """One message to a task, or to the base."""

    task: str
    token_ids: tuple[int, ...]
    max_new_tokens: int
    adapter: AdapterRecord | None


class Answers:
    """Answers messages on one engine, and remembers what was said.

    Args:
        engine: started.
        num_tokens: drafted in one step, at most.
        clock: in seconds.

    Attributes:
        differing: tasks whose answers differ with speculation and without; there should be none.
    """

    def __init__(
        self, engine: Engine, num_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine = engine
        self._num_tokens = num_tokens
        self._clock = clock
        self._said: dict[tuple[str, tuple[int, ...]], list[tuple[int, float | None]]] = {}
        self.differing: set[str] = set()

    async def by_turns(self, messages: Sequence[Message]) -> Round:
        """One message after the other, each both ways."""
        found = Round()
        for index, message in enumerate(messages):
            ways = [(found.without, 0), (found.with_, self._num_tokens)]
            for spent, num_tokens in ways[:: 1 if index % 2 else -1]:
                await self._answer(message, num_tokens, spent)
        return found

    async def together(self, messages: Sequence[Message], at_once: int, *, is_first_with: bool) -> Round:
        """All messages, so many at a time, one way and then the other."""
        found = Round()
        ways = [(found.without, 0), (found.with_, self._num_tokens)]
        for spent, num_tokens in ways[:: -1 if is_first_with else 1]:
            room = asyncio.Semaphore(at_once)
            began_s = self._clock()
            await asyncio.gather(*(self._in_turn(room, message, num_tokens, spent) for message in messages))
            spent.seconds = self._clock() - began_s
        return found

    async def _in_turn(
        self, room: asyncio.Semaphore, message: Message, num_tokens: int, spent: Spent
    ) -> None:
        async with room:
            await self._answer(message, num_tokens, spent)

    async def _answer(self, message: Message, num_tokens: int, spent: Spent) -> None:
        said: list[tuple[int, float | None]] = []
        prefilled_s: float | None = None
        async for output in self._engine.generate(_request(message, num_tokens)):
            prefilled_s = self._clock() if prefilled_s is None else prefilled_s
            said += [(token.id, token.logprob) for token in output.tokens]
        usage = output.usage
        spent.tokens += usage.generated_tokens - 1  # the first comes with the prompt
        spent.seconds += self._clock() - (prefilled_s or 0.0)
        spent.drafts += usage.draft_tokens
        spent.accepted += usage.accepted_draft_tokens
        if self._said.setdefault((message.task, message.token_ids), said) != said:
            self.differing.add(message.task)


def _request(message: Message, num_tokens: int) -> Request:
    from manyhats.engine.request import Request, ResponseOptions, SpeculationParams, StoppingParams

    return Request(
        id="",
        prompt_token_ids=message.token_ids,
        adapter=message.adapter,
        stopping=StoppingParams(max_new_tokens=message.max_new_tokens),
        response=ResponseOptions(logprobs=True),
        speculation=SpeculationParams(num_tokens=num_tokens),
        accepted_s=time.monotonic(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per case; 1 if any answer differs."""
    options = _parse(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before any library starts its threads
    with TemporaryDirectory(prefix="manyhats-bench-") as directory:
        rounds, differing = asyncio.run(measure(Path(directory), options))
    for case, found in rounds.items():
        print(_line(case, found))
    print("answers: " + ("the same" if not differing else f"NOT THE SAME: {', '.join(sorted(differing))}"))
    return 1 if differing else 0


def _line(case: str, rounds: Sequence[Round]) -> str:
    ratios = [each.ratio for each in rounds]
    drafts, accepted = (sum(getattr(each.with_, name) for each in rounds) for name in ("drafts", "accepted"))
    came = f"{accepted / drafts:4.0%} of {drafts} drafts" if drafts else "no drafts"
    without, with_ = (median(getattr(each, name).rate for each in rounds) for name in ("without", "with_"))
    return (
        f"{case:22s} {without:7.1f} → {with_:7.1f} tokens/s, {median(ratios):.2f} ×"
        f" ({min(ratios):.2f} to {max(ratios):.2f}), {came}"
    )


async def measure(
    directory: Path, options: argparse.Namespace
) -> tuple[Mapping[str, Sequence[Round]], set[str]]:
    """Every case's rounds, and the tasks whose answers differ."""
    from manyhats.engine.threads.openmp import in_own_thread

    engine, messages = await in_own_thread(lambda: _load(directory, options))
    await engine.start()
    try:
        clock = time.process_time if options.processor_time else time.perf_counter
        answers = Answers(engine, options.num_tokens, clock)
        everything = [each for some in zip(*messages.values(), strict=True) for each in some]
        await answers.together(everything, 16, is_first_with=False)  # adapters, kernels and prompts are there
        rounds: dict[str, list[Round]] = {}
        for index in range(options.rounds):
            for task, own in messages.items():
                _note(rounds, f"{task}, 1", await answers.by_turns(own))
            for at_once in options.at_once:
                found = await answers.together(everything, at_once, is_first_with=index % 2 == 0)
                _note(rounds, f"all tasks, {at_once}", found)
            print(f"round {index + 1} of {options.rounds} is done", flush=True)
        return rounds, answers.differing
    finally:
        await engine.stop()


def _note(rounds: dict[str, list[Round]], case: str, found: Round) -> None:
    rounds.setdefault(case, []).append(found)
    print(_line(case, [found]), flush=True)


def _load(directory: Path, options: argparse.Namespace) -> tuple[Engine, Mapping[str, Sequence[Message]]]:
    """An engine with the example tasks, and messages that they were not trained on."""
    import torch
    from examples.catalogue import parts_of
    from examples.tasks import TASKS
    from examples.tasks.task import held_out_items

    from manyhats.adapters.registration import Part, Parts, Registration
    from manyhats.adapters.store.opening import open_store
    from manyhats.engine.checkpoints.loader import load_model
    from manyhats.engine.config import EngineConfig
    from manyhats.engine.opening import open_engine
    from manyhats.engine.text.tokenizer import ChatMessage

    model = load_model(options.model, quantization="nf4", dtype=torch.bfloat16)
    store = open_store(directory / "store", model.description, [_EXAMPLES])

    def message(name: str, text: str, max_new_tokens: int, record: AdapterRecord | None) -> Message:
        token_ids = tuple(model.tokenizer.encode_chat([ChatMessage("user", text)]))
        return Message(name, token_ids, max_new_tokens, record)

    messages: dict[str, list[Message]] = {BASE: []}
    for name in options.tasks or TASKS:
        task = TASKS[name]
        parts = [Part(str(path), weight) for path, weight in parts_of(task, _EXAMPLES)]
        record = store.register(Registration(name, Parts(parts))).record
        texts = [item.message for item in held_out_items(task, options.messages)]
        messages[name] = [message(name, text, task.max_new_tokens, record) for text in texts]
        messages[BASE].append(message(BASE, texts[0], 48, None))
    num_base = options.messages
    messages[BASE] = (messages[BASE] * num_base)[:num_base]
    engine = open_engine(model, EngineConfig(num_threads=options.threads), store.lower)
    return engine, messages


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="alias, directory or hub id (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=cores, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--messages", type=int, default=10, help="to each task (%(default)s)")
    parser.add_argument("--num-tokens", type=int, default=7, help="drafted in a step, at most (%(default)s)")
    parser.add_argument(
        "--at-once", type=int, nargs="*", default=[8, 32], metavar="N", help="sequences (8 32)"
    )
    parser.add_argument("--processor-time", action="store_true", help="count that of the process instead")
    parser.add_argument("--tasks", nargs="*", metavar="TASK", help="some example tasks only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
