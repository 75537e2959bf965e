"""Part A: whether the kernels are right, and whether all configurations of linears compile."""

from __future__ import annotations

import os
import time
import traceback

import torch

from benchmarks.gpu.candidates import Candidate, dense_candidates, families, nf4_candidates, sm_of
from benchmarks.gpu.checks.adapters import check_bottlenecks, check_deltas, check_ends
from benchmarks.gpu.checks.check import Checks, Place
from benchmarks.gpu.checks.choosing import check_choosing
from benchmarks.gpu.checks.linears import check_activations, check_dequantized, check_linears
from benchmarks.gpu.checks.mixing import check_attention, check_cache, check_norms, check_rotation
from benchmarks.gpu.compiling import Job, compile_all
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import LLAMA_8B, Scale

_CHECKS: tuple[Checks, ...] = (
    check_linears,
    check_dequantized,
    check_norms,
    check_rotation,
    check_attention,
    check_cache,
    check_deltas,
    check_bottlenecks,
    check_ends,
    check_activations,
    check_choosing,
)
_COMPILING = 0.6
"""Of the part's time, at most."""


def run(out: Recorder, scale: Scale) -> None:
    """Compile first: later parts then launch what is in the cache."""
    device = torch.device(scale.device)
    _compile(out, scale, sm_of(device))
    place = Place(scale.shape, device, sm_of(device))
    for check in _CHECKS:
        if out.is_late:
            return
        _check(out, check, place)


def _check(out: Recorder, check: Checks, place: Place) -> None:
    """One that raises is recorded as wrong, and the others go on."""
    try:
        for each in check(place):
            out.record(
                "kernel",
                kernel=each.kernel,
                error=each.error,
                tolerance=each.tolerance,
                is_right=each.is_right,
            )
    except Exception as error:  # noqa: BLE001 - the others go on
        out.record("kernel", kernel=repr(check), is_right=False, failure=repr(error))
        print(traceback.format_exc(), flush=True)


def _compile(out: Recorder, scale: Scale, sm: int) -> None:
    jobs = jobs_of(scale, sm)
    began_s = time.perf_counter()
    # In these processes Triton compiles, whatever this one does.
    interprets = os.environ.pop("TRITON_INTERPRET", None)
    try:
        done = compile_all(jobs, sm, _COMPILING * out.limit_s)
    finally:
        if interprets is not None:
            os.environ["TRITON_INTERPRET"] = interprets
    failed = [each for each in done if each.failure]
    for each in failed:
        out.record("not compiled", candidate=each.job.candidate.key, failure=each.failure)
    seconds = time.perf_counter() - began_s
    out.record("compiled", sm=sm, jobs=len(jobs), done=len(done) - len(failed), seconds=seconds)
    if len(done) < len(jobs):
        out.lacks(
            f"{len(jobs) - len(done)} of {len(jobs)} configurations compiled in advance: the time was over"
        )


def jobs_of(scale: Scale, sm: int) -> list[Job]:
    """One for each kernel that later parts launch; under ``--cpu``, a few of a GPU's."""
    shapes = sorted(set(LLAMA_8B.distinct_linears.values()))
    jobs: dict[tuple[object, ...], Job] = {}
    for shape in shapes:
        for index, family in enumerate(families(shape, is_tiny=False)):
            both = (False, True) if index == 0 else (False,)
            for candidate in nf4_candidates(shape, family, sm):
                for is_flat in both:
                    jobs.setdefault(_compiled_as(candidate, is_flat), Job(candidate, is_flat))
            for candidate in dense_candidates(shape, family, sm):
                jobs.setdefault(_compiled_as(candidate, False), Job(candidate))
    found = list(jobs.values())
    return found if scale.is_gpu else found[:: len(found) // 2][:2]


def _compiled_as(candidate: Candidate, is_flat: bool) -> tuple[object, ...]:
    """What one compiled kernel serves: any number of rows and outputs."""
    _, *others = candidate.key
    return (is_flat, *(each for index, each in enumerate(others) if index != 3))
