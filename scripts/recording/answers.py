"""Tokens and log-probabilities of a served model: each request alone, then all in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from manyhats.client import Client, Generation, ScoreResult, Token
from manyhats.client.requests import Continuation, Prompt
from recording.exact import Recorded, digest, exact, row_of_floats
from recording.inputs import Subject

_ALL_PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.9, "seed": 1},
    "top_p": {"temperature": 1.2, "top_p": 0.7, "seed": 2},
    "top_k": {"temperature": 1.5, "top_k": 5, "seed": 3},
    "min_p": {"min_p": 0.05, "seed": 4},
    "typical_p": {"typical_p": 0.6, "seed": 5},
    "greedy with penalties": {**_ALL_PENALTIES, "temperature": 0.0},
    "penalties": {**_ALL_PENALTIES, "temperature": 0.8, "seed": 6},
    "logit_bias": {"logit_bias": {40: 6.0, 41: -100.0, 60: 5.0}, "temperature": 0.7, "seed": 7},
    "everything": {
        **_ALL_PENALTIES,
        "temperature": 1.1,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "seed": 2**64 - 1,
        "logit_bias": {50: 3.0},
    },
    "stops": {"stop_sequences": ["e", "the"], "min_new_tokens": 2, "include_stop_sequence": True},
    "stop_token_ids": {"stop_token_ids": list(range(100, 140)), "temperature": 1.0, "seed": 8},
    "ignore_eos": {
        "ignore_eos": True,
        "temperature": 0.0,
        "logit_bias": {2: 8.0},
        "skip_special_tokens": False,
    },
}
_SOME_SAMPLING = ("greedy", "everything")
_TEXT = "The cat sat on the mat, and the dog"
_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}]
_MOST_TOP_LOGPROBS = 100


@dataclass(frozen=True, slots=True)
class _Case:
    """One request: a generation, or, with continuations, a scoring."""

    name: str
    task: str
    prompt: Prompt
    options: Mapping[str, Any] = field(default_factory=dict)
    continuations: Sequence[Continuation] = ()

    def ask(self, client: Client, salt: str) -> Generation | ScoreResult:
        """Ask it, sharing cached work with requests of the same salt only."""
        if self.continuations:
            return client.score(self.prompt, self.continuations, task_id=self.task, cache_salt=salt)
        return client.generate(self.prompt, task_id=self.task, cache_salt=salt, **self.options)


def record_answers(client: Client, subject: Subject, tasks: Sequence[str]) -> dict[str, Recorded]:
    """Sections ``tokens`` and ``logprobs`` of all cases, by how they ran and by name."""
    cases = list(_cases(subject, tasks))
    alone = [case.ask(client, "alone") for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: case.ask(client, "together"), cases))
    names = [case.name for case in cases]
    ways = {"alone": alone, "together": together, "streamed": [_streamed(client, case) for case in cases[:3]]}
    return {
        "tokens": {
            way: {name: _tokens(answer) for name, answer in zip(names, answers, strict=False)}
            for way, answers in ways.items()
        },
        "logprobs": {
            way: {name: _logprobs(answer) for name, answer in zip(names, answers, strict=False)}
            for way, answers in ways.items()
        },
        "tokenized": {
            f"{task or 'base'}, {name}": exact(client.tokenize(prompt, task_id=task))
            for task in ("", *tasks)
            for name, prompt in (("text", _TEXT), ("chat", _CHAT))
        },
    }


def _cases(subject: Subject, tasks: Sequence[str]) -> Iterator[_Case]:
    """Every way of sampling on the base, some on the tasks; long prompts and scorings of all."""
    prompts: Mapping[str, Prompt] = {"text": _TEXT, "chat": _CHAT, "long": subject.ids(subject.long)}
    most = {"max_new_tokens": 2, "prompt_logprobs": True, "top_logprobs": _MOST_TOP_LOGPROBS}
    for task in ("", *tasks):
        for sampling in _SOME_SAMPLING if task else SAMPLING:
            options = {"max_new_tokens": 12, "logprobs": True, "top_logprobs": 3, **SAMPLING[sampling]}
            for name, prompt in prompts.items():
                if name == "text" or (sampling in _SOME_SAMPLING and (not task or name == "long")):
                    yield _Case(f"{task or 'base'}, {name}, {sampling}", task, prompt, options)
        yield _Case(f"{task or 'base'}, all log-probabilities", task, _TEXT, {"logprobs": True, **most})
        continuations: list[Continuation] = [" Paris", subject.ids(9, seed=1)]
        yield _Case(f"{task or 'base'}, score", task, _TEXT, continuations=continuations)


def _streamed(client: Client, case: _Case) -> Generation:
    """The answer as its pieces make it."""
    with client.generate_stream(
        case.prompt, task_id=case.task, cache_salt="streamed", **case.options
    ) as stream:
        chunks = list(stream)
    last = chunks[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Generation(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        finish_reason=last.finish_reason,
        usage=last.usage,
        adapter=chunks[0].adapter,
        prompt_tokens=chunks[0].prompt_tokens,
    )


def _tokens(answer: Generation | ScoreResult) -> Recorded:
    usage = {
        "prompt_tokens": answer.usage.prompt_tokens,
        "generated_tokens": answer.usage.generated_tokens,
    }
    adapter = exact(answer.adapter)
    if isinstance(answer, ScoreResult):
        return {**usage, "adapter": adapter, "ids": [_ids(score.tokens) for score in answer.scores]}
    return {
        **usage,
        "adapter": adapter,
        "ids": _ids(answer.tokens),
        "texts": digest([token.text for token in answer.tokens]),
        "text": answer.text,
        "finish_reason": answer.finish_reason.value,
    }


def _ids(tokens: Sequence[Token]) -> str:
    return " ".join(str(token.id) for token in tokens)


def _logprobs(answer: Generation | ScoreResult) -> Recorded:
    if isinstance(answer, ScoreResult):
        return [
            f"{score.logprob.hex()} of {row_of_floats(token.logprob for token in score.tokens)}"
            for score in answer.scores
        ]
    return {
        name: {
            "logprobs": row_of_floats(token.logprob for token in tokens),
            "ranks": " ".join(str(token.rank) for token in tokens),
            "top": digest([token.top for token in tokens]),
        }
        for name, tokens in (("answer", answer.tokens), ("prompt", answer.prompt_tokens))
        if tokens
    }
