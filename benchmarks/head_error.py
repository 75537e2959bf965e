"""``python -m benchmarks.head_error``: what the head in eight bits changes, against the head's own weights.

On positions of this repository's documents: how far logits, log-probabilities and the log-sum-exp move, whether another
token is the likeliest, and how far two distributions at temperature 1 lie apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.run import DEFAULT_MODEL
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.head.logits import CpuLogits
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.home import default_home

_WINDOW = 512
_BLOCK = 16
_LIKELIEST = 64


def texts() -> str:
    """The repository's documents, one after another."""
    root = Path(__file__).parents[1]
    return "\n\n".join(
        path.read_text() for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    )


def heads(loaded: LoadedModel, token_ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits as a step leaves them, and the exact ones, for each window of tokens: [P, V] float32."""
    backend = CpuBackend(is_exact=False)
    backend.start_thread()
    model = backend.prepare(loaded.architecture, loaded.weights)
    cache = backend.new_cache(loaded.architecture, _BLOCK, "bfloat16", 1 << 28)
    slots = backend.new_adapters(loaded.architecture, 1, "bfloat16")
    exact = CpuKernels(is_exact=False)
    for first in range(0, len(token_ids) - 1, _WINDOW):
        window = token_ids[first : first + _WINDOW]
        rows = np.arange(len(window))
        plan = StepPlan(
            token_ids=int32(window),
            positions=int32(rows),
            cells=rows.astype(np.int64),
            query_start=int32([0, len(window)]),
            context_len=int32([len(window)]),
            block_tables=int32([range(-(-len(window) // _BLOCK))]),
            row_slots=int32(np.zeros(len(window))),
            logit_rows=int32(rows),
        )
        logits = model.forward(plan, cache, slots)
        assert isinstance(logits, CpuLogits)
        yield logits.values, exact.linear(logits.hidden, logits.head.own)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_error", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, directory or hub id (%(default)s)")
    parser.add_argument("--positions", type=int, default=10_000, help="(%(default)s)")
    options = parser.parse_args(arguments)
    located = locate_model(options.model, default_home())
    loaded = load_model(str(located.directory), quantization="nf4", dtype=torch.bfloat16, home=default_home())
    token_ids = loaded.tokenizer.encode(texts(), add_special_tokens=False)[: options.positions]
    found: dict[str, list[Tensor]] = {}
    for fast, exact in heads(loaded, token_ids):
        near, true = fast.double().log_softmax(1), exact.double().log_softmax(1)
        likeliest = exact.topk(_LIKELIEST, dim=1)
        at_likeliest = (near - true).gather(1, likeliest.indices)
        each = {
            "|log-sum-exp's error|": (fast.double().logsumexp(1) - exact.double().logsumexp(1)).abs(),
            "|logit's error|, where not made exact": (fast - exact).abs().sum(1) / (fast != exact).sum(1),
            "largest |logit's error|": (fast - exact).abs().amax(1),
            "largest |log-probability's error| of the 64 likeliest": at_likeliest.abs().amax(1),
            "tokens made exact": (fast == exact).sum(1),
            "of the 64 likeliest, not made exact": (fast != exact).gather(1, likeliest.indices).sum(1),
            "another likeliest token": fast.argmax(1) != exact.argmax(1),
            "half the sum of |probabilities' differences|": (near.exp() - true.exp()).abs().sum(1) / 2,
            "Kullback-Leibler divergence, nats": (true.exp() * (true - near)).sum(1),
        }
        for name, values in each.items():
            found.setdefault(name, []).append(values.double())
    print(f"{len(token_ids)} positions{'':44} {'mean':>10} {'largest':>10}")
    for name, parts in found.items():
        values = torch.cat(parts)
        print(f"{name:58} {float(values.mean()):10.2g} {float(values.max()):10.2g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
