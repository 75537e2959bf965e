"""Gradients of the trainer's decoder: PEFT's, where PEFT has the method, else those of the oracle under autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from torch import Tensor

from manyhats.adapters.formats.peft.prompt_config import PROMPT_EMBEDDINGS
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    LayerNorm,
    LoweredAdapter,
    LowRank,
)
from manyhats.adapters.sites import Site
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.data.batch import TokenizedRow, collate
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.settings.methods import LoraSettings
from support.factories.adapterhub import make_adapterhub
from support.factories.tiny_models import TINY_VOCAB_SIZE, linears_of, make_checkpoint
from support.factories.trainables import move, tiny_base
from support.harnesses.engine import load_tiny
from support.harnesses.training import (
    artifact_gradients,
    assert_gradients_close,
    make_decoder,
    make_rows,
    parameter_gradients,
    summed_loss,
)
from support.oracles.peft import make_peft, read, read_lowered, save_peft
from support.oracles.primitives import logits_with
from support.oracles.transformers import load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_VIRTUAL = 6
WINDOW = {"sliding_window": 20}
ALL_HEADS = {"kv_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie": True},
    "mistral": WINDOW,
    "qwen2": WINDOW,
    "qwen3": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi3": {"hidden_size": 128},
    "granite": {},
    "olmo2": {},
    "smollm3": {"num_layers": 3},
    "gpt2": ALL_HEADS,
    "gptj": ALL_HEADS,
    "gpt_neox": ALL_HEADS,
    "opt": ALL_HEADS,
    "phi": {},
    "falcon": {"multi_query": False, "num_kv_heads": 4, **ALL_HEADS},
    "cohere": {"use_qk_norm": True},
    "mixtral": {},
    "qwen3_moe": {"num_layers": 3, "mlp_only_layers": [1]},
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3")


def config_of(method: str, family: str) -> Any:
    linears = LINEARS if family in LLAMA_LIKE else linears_of(family)
    configs = {
        "lora": LoraConfig(r=5, lora_alpha=8, target_modules=linears),
        "rslora": LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, target_modules=linears, rank_pattern={linears[-1]: 2}
        ),
        "head lora": LoraConfig(r=3, lora_alpha=4, target_modules=["o_proj", "lm_head"]),
        "dora": LoraConfig(r=3, use_dora=True, target_modules=linears),
        "ia3": IA3Config(target_modules=linears, feedforward_modules=linears[-1:], init_ia3_weights=True),
        "prefix": PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL),
        "projected prefix": PrefixTuningConfig(
            num_virtual_tokens=NUM_VIRTUAL, prefix_projection=True, encoder_hidden_size=9
        ),
        "prompt": PromptTuningConfig(num_virtual_tokens=NUM_VIRTUAL),
        "p-tuning": PromptEncoderConfig(num_virtual_tokens=NUM_VIRTUAL, encoder_hidden_size=24),
    }
    config = configs[method]
    config.task_type = "CAUSAL_LM"
    return config


EVERY_METHOD = (
    "lora",
    "rslora",
    "head lora",
    "dora",
    "ia3",
    "prefix",
    "projected prefix",
    "prompt",
    "p-tuning",
)
CASES = [
    *(("qwen2", method) for method in EVERY_METHOD),
    *((family, method) for family in FAMILIES if family != "qwen2" for method in ("lora", "prefix")),
    *((family, "prompt") for family in ("mistral", "gemma2", "granite")),
    *(
        (family, method)
        for family in ("gpt2", "gpt_neox", "opt", "cohere", "mixtral")
        for method in ("dora", "ia3", "prompt")
    ),
    *((family, "dora") for family in ("phi3", "gemma3_text")),
    ("gemma2", "head lora"),
    ("llama", "ia3"),
]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_gradients_of_a_file_s_tensors_are_peft_s(
    tmp_path: Path, family: str, method: str, checkpointing: bool
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", family, seed=8, **FAMILIES[family])
    model, reference = load_tiny(checkpoint), load_transformers(checkpoint)
    peft = make_peft(reference, config_of(method, family))
    rows = make_rows((31, 9, 24))
    expected_loss, expected = peft_gradients(peft, rows)
    directory = save_peft(peft, tmp_path / "adapter", save_embedding_layers=False)
    artifact = read(directory, model.description)
    decoder = make_decoder(model, checkpointing=checkpointing)
    batch = collate(rows, share_beginning=False)
    loss, gradients = artifact_gradients(decoder, artifact, model.description, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_gradients_close(gradients, expected)


def peft_gradients(peft: Any, rows: list[TokenizedRow]) -> tuple[float, dict[str, Tensor]]:
    """PEFT's loss, and its gradients by the names that its files have; of virtual tokens, at the encoder's end."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    if getattr(peft, "prompt_encoder", None):
        peft.prompt_encoder["default"].register_forward_hook(keep)
    loss = summed_loss(peft, rows)
    loss.backward()
    if outputs:
        of_rows = [output.grad.sum(0) for output in outputs if output.grad is not None]
        return loss.item(), {PROMPT_EMBEDDINGS: torch.stack(of_rows).sum(0)}
    return loss.item(), {
        name.replace(".default.weight", ".weight" if "lora_m" not in name else "").replace(".default", ""): (
            parameter.grad
        )
        for name, parameter in peft.named_parameters()
        if parameter.grad is not None
    }


