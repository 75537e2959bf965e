"""What the doctor says of the processor, threads and device."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from manyhats.engine.backends.report import GpuReport, KernelPath, ProcessorReport
from manyhats.engine.threads.processors import num_processors
from manyhats.server.access.errors import ConfigError
from manyhats.server.doctor.processor import (
    look_at_device,
    look_at_kernels,
    look_at_threads,
    report_processor,
)
from manyhats.server.lifetime.cgroup import Cgroup
from support.harnesses.doctor import Make, bad, conditions, only

NOWHERE = Cgroup(Path("/nowhere"), Path("/nowhere"))
REPORT = ProcessorReport(
    features=("AVX2",),
    paths=(KernelPath("NF4 linears", "16-bit integers, AVX2", faster="a processor with AVX512-VNNI"),),
    num_threads=num_processors(),
    threads="omp",
)


def limited(directory: Path, cpu_max: str) -> Cgroup:
    (directory / "cpu.max").write_text(cpu_max)
    (directory / "membership").write_text("0::/\n")
    return Cgroup(directory, directory / "membership")


def test_this_processor_is_reported_as_the_kernels_use_it(make: Make) -> None:
    report = report_processor(make())
    assert [path.work for path in report.paths] == ["NF4 linears", "dense linears"]
    assert report.threads in ("omp", "tbb", "workqueue")
    integers = "16-bit integers" in report.paths[0].path
    assert integers == ("AVX2" in report.features)
    exact = report_processor(make(dtype="float32")).paths[0]
    assert exact.path == "float32"
    assert ("--dtype bfloat16" in exact.faster) == integers


def test_what_would_be_faster_is_said_and_slow_paths_are_warnings() -> None:
    processor, linears = look_at_kernels(REPORT)
    assert (processor.text, linears.condition.value) == ("AVX2", "ok")
    assert linears.advice == "faster: a processor with AVX512-VNNI"
    slow = replace(REPORT, features=(), paths=(KernelPath("NF4 linears", "float32", True, "AVX2"),))
    assert conditions(look_at_kernels(slow)) == [("processor", "ok"), ("NF4 linears", "warning")]


def test_as_many_threads_as_processors_on_openmp_are_ok(make: Make) -> None:
    assert bad(look_at_threads(REPORT, make(), NOWHERE)) == []


def test_more_threads_than_the_container_has_time_for_are_a_warning(make: Make, tmp_path: Path) -> None:
    report = replace(REPORT, num_threads=num_processors() + 3)
    (finding,) = bad(look_at_threads(report, make(), limited(tmp_path, "150000 100000")))
    assert "1.5" in finding.text
    assert finding.advice == "give --num-threads 1"
    assert (
        bad(look_at_threads(replace(REPORT, num_threads=2), make(), limited(tmp_path, "150000 100000"))) == []
    )
    (finding,) = bad(look_at_threads(report, make(), limited(tmp_path, "max 100000")))
    assert finding.advice == f"give --num-threads {num_processors()}"


def test_a_variable_that_bounds_the_threads_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    finding, _ = look_at_threads(replace(REPORT, num_threads=0), make(), NOWHERE)
    assert "NUMBA_NUM_THREADS=1" in finding.text


@pytest.mark.parametrize(("threads", "condition"), [("workqueue", "failure"), ("tbb", "warning")])
def test_other_threads_than_openmps(make: Make, threads: str, condition: str) -> None:
    (finding,) = bad(look_at_threads(replace(REPORT, threads=threads), make(), NOWHERE))
    assert finding.condition.value == condition
    assert "libgomp1" in finding.advice


def test_threads_that_wait_awake_are_a_warning(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    (finding,) = bad(look_at_threads(REPORT, make(), NOWHERE))
    assert (finding.subject, finding.condition.value) == ("OpenMP", "warning")


def test_numbas_other_layers_are_seen(make: Make) -> None:
    code = (
        "from manyhats.engine.backends.open import report_processor\n"
        "print(report_processor(dtype='float32', num_threads=1).threads)"
    )
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "workqueue\n"


def test_a_device_without_kernels_is_refused_as_by_serve(make: Make) -> None:
    old = GpuReport(torch="2.13", is_for_cuda=True, name="Tesla T4", capability=(7, 5))
    assert only(look_at_device(make(), lambda: old)).text.startswith(
        "cpu; Tesla T4 has compute capability 7.5"
    )
    with pytest.raises(ConfigError, match="Tesla T4"):
        list(look_at_device(make(device="cuda"), lambda: old))


def test_the_gpu_that_is_used_or_left_is_named(make: Make) -> None:
    gpu = GpuReport(torch="2.13", is_for_cuda=True, name="H100", capability=(9, 0), num_bytes=80 << 30)
    used = only(look_at_device(make(device="cuda"), lambda: gpu))
    assert used.text == "cuda; H100, 80 GiB, compute capability 9.0"
    for device in ("auto", "cpu"):
        (left,) = bad(look_at_device(make(device=device), lambda: gpu))
        assert left.text == "cpu; H100 is not used"
