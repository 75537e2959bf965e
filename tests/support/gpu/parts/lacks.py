import nothing_that_is_installed
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale


def run(out: Recorder, scale: Scale) -> None:
    nothing_that_is_installed.call()