# What PEFT does not have


def oracle_loss(model: Any, lowered: LoweredAdapter, rows: list[TokenizedRow]) -> Tensor:
    """The oracle's cross-entropies, under autograd."""

    def logits(input_ids: Tensor) -> Any:
        own = logits_with.__wrapped__(model, lowered, input_ids)
        return type("Output", (), {"logits": own.unsqueeze(0)})

    return summed_loss(logits, rows)


def leaves_of(lowered: LoweredAdapter) -> tuple[LoweredAdapter, dict[str, Tensor]]:
    """The same primitives, with float tensors that collect gradients, and these by place."""
    leaves: dict[str, Tensor] = {}

    def copied(value: Any, place: str) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return leaves.setdefault(place, value.clone().requires_grad_())
        if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Site):
            changed = {f.name: copied(getattr(value, f.name), f"{place}.{f.name}") for f in fields(value)}
            return replace(value, **changed)
        return value

    deltas = tuple(copied(delta, f"{index}") for index, delta in enumerate(lowered.deltas))
    return replace(lowered, deltas=deltas, prefix=copied(lowered.prefix, "prefix")), leaves


def check_against_oracle(
    model: LoadedModel, reference: Any, lowered: LoweredAdapter, *, checkpointing: bool = False
) -> None:
    rows = make_rows((31, 9, 24), seed=3)
    lowered, leaves = leaves_of(lowered)
    loss = oracle_loss(reference, lowered, rows)
    expected = dict(
        zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True)
    )
    used = {name: gradient for name, gradient in expected.items() if gradient is not None}
    decoder = make_decoder(model, checkpointing=checkpointing)
    batch = collate(rows, share_beginning=False)
    own_loss, gradients = parameter_gradients(decoder, lowered, {n: leaves[n] for n in used}, batch)
    assert own_loss == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_close(gradients, used)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("oracle") / "tiny", "qwen2", seed=3, **WINDOW)
    return load_tiny(checkpoint), load_transformers(checkpoint)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "par_bn", "lora", "ia3"])
def test_gradients_of_adapterhub_s_methods_are_the_oracle_s(
    tmp_path: Path, qwen2: tuple[LoadedModel, Any], preset: str, checkpointing: bool
) -> None:
    model, reference = qwen2
    directory = make_adapterhub(tmp_path / preset, model.description, preset, scale=0.3)
    lowered = read_lowered(directory, model.description)
    check_against_oracle(model, reference, lowered, checkpointing=checkpointing)


