"""Generates, scores and tokenizes for callers, whatever the transport."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from manyhats.adapters.heads import TaskKind
from manyhats.adapters.reserved_labels import read_classes
from manyhats.engine.errors import FieldInvalidError, ModelError
from manyhats.engine.request import (
    Request,
    ResponseOptions,
    SamplingParams,
    ScoreRequest,
    SpeculationParams,
    StoppingParams,
)
from manyhats.server.access.rules import check_priority
from manyhats.server.service.classification import (
    Classified,
    class_request,
    classified,
    named_text,
    prompts_of,
)
from manyhats.server.service.conversations import ChatPrompt
from manyhats.server.service.merging import each_of, merged
from manyhats.server.service.prompts import Prompt, TextPrompt, TokenPrompt
from manyhats.server.service.task_defaults import Fields, TaskDefaults, read_defaults
from manyhats.server.service.tasks import Tasks, check_kind, task_id
from manyhats.server.service.text_threads import slices

if TYPE_CHECKING:
    from manyhats.engine.constraint import Constraint
    from manyhats.engine.output import ScoreOutput, StepOutput
    from manyhats.engine.text.tokenizer import Tokenizer
    from manyhats.server.observability.metrics import Metrics
    from manyhats.server.service.backend import Backend
    from manyhats.server.service.call import Call

# Limits of Tokenize's answer: tokens, and bytes of their texts.
MAX_TOKENIZED = 256 * 1024
MAX_TOKENIZED_BYTES = 8 * 1024 * 1024
MAX_SEQUENCES = 16
# Texts of one call that are classified at a time.
_IN_FLIGHT = 32


class Generations:
    """Runs callers' requests on the adapter that their call names.

    Args:
        backend: its engine, store and tokenizers.
        metrics: counts.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._tasks = Tasks(backend)
        self._metrics = metrics

    async def request(
        self,
        call: Call,
        prompt: Prompt,
        *,
        sampling: Fields,
        stopping: Fields,
        speculation: Fields,
        response: ResponseOptions,
        constraint: Constraint | None = None,
        cache_salt: str,
        priority: int,
    ) -> Request:
        """A call's request to the engine: its prompt as tokens, on the version it names, with that version's defaults.

        Raises:
            AdapterError: there is no such version, or it cannot be used.
            RequestError: the prompt, the salt or another field cannot be served.
        """
        adapter = self._tasks.resolved(call)
        check_kind(adapter, TaskKind.GENERATE, act="generate", base=self._backend.info.kind)
        defaults = TaskDefaults() if adapter is None else read_defaults(adapter.labels)
        sampling_params = SamplingParams(**sampling.over(defaults.sampling))
        stopping_params = StoppingParams(**stopping.over(defaults.stopping))
        speculation_params = SpeculationParams(**speculation.over(defaults.speculation))
        self._backend.engine.check_queue(
            adapter, deadline_s=call.deadline_s
        )  # before texts are tokenized for nothing
        tokenizer = await self._tasks.tokenizer_of(adapter)
        encoder = self._tasks.encoder(tokenizer, self._max_tokens, adapter)
        prompt_token_ids = await encoder.encode(prompt)
        language = await self._constraint(prompt, tokenizer, constraint)
        kind = "chat" if isinstance(prompt, ChatPrompt) else "text"
        call.work.queued(kind, self._backend.info.name, sampling_params, stopping_params)
        return Request(
            id=call.id,
            prompt_token_ids=prompt_token_ids,
            adapter=adapter,
            tokenizer=tokenizer,
            sampling=sampling_params,
            stopping=stopping_params,
            speculation=speculation_params,
            response=response,
            constraint=language,
            priority=check_priority(priority, call.caller),
            deadline_s=call.deadline_s,
            cache_salt=cache_salt,
            accepted_s=call.received_s,
        )

    async def _constraint(
        self, prompt: Prompt, tokenizer: Tokenizer | None, given: Constraint | None
    ) -> Constraint | None:
        """What an answer must be: what the caller says, or what keeps its calls of tools valid."""
        if not isinstance(prompt, ChatPrompt) or prompt.tool_use is None or not prompt.tool_use.may_call:
            return given
        tool_use = prompt.tool_use
        if given is not None:
            raise FieldInvalidError(
                "chat.tool_choice", "must be none where another field says what the answer must be"
            )
        eos_token_ids = self._backend.engine.eos_token_ids(tokenizer)
        work = partial(tool_use.constraint, tokenizer or self._backend.tokenizer, eos_token_ids)
        return await self._backend.text_threads.run(work, prompt.length)

    def generate_several(
        self, call: Call, asked: Request, num_sequences: int
    ) -> AsyncGenerator[tuple[int, StepOutput], None]:
        """The engine's outputs of several generations of a call's prompt, counted, each with its sequence's index.

        The prompt is computed and counted once: when the first generation has its first output, the prompt's blocks are
        in the prefix cache, and the others begin with them. They differ by their seeds, which follow each other. Prompt
        log-probabilities come with the first. An error of one ends all; closing this closes all at once.

        Raises:
            FieldInvalidError: ``num_sequences`` is out of range.
            EngineError, AdapterError: it cannot be served; as the outputs are read.
        """
        check_num_sequences(num_sequences)
        first = self._counted(call, asked, 0, asked.accepted_s)
        # One is the usual case, which needs nothing between that and its reader.
        return first if num_sequences == 1 else self._several(call, asked, num_sequences, first)

    async def _several(
        self,
        call: Call,
        asked: Request,
        num_sequences: int,
        first: AsyncGenerator[tuple[int, StepOutput], None],
    ) -> AsyncGenerator[tuple[int, StepOutput], None]:
        async with aclosing(first):
            # There is one: a generation ends with an output, or with an error.
            index, output = await anext(first)
            yield index, output
            others = [
                self._counted(call, _sibling(asked, index), index, output.time_s)
                for index in range(1, num_sequences)
            ]
            async with aclosing(merged([first, *others])) as outputs:
                async for _, each in outputs:
                    yield each

    async def _counted(
        self, call: Call, asked: Request, index: int, since_s: float
    ) -> AsyncGenerator[tuple[int, StepOutput], None]:
        """The engine's outputs of one sequence; the first one's count the prompt too."""
        task, is_first = task_id(asked.adapter), index == 0
        output = None
        try:
            async with aclosing(self._backend.engine.generate(asked)) as outputs:
                async for output in outputs:
                    self._metrics.output(task, output, since_s=since_s, is_first=is_first)
                    if is_first:
                        call.work.began(output.time_s)
                    since_s, is_first = output.time_s, False
                    yield index, output
        finally:
            if output is not None:
                self._metrics.guessed(task, output.usage)
                call.work.ended(output.usage, output.finish_reason, is_sibling=index > 0)

    async def score_request(
        self,
        call: Call,
        prompt: Prompt,
        continuations: Sequence[TextPrompt | TokenPrompt],
        *,
        cache_salt: str,
        priority: int,
    ) -> ScoreRequest:
        """``request`` for a scoring of continuations."""
        adapter = self._tasks.resolved(call)
        check_kind(adapter, TaskKind.GENERATE, act="score continuations", base=self._backend.info.kind)
        self._backend.engine.check_queue(adapter, deadline_s=call.deadline_s)
        tokenizer = await self._tasks.tokenizer_of(adapter)
        encoder = self._tasks.encoder(tokenizer, self._max_tokens, adapter)
        tokens = await encoder.encode_scoring(prompt, continuations)
        call.work.queued("score", self._backend.info.name)
        return ScoreRequest(
            id=call.id,
            prompt_token_ids=tokens.prompt_token_ids,
            continuations=tokens.continuations,
            num_given=tokens.num_given,
            adapter=adapter,
            tokenizer=tokenizer,
            response=ResponseOptions(logprobs=True),
            priority=check_priority(priority, call.caller),
            deadline_s=call.deadline_s,
            cache_salt=cache_salt,
            accepted_s=call.received_s,
        )

    async def score(self, call: Call, asked: ScoreRequest) -> ScoreOutput:
        """A call's scores, counted.

        Raises:
            EngineError, AdapterError: it cannot be served.
        """
        output = await self._backend.engine.score(asked)
        self._metrics.scored(task_id(asked.adapter), output.usage)
        call.work.ended(output.usage)
        return output

    async def classify(self, call: Call, texts: Sequence[str]) -> list[Classified]:
        """What the task that a call names says of each text, by the scores of its classes.

        Scores are those of the trainer's evaluation by labels: of a class and the token that ends an answer.

        Raises:
            FieldInvalidError: ``task_id``: it has no classes; ``texts``, or one of them, cannot be put to it.
            EngineError, AdapterError: it cannot be served.
        """
        adapter = self._tasks.resolved(call)
        classes = None if adapter is None else read_classes(adapter.labels)
        if adapter is None or classes is None:
            whose = "the base model" if adapter is None else adapter.name
            raise FieldInvalidError("task_id", f"{whose} has no classes (labels class.0, class.1, …)")
        prompts = prompts_of(classes, texts)
        tokenizer = await self._tasks.tokenizer_of(adapter)
        encoder = self._tasks.encoder(tokenizer, self._max_tokens)
        try:
            ends = await encoder.ends(self._backend.engine.eos_token_ids(tokenizer))
        except ModelError as error:
            raise FieldInvalidError("task_id", str(error)) from error

        async def one(index: int) -> Classified:
            with named_text(index):
                tokens = await encoder.encode_answers(prompts[index], classes.texts, ends)
                call.work.queued("score", self._backend.info.name)
                asked = class_request(call, index, tokens, adapter, tokenizer)
                return classified(classes, await self.score(call, asked))

        return await each_of(one, len(prompts), at_once=_IN_FLIGHT)

    async def tokenize(self, call: Call, prompt: Prompt) -> tuple[tuple[int, ...], list[str]]:
        """The tokens of a prompt, or of a text as a task or base that generates nothing reads it; the text of each.

        Raises:
            AdapterError: the task does not exist, or its tokenizer cannot be used.
            RequestError: the prompt is invalid, or over a limit.
        """
        adapter = self._tasks.resolved(call)
        tokenizer = await self._tasks.tokenizer_of(adapter)
        encoder = self._tasks.encoder(tokenizer, MAX_TOKENIZED)
        kind = self._backend.info.kind if adapter is None else adapter.kind
        is_prompt = kind is TaskKind.GENERATE
        ids = await encoder.encode(prompt) if is_prompt else (await encoder.read(prompt)).token_ids
        work = partial(_pieces, ids, tokenizer or self._backend.tokenizer, prompt.field)
        return ids, await self._backend.text_threads.run(work, len(ids))

    async def detokenize(self, call: Call, prompt: TokenPrompt) -> str:
        """The text of tokens, special ones as their literals.

        Raises:
            AdapterError: the task does not exist, or its tokenizer cannot be used.
            RequestError: there are too many tokens, or one is outside the vocabulary.
        """
        tokenizer = await self.tokenizer(call)
        ids = await self._tasks.encoder(tokenizer, MAX_TOKENIZED).encode(prompt)
        return await self._backend.text_threads.run(partial(tokenizer.text, ids), len(ids))

    async def tokenizer(self, call: Call) -> Tokenizer:
        """The tokenizer of the task that a call names, or the base's.

        Raises:
            AdapterError: the task does not exist, or its tokenizer cannot be used.
        """
        return await self._tasks.tokenizer_of(self._tasks.resolved(call)) or self._backend.tokenizer

    @property
    def _max_tokens(self) -> int:
        """The limit of prompt tokens, which leaves room for at least one more."""
        return self._backend.engine.max_context_length - 1


