"""What texts and tokens are to each other, by vLLM's routes, which evaluation harnesses use."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from msgspec import Struct

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.http.call import HttpCall
from manyhats.server.http.models import task_name
from manyhats.server.http.openai_messages import TokenizeBody, conversation
from manyhats.server.service.conversations import ChatPrompt
from manyhats.server.service.gate import Gate
from manyhats.server.service.generations import Generations
from manyhats.server.service.prompts import TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from manyhats.server.observability.metrics import Metrics


class Tokenized(Struct):
    """The tokens of a prompt, and the text of each if wanted."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


class Detokenized(Struct):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(Struct, omit_defaults=True, kw_only=True):
    """A task's chat template and special tokens, by the names of ``tokenizer_config.json``."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    model_max_length: int
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None


class Tokenization:
    """Tokenizes on the backend behind the gate, as a request to it would."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def tokenize(self, call: HttpCall, body: TokenizeBody) -> Tokenized:
        """``POST /tokenize``."""
        call.names(task_name(self._gate.backend, body.model))
        if (body.prompt is None) == (body.messages is None):
            raise FieldInvalidError("prompt", "exactly one of prompt and messages must be given")
        prompt: TextPrompt | ChatPrompt
        if body.messages is not None:
            prompt = await self._gate.backend.text_threads.read(partial(conversation, body), call.num_bytes)
        else:
            prompt = TextPrompt(
                body.prompt or "", add_special_tokens=body.add_special_tokens is not False, field="prompt"
            )
        ids, pieces = await self._generations.tokenize(call, prompt)
        limit = self._gate.backend.engine.max_context_length
        return Tokenized(len(ids), limit, list(ids), pieces if body.return_token_strs else None)

    async def detokenize(self, call: HttpCall, body: DetokenizeBody) -> Detokenized:
        """``POST /detokenize``."""
        call.names(task_name(self._gate.backend, body.model))
        return Detokenized(await self._generations.detokenize(call, TokenPrompt(body.tokens, field="tokens")))

    async def info(self, call: HttpCall, body: None) -> TokenizerInfo:
        """``GET /tokenizer_info``, of the base or of ``?model=``."""
        models = parse_qs(call.query.decode("ascii", "replace")).get("model", [])
        call.names(task_name(self._gate.backend, models[-1] if models else None))
        tokenizer = await self._generations.tokenizer(call)
        special = tokenizer.special_tokens
        return TokenizerInfo(
            model_max_length=self._gate.backend.engine.max_context_length,
            chat_template=tokenizer.chat_template,
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token"),
            unk_token=special.get("unk_token"),
            pad_token=special.get("pad_token"),
        )

    @property
    def _generations(self) -> Generations:
        return Generations(self._gate.backend, self._metrics)
