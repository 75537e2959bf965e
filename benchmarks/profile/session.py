"""The engine with a timed backend, in a worker process: a case's median step, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from benchmarks.engine import EngineSession
from benchmarks.profile.costs import CHOOSING, KERNELS, Cost, step_costs
from benchmarks.profile.timing import TimedBackend, TimedStep
from benchmarks.workload import Case, Workload
from manyhats.engine.backends.backend import Backend
from manyhats.engine.config import EngineConfig
from manyhats.engine.request import SamplingParams

FORWARD, STEP, BETWEEN = "Python in the forward", "Python in the step", "between steps"
"""Around the kernels: frame, embeddings, the call; schedule, plan, wants and take; commands and events."""
PARTS = (*KERNELS, CHOOSING, FORWARD, STEP, BETWEEN)
_SKIPPED = 2
"""Steps after the prompts': buffers grow in the first."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A step of decodes, medians in seconds.

    Attributes:
        parts: part → its time.
        step_s: from the end of one step to the end of the next.
        costs: part → its bytes and flops.
        num_left: processors that the engine left to others in most steps.
        num_steps: measured.
    """

    parts: Mapping[str, float]
    step_s: float
    costs: Mapping[str, Cost]
    num_left: int
    num_steps: int


class ProfileSession:
    """Lives in a worker process.

    Args:
        workload: model and adapters.
        config: of the engine; all prompts of a case must fit into one step.
    """

    def __init__(self, workload: Workload, config: EngineConfig) -> None:
        self._workload = workload
        self._num_runs = 0
        self._session = EngineSession(workload, config, self._make_backend)

    def _make_backend(self) -> Backend:
        self._backend = TimedBackend(self._workload.settings.threads)
        return self._backend

    def measure(self, case: Case, context: int, num_steps: int, top_p: float | None = None) -> Profile:
        """Sequences that begin behind this many tokens of context decode together; greedily, unless top_p is given."""
        self._num_runs += 1  # as the seed, so that the prefix cache has none of the prompts
        prompts = self._workload.prompts(case, self._num_runs, context)
        sampling = SamplingParams() if top_p is None else SamplingParams(temperature=1.0, top_p=top_p, seed=0)
        self._backend.steps.clear()
        ran = self._session.run(case, prompts, num_steps + _SKIPPED + 1, sampling)
        decodes = [
            (after.end_s - before.end_s, after.stats.duration_s)
            for before, after in pairwise(ran)
            if after.decodes_only(case.num_sequences)
        ]
        timed = [step for step in self._backend.steps if step.plan.num_rows == case.num_sequences]
        steps = list(zip(decodes, timed, strict=True))[_SKIPPED:]
        parts = [_parts(*decode, step) for decode, step in steps]
        plan = steps[len(steps) // 2][1].plan
        rank = self._workload.settings.adapter_rank
        return Profile(
            parts={part: median(each[part] for each in parts) for part in PARTS},
            step_s=median(interval_s for (interval_s, _), _ in steps),
            costs=step_costs(self._session.architecture, plan, rank, head_bytes=self._backend.head_bytes),
            num_left=round(median(step.num_left for _, step in steps)),
            num_steps=len(steps),
        )


def _parts(interval_s: float, duration_s: float, timed: TimedStep) -> Mapping[str, float]:
    """All of the time between the ends of two steps, shared out."""
    parts = timed.parts()
    return {
        **parts,
        CHOOSING: timed.choosing_s,
        FORWARD: timed.forward_s - sum(parts.values()),
        STEP: duration_s - timed.forward_s - timed.choosing_s,
        BETWEEN: interval_s - duration_s,
    }
