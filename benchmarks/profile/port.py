"""What gRPC adds to a step: processor time of the server's event loop.

A difference of two steps, with and without the port, is a few percent of either, and less than what separates two runs.
The time that the event loop's thread computes is what it takes from the engine's threads on a machine that they fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.process import serving
from benchmarks.service import ClientSession
from benchmarks.worker import Worker
from benchmarks.workload import Case, Workload

_FEW = 2
"""Tokens of a first run; what a second run takes more is that of its further steps alone."""


def port_times(workload: Workload, cases: Sequence[Case]) -> Mapping[str, float]:
    """Case's name → seconds a step; empty where the system does not count the time of threads."""
    most = max(case.num_sequences for case in cases)
    with serving(workload, max_sequences=2 * most) as server:
        if thread_seconds(server.pid) is None:
            return {}
        with Worker(ClientSession, workload, server.grpc) as client:
            client.call("register")
            return {
                case.name: _step_s(client, case, server.pid, workload.settings.decode_steps) for case in cases
            }


def _step_s(client: Worker, case: Case, pid: int, num_steps: int) -> float:
    client.call("run", case, _FEW)  # the prefix cache has the prompts from then on
    few_s = _run_s(client, case, pid, _FEW)
    return max(_run_s(client, case, pid, _FEW + num_steps) - few_s, 0.0) / num_steps


def _run_s(client: Worker, case: Case, pid: int, num_tokens: int) -> float:
    before_s = thread_seconds(pid) or 0.0
    client.call("run", case, num_tokens)
    return (thread_seconds(pid) or 0.0) - before_s


def thread_seconds(pid: int) -> float | None:
    """Processor time of a process's main thread, which is where a server's event loop runs; None if unknown."""
    path = Path(f"/proc/{pid}/task/{pid}/schedstat")
    return int(path.read_text().split()[0]) / 1e9 if path.exists() else None
