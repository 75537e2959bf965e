"""transformers with bitsandbytes, and PEFT on top of it: the baselines of ``make bench``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.baselines import PEFT, TRANSFORMERS, Baseline, BaselineSession
from benchmarks.environments import UnavailableError
from benchmarks.measure import Sample
from benchmarks.peers.peer import DISTINCT, PROMPT_CASES, Bench
from benchmarks.worker import Worker

_PACKAGES = ("transformers", "bitsandbytes", "peft")


class TransformersPeer:
    """Both in the compute dtype that is the best here.

    They are among the developers' packages, and have no server: their batches are compared.

    Raises:
        UnavailableError: one of the packages is missing.
    """

    name = "transformers"

    def __init__(self, bench: Bench) -> None:
        missing = [package for package in _PACKAGES if find_spec(package) is None]
        if missing:
            raise UnavailableError(f"{self.name}: {', '.join(missing)} is not installed")
        self._bench = bench

    def visit(self, index: int) -> Iterator[Sample]:
        """See ``Peer``."""
        if "process" not in self._bench.parts:
            return
        with Worker(BaselineSession, self._bench.workload) as worker:
            base, peft = Baseline(TRANSFORMERS, worker), Baseline(PEFT, worker)
            for system, cases in ((base, PROMPT_CASES), (peft, (DISTINCT,))):
                for case in cases:
                    for variant in system.variants(case):
                        yield Sample(
                            system=system.name,
                            variant=variant,
                            case=case.name,
                            round=index,
                            measurement=system.measure(case, variant, index),
                        )
