"""Part A: whether the kernels are right, and whether all configurations of linears compile."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterable

import torch

from benchmarks.gpu.candidates import dense_candidates, families, nf4_candidates, sm_of
from benchmarks.gpu.checks.adapters import check_bottlenecks, check_deltas, check_ends
from benchmarks.gpu.checks.check import Checks, Place
from benchmarks.gpu.checks.choosing import check_choosing
from benchmarks.gpu.checks.linears import check_activations, check_dequantized, check_linears
from benchmarks.gpu.checks.mixing import check_attention, check_cache, check_norms, check_rotation
from benchmarks.gpu.compiling import Job, StepJob, compile_all
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import LLAMA_8B, Scale
from manyhats.engine.backends.cuda.linears.tiles import DECODED_ROWS, tiles_for

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
        out.record("not compiled", job=str(each.job), failure=each.failure)
    seconds = time.perf_counter() - began_s
    out.record("compiled", sm=sm, jobs=len(jobs), done=len(done) - len(failed), seconds=seconds)
    if len(done) < len(jobs):
        out.lacks(
            f"{len(jobs) - len(done)} of {len(jobs)} configurations compiled in advance: the time was over"
        )


def jobs_of(scale: Scale, sm: int) -> list[Job | StepJob]:
    """One for each kernel that later parts launch; under ``--cpu``, one of a GPU's."""
    steps = [StepJob(LLAMA_8B, 2, 1), StepJob(LLAMA_8B, DECODED_ROWS + 64, 0)]
    products: list[Job | StepJob] = list(_products(sm))
    return [*steps, *products] if scale.is_gpu else products[-1:]


def _products(sm: int) -> Iterable[Job]:
    jobs: dict[tuple[object, ...], Job] = {}

    def add(job: Job) -> None:
        # Any number of rows and outputs have the same kernel.
        _, *others = job.candidate.key
        del others[_BUCKET]
        jobs.setdefault((job.is_flat, job.is_rounded, *others), job)

    for shape in sorted(set(LLAMA_8B.distinct_linears.values())):
        usual, *others = families(shape, is_tiny=False)
        for family in (usual, *others):
            for candidate in (*nf4_candidates(shape, family, sm), *dense_candidates(shape, family, sm)):
                add(Job(candidate))
        for candidate in nf4_candidates(shape, usual, sm):
            add(Job(candidate, is_flat=True))
            if candidate.tile == tiles_for(sm, *shape).nf4[candidate.bucket]:
                add(Job(candidate, is_rounded=True))
    return jobs.values()


_BUCKET = 3
"""Its place in a key behind the first size."""
