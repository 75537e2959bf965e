"""llama.cpp: its in-process batched benchmark in each format, and its server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.measure import Measurement, Sample
from benchmarks.peers.answers import measure_answers, openai_ask
from benchmarks.peers.beside import busy_process
from benchmarks.peers.llama_environment import FORMATS, make_llama_cpp
from benchmarks.peers.peer import (
    ANSWER_CASES,
    BUSY_CASES,
    DECODE,
    PREFILL,
    PROMPT_CASES,
    Bench,
    PeerFailedError,
    answers_case,
    busy_case,
    context_case,
)
from benchmarks.peers.servers import running
from benchmarks.workload import Adapter, Case

SERVER = "llama-server"
_FASTEST, *_OTHERS = FORMATS
_LIMIT_S = 900.0
_CONTEXT_STEP = 256
"""llama.cpp rounds a sequence's context up to a multiple of this."""


def system_name(model_format: str) -> str:
    """Of the batched benchmark, in rows and results."""
    return f"llama.cpp {model_format}"


class LlamaCppPeer:
    """The benchmark runs every case in the fastest format, and the main ones in the others; the server the fastest.

    Raises:
        UnavailableError: llama.cpp cannot be built, or has no file of the model.
    """

    name = "llama.cpp"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._llama = make_llama_cpp(bench.workload.model)
        self._models = dict(zip(FORMATS, self._llama.models, strict=True))

    def visit(self, index: int) -> Iterator[Sample]:
        """See ``Peer``."""
        if "process" in self._bench.parts:
            yield from self._in_process(index)
        if "servers" in self._bench.parts:
            for case in ANSWER_CASES:
                yield _sample(SERVER, answers_case(case), index, self._answers(case, index))

    def _in_process(self, index: int) -> Iterator[Sample]:
        settings, lengths = self._bench.workload.settings, self._bench.lengths
        for model_format in FORMATS:
            for case in PROMPT_CASES:
                measured = self._run(model_format, case.num_sequences, settings.prompt_tokens)
                yield _sample(system_name(model_format), case.name, index, measured)
        for num_tokens in lengths.contexts:
            measured = self._run(_FASTEST, 1, num_tokens)
            yield _sample(system_name(_FASTEST), context_case(num_tokens), index, measured)
        for case in BUSY_CASES:
            measured = self._run(_FASTEST, case.num_sequences, settings.prompt_tokens, is_busy=True)
            yield _sample(system_name(_FASTEST), busy_case(case), index, measured)

    def _run(
        self, model_format: str, num_sequences: int, num_prompt: int, *, is_busy: bool = False
    ) -> Measurement:
        """Twice in one process, of which the second run counts: in the first one memory is new."""
        settings = self._bench.workload.settings
        context = num_sequences * _round_up(num_prompt + settings.decode_steps)
        command = [
            self._llama.program("llama-batched-bench"),
            *("-m", str(self._models[model_format])),
            *("-c", str(context), "-t", str(settings.threads)),
            *("-npp", str(num_prompt), "-ntg", str(settings.decode_steps)),
            *("-npl", f"{num_sequences},{num_sequences}"),
            *("--output-format", "jsonl"),
        ]
        with busy_process() if is_busy else nullcontext():
            return parse_batched_bench(_output(command))

    def _answers(self, case: Case, index: int) -> Measurement:
        """On a server with as many slots as there are streams."""
        slots = case.num_sequences
        context = slots * _round_up(2 * self._bench.lengths.answer_tokens)
        loras = self._loras if case.num_adapters else {}

        def command(port: int) -> Sequence[str]:
            options = ["-np", slots, "-c", context, "-t", self._bench.workload.settings.threads]
            options += ["--host", "127.0.0.1", "--port", port]
            options += ["--cache-ram", 0]  # prompts that come once are not worth keeping
            if loras:
                options += ["--lora", ",".join(map(str, loras.values())), "--lora-init-without-apply"]
            program = self._llama.program("llama-server")
            return [program, "-m", str(self._models[_FASTEST]), *map(str, options)]

        numbers = {adapter: number for number, adapter in enumerate(loras)}

        def fields(adapter: Adapter | None) -> Mapping[str, Any]:
            return {"lora": [] if adapter is None else [{"id": numbers[adapter], "scale": 1.0}]}

        with running(command, {}) as server:
            return measure_answers(self._bench, case, 1000 * index, openai_ask(server.address, fields))

    @cached_property
    def _loras(self) -> Mapping[Adapter, Path]:
        """The adapters as llama.cpp's own converter writes them, in 16 bits as they are."""
        workload = self._bench.workload
        adapters = sorted({adapter for case in ANSWER_CASES for adapter in case.adapters})
        files = {adapter: workload.scratch / f"{adapter.name}.gguf" for adapter in adapters}
        for adapter, path in files.items():
            converter = str(self._llama.source / "convert_lora_to_gguf.py")
            options = ["--base", workload.directory, "--outtype", "f16", "--outfile", path]
            _output([sys.executable, converter, *map(str, options), str(workload.adapters[adapter])])
        return files


def parse_batched_bench(text: str) -> Measurement:
    """The last run that ``llama-batched-bench --output-format jsonl`` tells of.

    Raises:
        PeerFailedError: there is none: it leaves out, without a word, what its context is too short for.
    """
    runs = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if not runs:
        raise PeerFailedError(f"llama-batched-bench tells of no run: {_tail(text)}")
    last = runs[-1]
    return Measurement(
        {PREFILL: last["speed_pp"], DECODE: last["speed_tg"]},
        {"prefill": [last["t_pp"]], "decode": [last["t_tg"]]},
    )


def _output(command: Sequence[str]) -> str:
    """What a program prints.

    Raises:
        PeerFailedError: it failed, or took too long.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_S, env=variables, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PeerFailedError(f"{Path(command[0]).name} took longer than {_LIMIT_S:.0f} s") from error
    if result.returncode != 0:
        raise PeerFailedError(f"{command[0]} ended with {result.returncode}: {_tail(result.stderr)}")
    return result.stdout


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-5:])


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // _CONTEXT_STEP) * _CONTEXT_STEP


def _sample(system: str, case: str, index: int, measurement: Measurement) -> Sample:
    return Sample(system=system, variant="", case=case, round=index, measurement=measurement)
