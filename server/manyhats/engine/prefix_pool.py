"""The virtual tokens of loaded adapters, put in place by the engine's thread at other threads' asking."""

from __future__ import annotations

from manyhats.adapters.primitives import KVPrefix, PromptEmbeddings
from manyhats.engine.internal_jobs import InternalJobs
from manyhats.engine.jobs import Job
from manyhats.engine.kernels.interface import KVCache
from manyhats.engine.prefix import KVPrefixJob, OnPrefix, PromptPrefixJob, ResidentPrefix


class EnginePrefixPool:
    """A ``PrefixPool`` over one engine.

    Args:
        jobs: of that engine.
        cache: the blocks' memory.
    """

    def __init__(self, jobs: InternalJobs, cache: KVCache) -> None:
        self._jobs = jobs
        self._cache = cache

    def install(self, slot: int, prefix: KVPrefix | PromptEmbeddings) -> ResidentPrefix:
        """Waits until the virtual tokens are in place.

        Raises:
            EngineError: they cannot be.
        """

        def make_job(job_id: str, on_done: OnPrefix) -> Job:
            if isinstance(prefix, KVPrefix):
                return KVPrefixJob(job_id, prefix, self._cache, on_done)
            return PromptPrefixJob(job_id, prefix, slot, on_done)

        return self._jobs.run(make_job)

    def remove(self, prefix: ResidentPrefix) -> None:
        """Has the blocks freed before the next step."""
        self._jobs.then(lambda scheduler: scheduler.release(prefix.shared))
