"""What others' programs must find on a server: one function for each suite."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from conformance.environments import HERE, node_of, offline, python_of
from manyhats.client import Client

SUITES = HERE / "suites"
DOCUMENT = HERE.parents[1] / "docs" / "clients.md"
QUESTION = "How many customers live in Lisbon?"
_TIMEOUT_S = 900.0
_TOLERANCE = 1e-5
SENTIMENT = "sentiment"
"""The example task that lm-eval's local task fits."""
NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 10, 32, 16


class ConformanceError(Exception):
    """A program found something else than it should."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready.

    Attributes:
        grpc, http: its addresses.
        model: the base's name.
        tasks: names of tasks; the first stands where one is enough.
        directory: the base's files, which have its tokenizer.
    """

    grpc: str
    http: str
    model: str
    tasks: Sequence[str]
    directory: Path

    def variables(self, model: str = "") -> Mapping[str, str]:
        """The environment of a suite's processes."""
        return offline(
            CONFORMANCE_URL=f"http://{self.http}/v1",
            CONFORMANCE_MODEL=model or self.model,
            CONFORMANCE_TASK=self.tasks[0],
        )


def langchain(served: Served) -> str:
    """LangChain's tests of a chat model, as far as the server's model can do what they ask.

    Raises:
        ConformanceError: one fails.
    """
    python = python_of("langchain")
    command = [str(python), "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    for option in ("mode=auto", "default_fixture_loop_scope=session", "default_test_loop_scope=session"):
        command += ["-o", f"asyncio_{option}"]
    # Nothing of the project's own tests.
    command += ["--rootdir", str(SUITES), "--confcutdir", str(SUITES), "-c", "/dev/null"]
    said = _said([*command, str(SUITES / "langchain_chat.py")], served.variables())
    skipped = {line.rpartition(": ")[2] for line in said.splitlines() if line.startswith("SKIPPED")}
    example = documented("langchain", "langchain_openai")(served)
    return f"{said.strip().splitlines()[-1]} ({' '.join(sorted(skipped))}); {example}"


def documented(environment: str, package: str) -> Callable[[Served], str]:
    """A check that the program in docs/clients.md that imports a package prints what the server answers.

    The check raises ConformanceError if it prints something else.
    """

    def check(served: Served) -> str:
        blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
        (program,) = (each for each in blocks if f"from {package}" in each)
        python = python_of(environment)
        variables = offline(LITELLM_LOCAL_MODEL_COST_MAP="True")  # else it would fetch prices
        said = _said([str(python), "-c", program.replace("127.0.0.1:8000", served.http)], variables)
        with Client(served.grpc) as client:
            answer = client.generate(
                [{"role": "user", "content": QUESTION}], task_id="sql", temperature=0, max_new_tokens=64
            )
        _require(QUESTION in program and said.strip() == answer.text.strip(), f"it printed {said!r}")
        return f"the documented program prints {said.strip()!r}"

    return check


def lm_eval(served: Served) -> str:
    """lm-eval's log-likelihoods and accuracy on a local task, against gRPC's ``Score``.

    Raises:
        ConformanceError: one differs.
    """
    python = python_of("lm-eval")
    lines = []
    with tempfile.TemporaryDirectory() as name, Client(served.grpc) as client:
        for model in (served.model, SENTIMENT):
            out = Path(name) / f"{model}.json"
            _said([str(python), str(SUITES / "lm_eval_run.py"), str(out)], served.variables(model))
            task_id = "" if model == served.model else model
            lines.append(f"{model}: {_compared(json.loads(out.read_text()), client, task_id)}")
    return "; ".join(lines)


def _compared(found: Mapping[str, Any], client: Client, task_id: str) -> str:
    """Compares what lm-eval found with the server's scores; says how far they are apart."""
    furthest, num_right, num_items = 0.0, 0, 0
    for _, samples in groupby(found["samples"], key=lambda sample: sample["item"]):
        choices = list(samples)
        # lm-eval counts white space at the end of a context as the continuation's.
        context = choices[0]["context"].rstrip()
        space = choices[0]["context"][len(context) :]
        scores = client.score(
            context, [space + choice["continuation"] for choice in choices], task_id=task_id
        ).scores
        apart = [
            abs(score.logprob - choice["logprob"]) for score, choice in zip(scores, choices, strict=True)
        ]
        furthest = max(furthest, *apart)
        best = max(range(len(choices)), key=lambda index: scores[index].logprob)
        num_right += best == choices[0]["target"]
        num_items += 1
    _require(furthest <= _TOLERANCE, f"a log-likelihood is {furthest:.2g} away from Score's")
    accuracy = num_right / num_items
    _require(found["accuracy"] == accuracy, f"accuracy {found['accuracy']}, by Score {accuracy}")
    return (
        f"accuracy {accuracy:.2f} on {num_items} items, log-likelihoods at most {furthest:.1g} from Score's"
    )


def guidellm(served: Served) -> str:
    """A short benchmark on both routes: no error, and the tokens that guidellm counts are the server's.

    Raises:
        ConformanceError: a request failed, or a count differs.
    """
    program = python_of("guidellm").with_name("guidellm")
    lines = []
    for route in ("/v1/completions", "/v1/chat/completions"):
        with tempfile.TemporaryDirectory() as name, Client(served.grpc) as client:
            out = Path(name) / "report.json"
            _said([str(program), "run", *_benchmark(served, route, out)], served.variables())
            (benchmark,) = json.loads(out.read_text())["benchmarks"]
            lines.append(f"{route}: {_counted(benchmark['requests'], route, client)}")
    return "; ".join(lines)


def _benchmark(served: Served, route: str, out: Path) -> list[str]:
    length = f"prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    return [
        *(
            "--backend",
            f"kind=openai_http,target=http://{served.http},model={served.model},request_format={route}",
        ),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=hf_auto,model={served.directory}"),
        *("--data", f"kind=synthetic_text,{length}"),
        *("--output", f"kind=json,path={out}"),
        "--disable-console",
    ]