def normal(seed: int, *shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def bottleneck(layer: int, sublayer: str, read: BottleneckInput, size: int, **special: Any) -> Bottleneck:
    seed = 10 * layer + size
    return Bottleneck(
        site=Site(layer, sublayer),
        input=read,
        down=normal(seed, size, 64),
        down_bias=normal(seed + 1, size),
        up=normal(seed + 2, 64, size),
        up_bias=normal(seed + 3, 64),
        **{"activation": "silu", "scale": torch.tensor([1.5]), **special},
    )


NORM = LayerNorm(1 + normal(5, 64), normal(6, 64))
HEAD = Site(-1, "lm_head")
PRIMITIVES: Mapping[str, tuple[Delta, ...]] = {
    "affine": (
        Affine(Site(0, "k_proj"), 1 + normal(1, 32), normal(2, 32)),
        Affine(Site(1, "down_proj"), None, normal(3, 64)),
        LowRank(Site(0, "k_proj"), normal(4, 3, 64), normal(5, 32, 3), 0.7),
        LowRank(Site(0, "q_proj"), normal(6, 2, 64), normal(7, 64, 2), 1.3),
    ),
    "input scale": (
        InputScale(Site(0, "down_proj"), 1 + normal(1, 128)),
        InputScale(Site(1, "up_proj"), 1 + normal(2, 64)),
        LowRank(Site(1, "up_proj"), normal(3, 2, 64), normal(4, 128, 2), 0.5),
    ),
    "several at one linear": (
        LowRank(Site(0, "v_proj"), normal(1, 2, 64), normal(2, 32, 2), 0.5),
        LowRank(Site(0, "v_proj"), normal(3, 5, 64), normal(4, 32, 5), -1.5),
        LowRank(Site(1, "down_proj"), normal(5, 1, 128), normal(6, 64, 1), 2.0),
    ),
    "bottlenecks": (
        bottleneck(0, "attention", BottleneckInput.OUTPUT, 9, norm_before=NORM),
        bottleneck(0, "feed_forward", BottleneckInput.SUM, 4, activation="gelu", scale=1 + normal(8, 64)),
        bottleneck(1, "attention", BottleneckInput.RESIDUAL, 1, keep=0.5, carry=0.25),
        bottleneck(
            1,
            "feed_forward",
            BottleneckInput.OUTPUT,
            3,
            norm_after=NORM,
            norm_residual=BottleneckInput.SUM,
        ),
    ),
    "embedding": (EmbeddingLowRank(normal(1, 3, TINY_VOCAB_SIZE).t(), normal(2, 64, 3), 0.7),),
    "rows": (
        EmbeddingRows(torch.arange(4, TINY_VOCAB_SIZE, 3), normal(3, 106, 64)),
        HeadRows(torch.tensor([9, 4, 30]), normal(4, 3, 64)),
    ),
    "other head": (
        LowRank(HEAD, normal(5, 3, 64), normal(6, TINY_VOCAB_SIZE, 3), 0.5),
        HeadWeight(normal(7, TINY_VOCAB_SIZE, 64)),
    ),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_gradients_of_primitives_are_the_oracle_s(qwen2: tuple[LoadedModel, Any], name: str) -> None:
    check_against_oracle(*qwen2, LoweredAdapter("", PRIMITIVES[name]))


# On a quantized base


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_on_nf4_are_those_of_the_dequantized_weights(family: str, checkpointing: bool) -> None:
    base = tiny_base(family, "nf4")
    settings = LoraSettings(rank=4, alpha=8)
    adapter = make_adapter(settings, "task", base.model, seed=0)
    move(adapter)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM")
    peft = make_peft(base.dense, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter.parameters[name.replace(".default", "")])
    rows = make_rows()
    expected_loss, expected = peft_gradients(peft, rows)
    loss, gradients = parameter_gradients(
        make_decoder(base.model, checkpointing=checkpointing),
        adapter.lowered(),
        adapter.parameters,
        collate(rows, share_beginning=False),
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_gradients_close(gradients, expected)
