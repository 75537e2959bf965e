"""The oracle itself, against models whose weights were changed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    KVPrefix,
    LayerNorm,
    LoweredAdapter,
    LowRank,
    PromptEmbeddings,
)
from manyhats.adapters.sites import Site
from support.oracles.peft import IDS, tiny_model
from support.oracles.primitives import bottleneck_output, logits_with

FAMILIES = ("llama", "gemma2", "phi3", "granite")


@torch.no_grad()
def plain_logits(model: Any, **inputs: Any) -> Tensor:
    """Logits of the one sequence, by the model alone."""
    logits: Tensor = model(**(inputs or {"input_ids": torch.tensor([IDS])})).logits[0]
    return logits


def adapter(*deltas: Any, prefix: KVPrefix | PromptEmbeddings | None = None) -> LoweredAdapter:
    return LoweredAdapter("sha256:0", deltas, prefix)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_deltas_of_linears_equal_changed_weights(family: str) -> None:
    model = tiny_model(family)
    changed = copy.deepcopy(model)
    down = changed.model.layers[1].mlp.down_proj
    a, b, factor, scale = randn(3, 48), randn(32, 3), randn(48) * 0.3 + 1, randn(32) * 0.3 + 1
    down.weight.copy_(down.weight * scale[:, None] * factor + 0.5 * b @ a)
    deltas = (LowRank(Site(1, "down_proj"), a, b, 0.5), InputScale(Site(1, "down_proj"), factor))
    lowered = adapter(*deltas, Affine(Site(1, "down_proj"), scale, None))
    assert (plain_logits(changed) - plain_logits(model)).abs().max() > 0.05
    torch.testing.assert_close(logits_with(model, lowered, IDS), plain_logits(changed), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_part_of_a_fused_linear_is_its_rows() -> None:
    model = tiny_model("phi3")
    changed = copy.deepcopy(model)
    a, b, scale = randn(2, 32), randn(48, 2), randn(16)
    changed.model.layers[0].mlp.gate_up_proj.weight[48:] += b @ a
    changed.model.layers[0].self_attn.qkv_proj.weight[32:48] *= scale[:, None]
    lowered = adapter(LowRank(Site(0, "up_proj"), a, b, 1.0), Affine(Site(0, "k_proj"), scale, None))
    torch.testing.assert_close(logits_with(model, lowered, IDS), plain_logits(changed), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embedding_and_head_deltas_equal_changed_tables(family: str) -> None:
    model = tiny_model(family)
    changed = copy.deepcopy(model)
    ids, rows, a, b, head = torch.tensor([17, 8]), randn(2, 32), randn(64, 2), randn(32, 2), randn(64, 32)
    changed.model.embed_tokens.weight[ids] = rows
    changed.model.embed_tokens.weight += 0.5 * a @ b.T
    changed.lm_head.weight.copy_(head)
    changed.lm_head.weight[ids] = rows
    changed.lm_head.weight += 0.1 * a @ b.T
    lowered = adapter(
        EmbeddingLowRank(a, b, 0.5),
        EmbeddingRows(ids, rows),
        HeadRows(ids, rows),
        HeadWeight(head),
        LowRank(Site(-1, "lm_head"), b.T, a, 0.1),
    )
    torch.testing.assert_close(logits_with(model, lowered, IDS), plain_logits(changed), atol=1e-4, rtol=1e-5)
    assert not torch.equal(plain_logits(model), plain_logits(changed))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_prompt_embeddings_are_tokens_before_the_first(family: str) -> None:
    model = tiny_model(family)
    virtual = torch.tensor([[11, 12, 13]])
    embeddings = model.model.embed_tokens(virtual)[0]
    expected = plain_logits(model, input_ids=torch.cat((virtual, torch.tensor([IDS])), dim=1))[3:]
    actual = logits_with(model, adapter(prefix=PromptEmbeddings(embeddings)), IDS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_of_a_text_s_own_keys_is_that_text(family: str) -> None:
    """A cache holds rotated keys, so as a prefix that is never rotated it stands for the text itself."""
    model = tiny_model(family)
    text = torch.tensor([[11, 12, 13]])
    cache = model(input_ids=text, use_cache=True).past_key_values
    keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
    values = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers])
    expected = plain_logits(model, input_ids=torch.cat((text, torch.tensor([IDS])), dim=1))[3:]
    actual = logits_with(model, adapter(prefix=KVPrefix(keys, values, 0)), IDS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    shifted = logits_with(model, adapter(prefix=KVPrefix(keys, values, -3)), IDS)
    assert (shifted - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("source", sorted(set(BottleneckInput) - {BottleneckInput.NORMED}, key=str))
@torch.no_grad()
def test_a_bottleneck_reads_and_joins_the_stream(family: str, source: BottleneckInput) -> None:
    """With a linear activation in its working range, and the stream read by hooks of this test's own."""
    model = tiny_model(family)
    delta = Bottleneck(
        site=Site(1, "feed_forward"),
        input=source,
        down=randn(4, 32) * 0.2,
        down_bias=randn(4),
        up=randn(32, 4, seed=1) * 0.3,
        up_bias=randn(32) * 0.1,
        activation="relu",
        scale=torch.tensor([1.5]),
    )
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    into = layer.pre_feedforward_layernorm if family == "gemma2" else layer.post_attention_layernorm
    out = layer.post_feedforward_layernorm if family == "gemma2" else layer.mlp
    into.register_forward_pre_hook(lambda module, args: seen.update(r=args[0]))

    def join(module: Any, args: Any, output: Tensor) -> Tensor:
        x = {"m": output, "r + m": seen["r"] + output, "r": seen["r"]}[source.value]
        inner = torch.relu(x @ delta.down.T + delta.down_bias)
        return output + 1.5 * (inner @ delta.up.T + delta.up_bias)

    handle = out.register_forward_hook(join)
    expected = plain_logits(model)
    handle.remove()
    torch.testing.assert_close(logits_with(model, adapter(delta), IDS), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain_logits(model)).abs().max() > 0.05


def test_norms_residuals_and_factors_of_a_bottleneck() -> None:
    delta = Bottleneck(
        site=Site(0, "attention"),
        input=BottleneckInput.SUM,
        down=randn(2, 4),
        down_bias=randn(2),
        up=randn(4, 2),
        up_bias=randn(4),
        activation="swish",
        scale=randn(4),
        norm_before=LayerNorm(randn(4), randn(4)),
        norm_after=LayerNorm(randn(4, seed=2), randn(4)),
        norm_residual=BottleneckInput.OUTPUT,
        keep=0.5,
        carry=-1.0,
    )
    r, m = randn(3, 4, seed=3), randn(3, 4, seed=4)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    inner = norm(r + m, randn(4), randn(4)) @ delta.down.T + delta.down_bias
    f = delta.scale * (inner * torch.sigmoid(inner) @ delta.up.T + delta.up_bias)
    expected = 0.5 * m - r + norm(f + m, randn(4, seed=2), randn(4))
    torch.testing.assert_close(bottleneck_output(delta, r, m), expected)


def test_a_site_that_the_model_lacks_is_no_silent_success() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="layer 2 q_proj"):
        logits_with(model, adapter(LowRank(Site(2, "q_proj"), randn(1, 32), randn(32, 1), 1.0)), IDS)
    assert not any(module._forward_hooks for module in model.modules())
