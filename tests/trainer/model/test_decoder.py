"""The trainer's decoder: as transformers' models, whatever the batch, and without touching the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manyhats.adapters.primitives import Affine, LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.trainer.data.batch import collate
from manyhats.trainer.errors import BaseError
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.model import head
from manyhats.trainer.settings.methods import LoraSettings
from support.factories.tiny_models import make_checkpoint
from support.factories.trainables import ALL_CASES, move, tiny_base
from support.harnesses.engine import load_tiny, random_lora
from support.harnesses.training import (
    LENGTHS,
    assert_gradients_close,
    make_batch,
    make_decoder,
    make_rows,
    parameter_gradients,
    row_ids,
    summed_loss,
)
from support.oracles.transformers import full_logits, load_transformers

WINDOW = {"sliding_window": 20}
"""Shorter than some rows, longer than others."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "tie": True},
    "mistral": WINDOW,
    "qwen2": WINDOW,
    "qwen3": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi3": {**WINDOW, "hidden_size": 128, "partial_rotary_factor": 0.5},
    "granite": {},
    "olmo2": {},
    "smollm3": {**WINDOW, "num_layers": 3},
    "gemma": {},
    "gpt2": {"kv_heads": 4},
    "gptj": {"kv_heads": 4},
    "starcoder2": WINDOW,
    "gpt_neox": {"kv_heads": 4},
    "opt": {"kv_heads": 4},
    "opt, norms behind and projections": {
        "kv_heads": 4,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 32,
    },
    "phi": {},
    "falcon": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": WINDOW,
    "mixtral": {},
    "qwen3_moe": {**WINDOW, "num_layers": 3, "mlp_only_layers": [1]},
}


def load(directory: Path, family: str) -> tuple[LoadedModel, Any]:
    checkpoint = make_checkpoint(
        directory / "model", family.split()[0].rstrip(","), seed=4, **FAMILIES[family]
    )
    return load_tiny(checkpoint), load_transformers(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_transformers_s(tmp_path: Path, family: str) -> None:
    model, reference = load(tmp_path, family)
    rows = make_rows()
    batch = collate(rows, share_beginning=False)
    decoder = make_decoder(model)
    logits = decoder.logits(batch, None).split(list(batch.segments))
    for ids, row_logits in zip(row_ids(batch), logits, strict=True):
        torch.testing.assert_close(row_logits, full_logits(reference, ids), atol=1e-4, rtol=1e-4)
    expected = summed_loss(reference, rows).item()
    assert float(decoder.loss(batch, None)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "olmo2"])
def test_rows_of_a_ragged_batch_are_what_each_is_alone(tmp_path: Path, family: str) -> None:
    model, _ = load(tmp_path, family)
    decoder, adapter = make_decoder(model), random_lora(model.description, 3)
    rows = make_rows((90, 1, 37, 64, 65))
    together = collate(rows, share_beginning=False)
    hidden = decoder.hidden(together, adapter).split(list(together.segments))
    for row, own in zip(rows, hidden, strict=True):
        alone = decoder.hidden(collate([row]), adapter)
        torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("case", ["lora", "dora", "prefix", "projected prefix", "prompt", "p-tuning"])
def test_a_shared_beginning_changes_neither_loss_nor_gradients(
    tmp_path: Path, family: str, case: str
) -> None:
    model, _ = load(tmp_path, family)
    adapter = make_adapter(ALL_CASES[case], "task", model, seed=0)
    move(adapter)
    rows = make_rows((40, 30, 55), num_shared=27)
    decoder = make_decoder(model)
    shared, apart = (collate(rows, share_beginning=share) for share in (True, False))
    assert (shared.num_shared, apart.num_shared) == (27, 0)
    loss, gradients = parameter_gradients(decoder, adapter.lowered(), adapter.parameters, shared)
    expected, wanted = parameter_gradients(decoder, adapter.lowered(), adapter.parameters, apart)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_gradients_close(gradients, wanted)


@pytest.mark.parametrize("case", ALL_CASES)
def test_gradient_checkpointing_changes_nothing(case: str) -> None:
    model = tiny_base("qwen3").model
    adapter = make_adapter(ALL_CASES[case], "task", model, seed=0)
    move(adapter)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        decoder = make_decoder(model, checkpointing=checkpointing)
        lowered = adapter.lowered()
        found.append(parameter_gradients(decoder, lowered, adapter.parameters, make_batch(), dropout=0.3))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(found[1][1][name], gradient), name


def test_dropout_is_drawn_from_the_global_generator() -> None:
    model = tiny_base().model
    decoder, adapter = make_decoder(model), random_lora(model.description, 3)

    def loss(seed: int, dropout: float = 0.4) -> float:
        torch.manual_seed(seed)
        return float(decoder.loss(make_batch(), adapter, dropout=dropout))

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    assert loss(1, 0.0) == loss(2, 0.0)


def test_dropout_keeps_the_mean_of_the_deltas() -> None:
    """Of a layer's linears, here the last: what follows is linear in them but for the final norm."""
    model = tiny_base().model
    decoder = make_decoder(model)
    d_in, d_out = model.description.linears["down_proj"]
    a = torch.randn(2, d_in, generator=torch.Generator().manual_seed(0))
    adapter = LoweredAdapter("", (LowRank(Site(1, "down_proj"), a, torch.full((d_out, 2), 1e-4), 1.0),))
    base, without = (decoder.hidden(make_batch(), each) for each in (None, adapter))
    torch.manual_seed(0)
    draws = [decoder.hidden(make_batch(), adapter, dropout=0.5) for _ in range(400)]
    mean = torch.stack(draws).mean(0)
    assert (draws[0] - without).abs().max() > 0.1 * (without - base).abs().max()
    assert (mean - without).norm() < 0.2 * (without - base).norm()