def _counted(requests: Mapping[str, Any], route: str, client: Client) -> str:
    """Compares a report's counts with what was asked for and with the server's tokenizer."""
    answered = requests["successful"] or []
    failed = [*(requests["errored"] or []), *(requests["incomplete"] or [])]
    _require(not failed, f"{len(failed)} requests failed, the first with {str(failed[:1])[:500]}")
    _require(len(answered) == NUM_REQUESTS, f"{len(answered)} requests were answered, not {NUM_REQUESTS}")
    for each in answered:
        body = json.loads(each["request_args"])["body"]
        prompt: Any = body["prompt"] if "prompt" in body else [_turn(turn) for turn in body["messages"]]
        num_tokens = len(client.tokenize(prompt).ids)
        _require(
            each["prompt_tokens"] == num_tokens, f"{each['prompt_tokens']} prompt tokens, not {num_tokens}"
        )
        if route == "/v1/completions":
            _require(num_tokens == PROMPT_TOKENS, f"{num_tokens} prompt tokens, not {PROMPT_TOKENS}")
        _require(
            each["output_tokens"] == OUTPUT_TOKENS, f"{each['output_tokens']} tokens, not {OUTPUT_TOKENS}"
        )
    return f"{len(answered)} requests, {sum(each['total_tokens'] for each in answered)} tokens"


def _turn(turn: Mapping[str, Any]) -> dict[str, str]:
    content = turn["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": turn["role"], "content": text}


def node(served: Served) -> str:
    """npm's ``openai`` package.

    Raises:
        ConformanceError: it finds a difference.
    """
    directory = node_of("node")
    said = _said(["node", str(directory / "check.mjs")], served.variables())
    return ", ".join(re.findall(r"^(.*): as it should be$", said, re.MULTILINE))


CHECKS: Mapping[str, Callable[[Served], str]] = {
    "langchain": langchain,
    "llama-index": documented("llama-index", "llama_index"),
    "litellm": documented("litellm", "litellm"),
    "inspect-ai": documented("inspect-ai", "inspect_ai"),
    "lm-eval": lm_eval,
    "guidellm": guidellm,
    "node": node,
}


def _said(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """What a program prints.

    Raises:
        ConformanceError: it failed; tells the end of what it said.
    """
    try:
        result = subprocess.run(
            command,
            env=dict(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConformanceError(f"{command[0]} did not end within {_TIMEOUT_S:.0f} s") from None
    if result.returncode != 0:
        raise ConformanceError(f"{command[0]} ended with {result.returncode}:\n{result.stdout[-6000:]}")
    return result.stdout


def _require(is_so: bool, complaint: str) -> None:
    if not is_so:
        raise ConformanceError(complaint)
