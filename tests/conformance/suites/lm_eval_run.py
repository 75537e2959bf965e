"""A local task of lm-eval on this server: what it measured of each item, as JSON.

Runs in an environment of its own: ``python lm_eval_run.py OUT``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

HERE = Path(__file__).parent / "lm_eval_task"


def main(out: Path) -> None:
    os.chdir(HERE)  # the task names its items by their path from here
    manager = TaskManager(include_path=str(HERE), include_defaults=False)
    found: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": os.environ["CONFORMANCE_MODEL"],
            "base_url": f"{os.environ['CONFORMANCE_URL']}/completions",
            "tokenizer_backend": "remote",
            "num_concurrent": 4,
        },
        tasks=["feelings"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = [
        {
            "context": request[0],
            "continuation": request[1],
            "logprob": float(answer[0]),
            "is_greedy": bool(answer[1]),
            "item": sample["doc_id"],
            "target": sample["doc"]["label"],
        }
        for sample in found["samples"]["feelings"]
        for request, answer in zip(sample["arguments"], sample["filtered_resps"], strict=True)
    ]
    out.write_text(json.dumps({"accuracy": found["results"]["feelings"]["acc,none"], "samples": samples}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