@pytest.mark.parametrize("case", ["lora", "dora", "prefix", "prompt"])
def test_bfloat16_products_are_near_float32_ones(case: str) -> None:
    model = tiny_base("llama", "nf4").model
    adapter = make_adapter(ALL_CASES[case], "task", model, seed=0)
    move(adapter, size=0.1)
    exact, rounded = (
        parameter_gradients(
            make_decoder(model, dtype=dtype), adapter.lowered(), adapter.parameters, make_batch()
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded[0] == pytest.approx(exact[0], rel=0.01)
    for name, gradient in exact[1].items():
        similarity = torch.cosine_similarity(gradient.flatten(), rounded[1][name].flatten(), dim=0)
        assert similarity > 0.99, name


def test_the_loss_is_the_same_in_chunks_of_any_size_and_never_holds_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_base("gemma2").model
    adapter = make_adapter(LoraSettings(target_modules=("lm_head", "q_proj")), "task", model, seed=0)
    move(adapter)
    batch = make_batch()
    vocab_size, num_targets = model.architecture.vocab_size, batch.targets.numel()
    expected = parameter_gradients(make_decoder(model), adapter.lowered(), adapter.parameters, batch)
    monkeypatch.setattr(head, "CHUNK_VALUES", 3 * vocab_size)
    monkeypatch.setattr(head, "CACHED_VALUES", 2 * vocab_size)
    with LargestTensor() as largest:
        found = parameter_gradients(make_decoder(model), adapter.lowered(), adapter.parameters, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert_gradients_close(found[1], expected[1], 1e-5)
    assert largest.columns[vocab_size] == 3 < num_targets


class LargestTensor(TorchDispatchMode):
    """Notes, by the number of columns, the most rows of any matrix that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and result.is_contiguous():
            rows, columns = result.shape
            self.columns[columns] = max(rows, self.columns.get(columns, 0))
        return result


def test_evaluation_gives_the_loss_of_training() -> None:
    model = tiny_base("gemma2").model
    decoder, adapter = make_decoder(model), random_lora(model.description, 3)
    with torch.no_grad():
        evaluated = float(decoder.loss(make_batch(), adapter))
    assert evaluated == pytest.approx(float(decoder.loss(make_batch(), adapter)), rel=1e-6)


def test_a_batch_without_targets_has_no_loss() -> None:
    model = tiny_base().model
    batch = make_batch()
    empty = torch.empty(0, dtype=torch.int64)
    nothing = replace(batch, predictors=empty, targets=empty)
    assert float(make_decoder(model).loss(nothing, None)) == 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_the_base_in_nf4_and_bit_for_bit(checkpointing: bool, dtype: torch.dtype) -> None:
    model = tiny_base("llama", "nf4").model
    before = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    nf4_bytes = sum(w.num_bytes for w in quantized(model))
    decoder = make_decoder(model, dtype=dtype, checkpointing=checkpointing)
    adapter = make_adapter(LoraSettings(rank=2), "task", model, seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=1e-2)
    sizes = {rows * columns for rows, columns in (w.shape for w in quantized(model))}
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = decoder.loss(make_batch((3, 2)), adapter.lowered())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kept
    assert max(kept) < min(sizes), "a dense weight was kept for the backward pass"
    assert decoder.linear_bytes <= 1.05 * nf4_bytes
    for name, tensor in base_tensors(model).items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.grad is None


def quantized(model: LoadedModel) -> list[Nf4Weight]:
    linears = [linear.matrix for linear in model.weights.linears()]
    return [weight for weight in linears if isinstance(weight, Nf4Weight)]


def base_tensors(model: LoadedModel) -> dict[str, Tensor]:
    tensors = {"embed": model.weights.embedding}
    for index, weight in enumerate(quantized(model)):
        for name in ("packed", "absmax", "nested_absmax", "code", "nested_code"):
            tensors[f"{index} {name}"] = getattr(weight, name)
    return tensors | {f"norm {number}": norm.weight for number, norm in enumerate(model.weights.norms())}


def test_a_row_longer_than_the_context_is_refused() -> None:
    model = tiny_base().model
    decoder = make_decoder(model)
    longest = model.architecture.max_context_length
    assert decoder.hidden(make_batch((longest,)), None).shape[0] == longest
    with pytest.raises(BaseError, match=f"{longest + 1} positions.*context of {longest}"):
        decoder.hidden(make_batch((longest + 1,)), None)
    prompt = make_adapter(ALL_CASES["prompt"], "task", model, seed=0)
    with pytest.raises(BaseError, match=f"{longest + 4} positions"):
        decoder.hidden(make_batch((longest,)), prompt.lowered())


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(0, "gate"), "layer 0 gate: the base has no such place"),
        (Site(2, "q_proj"), "layer 2 q_proj: the base has no such place"),
        (Site(1, "attention"), "layer 1 attention: Affine does not act there"),
        (Site(-1, "lm_head"), "lm_head: Affine is not trained on the output head"),
    ],
)
def test_a_delta_that_has_no_place_is_refused(site: Site, message: str) -> None:
    adapter = LoweredAdapter("", (Affine(site, torch.ones(64), None),))
    with pytest.raises(BaseError, match=message):
        make_decoder(tiny_base().model).hidden(make_batch(LENGTHS), adapter)