def check_num_sequences(num_sequences: int) -> None:
    """Check how many generations of one prompt are wanted.

    Raises:
        FieldInvalidError: too many, or none.
    """
    if not 1 <= num_sequences <= MAX_SEQUENCES:
        raise FieldInvalidError("num_sequences", f"must be in [1, {MAX_SEQUENCES}], not {num_sequences}")


def _pieces(ids: Sequence[int], tokenizer: Tokenizer, field: str) -> list[str]:
    """The text of each token, in slices: other threads run in between."""
    pieces: list[str] = []
    num_bytes = 0
    for part in slices(ids):
        texts = [tokenizer.piece(token_id) for token_id in part]
        num_bytes += sum(len(text.encode()) for text in texts)
        if num_bytes > MAX_TOKENIZED_BYTES:
            raise FieldInvalidError(
                field,
                f"its tokens have more than {MAX_TOKENIZED_BYTES} bytes of text together, the limit",
            )
        pieces += texts
    return pieces


def _sibling(asked: Request, index: int) -> Request:
    """The request for a further sequence of the same prompt."""
    seed = asked.sampling.seed
    return replace(
        asked,
        id=f"{asked.id}-{index}",
        sampling=replace(asked.sampling, seed=None if seed is None else (seed + index) % 2**64),
        response=replace(asked.response, prompt_logprobs=False),
    )
