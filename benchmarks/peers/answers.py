"""Whole answers through a server, in turns: all streams of a case ask at once, and again when all are answered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from typing import Any

from benchmarks.measure import Measurement
from benchmarks.peers.beside import MemoryWatch
from benchmarks.peers.peer import ANSWERS, DISTINCT, PEAK, Bench, PeerFailedError
from benchmarks.workload import Adapter, Case

Ask = Callable[[Sequence[int], Adapter | None, int], int]
"""Has one prompt answered, over an adapter or the base, with so many tokens; returns how many came."""

_LIMIT_S = 600.0
_WARM_UP, _LONG = -1, -2
"""Seeds of prompts that no round has."""


def measure_answers(bench: Bench, case: Case, seed: int, ask: Ask) -> Measurement:
    """Tokens of answers a second, prompts included in the time; a first turn of all streams is not timed.

    Args:
        seed: the first of the turns' own ones: no prompt may come twice to a server that caches prompts.

    Raises:
        PeerFailedError: an answer had another length than asked for.
    """
    turns = -(-bench.lengths.answers // case.num_sequences)
    length = bench.lengths.answer_tokens
    answer_all(bench, case, _WARM_UP, ask, (length, length))
    began_s = time.perf_counter()
    times_s = [
        seconds
        for turn in range(turns)
        for seconds in answer_all(bench, case, seed + turn, ask, (length, length))
    ]
    elapsed_s = time.perf_counter() - began_s
    return Measurement({ANSWERS: len(times_s) * length / elapsed_s}, {"answer": times_s})


def measure_peak(bench: Bench, pid: int, ask: Ask) -> Measurement:
    """The most memory of a server and its children while it answers long prompts, each over an adapter of its own.

    Raises:
        PeerFailedError: an answer had another length than asked for.
    """
    num_answer = bench.lengths.answer_tokens
    with MemoryWatch(pid) as watch:
        answer_all(bench, DISTINCT, _LONG, ask, (bench.lengths.memory_tokens - num_answer, num_answer))
    return Measurement({} if watch.peak_mib is None else {PEAK: watch.peak_mib})


def answer_all(bench: Bench, case: Case, seed: int, ask: Ask, lengths: tuple[int, int]) -> list[float]:
    """One answer for each stream, all asked at once; the seconds that each took.

    Args:
        lengths: tokens of a prompt, and of an answer.

    Raises:
        PeerFailedError: an answer had another length than asked for.
    """
    num_prompt, num_answer = lengths
    prompts = bench.workload.prompts(case, seed, num_prompt)

    def answer(row: int) -> float:
        sent_s = time.perf_counter()
        num_tokens = ask(prompts[row], case.adapter_of(row), num_answer)
        if num_tokens != num_answer:
            raise PeerFailedError(f"an answer has {num_tokens} tokens; {num_answer} were asked for")
        return time.perf_counter() - sent_s

    with ThreadPoolExecutor(case.num_sequences) as pool:
        return list(pool.map(answer, range(case.num_sequences)))


def openai_ask(address: str, fields: Callable[[Adapter | None], Mapping[str, Any]]) -> Ask:
    """Asks a server for completions as OpenAI's API has them, greedily and past any EOS.

    Args:
        address: ``host:port``.
        fields: what chooses the adapter, such as ``model``.
    """

    def ask(prompt: Sequence[int], adapter: Adapter | None, num_tokens: int) -> int:
        body = {
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **fields(adapter),
        }
        answer = _post(address, "/v1/completions", body)
        return int(answer["usage"]["completion_tokens"])

    return ask


def _post(address: str, path: str, body: Mapping[str, Any]) -> Any:
    connection = HTTPConnection(address, timeout=_LIMIT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except (OSError, HTTPException) as error:
        raise PeerFailedError(f"{path}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise PeerFailedError(f"{path}: {response.status} {content.decode(errors='replace')[:500]}")
    return json.loads(content)
