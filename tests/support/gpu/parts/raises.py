from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale


def run(out: Recorder, scale: Scale) -> None:
    out.record("begun")
    raise ValueError("what it raises")
