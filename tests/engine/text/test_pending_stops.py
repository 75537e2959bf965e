"""Stop sequences in text that a later token might have changed, as transformers' ``stop_strings`` finds them.

Llama 2's and Mistral's line end is a byte token, and a run of byte tokens is certain at its end alone.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.output import FinishReason
from manyhats.engine.request import StoppingParams
from manyhats.engine.text.stopping import StopChecker
from support.factories.saying_model import make_saying_checkpoint
from support.harnesses.engine import collect, load_tiny, make_request, running_engine
from support.oracles.transformers import load_transformers

SAID = ("▁a", "b", "<0x0A>", "▁c", "<0xC3>", "<0xA9>", "d", "<0x21>", "</s>")


def backend() -> Backend:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁c", "d"]
    model: Any = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Backend(model)
    parts: list[Any] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    return tokenizer


def ids_of(tokens: tuple[str, ...]) -> list[int]:
    found = [backend().token_to_id(token) for token in tokens]
    assert None not in found
    return [token_id for token_id in found if token_id is not None]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pending") / "model"
    parts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return make_saying_checkpoint(path, ids_of(SAID), backend(), **parts)


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_tiny(directory)


@pytest.mark.parametrize("max_new_tokens", [1, 3, 8, 9])
@pytest.mark.parametrize(
    "stops", [("\n",), ("b\n",), ("é",), (" cé",), ("!",), ("d!", "x"), ("\n c",), ("é", "\n")]
)
async def test_a_stop_sequence_of_byte_tokens_ends_where_transformers_ends(
    directory: Path, model: LoadedModel, stops: tuple[str, ...], max_new_tokens: int
) -> None:
    transformers: Any = import_module("transformers")
    theirs = (
        load_transformers(directory)
        .generate(
            torch.tensor([[0]]),
            attention_mask=torch.ones(1, 1, dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=list(stops),
            tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
            eos_token_id=ids_of(("</s>",)),
            pad_token_id=0,
        )[0, 1:]
        .tolist()
    )
    stopping = StoppingParams(max_new_tokens=max_new_tokens, stop_sequences=stops)
    async with running_engine(model) as engine:
        answer = await collect(engine, make_request([0], stopping=stopping))
    assert answer.token_ids == theirs
    whole = model.tokenizer.decode(theirs)
    found = [whole.index(stop) for stop in stops if stop in whole]
    assert answer.text == (whole[: min(found)] if found else whole)
    assert (answer.finish_reason is FinishReason.STOP_SEQUENCE) == bool(found)


async def test_a_stop_sequence_complete_before_min_new_tokens_ends_nothing(model: LoadedModel) -> None:
    stopping = StoppingParams(max_new_tokens=6, min_new_tokens=4, stop_sequences=("\n",))
    async with running_engine(model) as engine:
        answer = await collect(engine, make_request([0], stopping=stopping))
    assert (answer.text, answer.finish_reason) == ("ab\n cé", FinishReason.LENGTH)


def test_pending_text_that_ends_a_generation_is_let_out_up_to_the_stop() -> None:
    params = StoppingParams(max_new_tokens=9, stop_sequences=("\n\n",))
    checker = StopChecker(params, frozenset())
    assert checker.push(5, "a", 1, pending="\n") == ("a", None)
    assert checker.push(6, "", 2, pending="\nx\n\n") == ("\nx", FinishReason.STOP_SEQUENCE)
    assert checker.flush() == ""


def test_pending_text_that_changes_is_looked_at_anew() -> None:
    params = StoppingParams(max_new_tokens=9, stop_sequences=("xy",))
    checker = StopChecker(params, frozenset())
    assert checker.push(5, "a", 1, pending="x") == ("a", None)
    assert checker.push(6, "b", 2, pending="") == ("b", None)
    assert checker.push(7, "x", 3, pending="y") == ("", FinishReason.STOP_SEQUENCE)
