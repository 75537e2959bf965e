import os

from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale


def run(out: Recorder, scale: Scale) -> None:
    out.record("begun")
    out.write()
    os._exit(9)
