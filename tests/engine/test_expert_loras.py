"""PEFT's LoRA on experts and routers, through registration's checks and the engine, against PEFT's own logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyhats.adapters.errors import AdapterError, AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import compose_parts
from manyhats.adapters.lowering.inspect import inspect
from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import batched_backend
from support.harnesses.engine import Prompt, Runner, load_tiny, random_ids
from support.oracles.peft import make_peft, peft_logits, read_lowered, save_peft
from support.oracles.transformers import full_logits, load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"num_layers": 3, "mlp_only_layers": [1]},
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH},
    "down": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "gate and up": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "all that PEFT calls linears, the router too": {"target_modules": "all-linear"},
    "router": {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]},
    "one layer's, of other ranks and scales": {
        "target_modules": ["k_proj"],
        "target_parameters": ["layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 9},
        "alpha_pattern": {"gate_up_proj": 3},
        "use_rslora": True,
    },
}
IDS = random_ids(5, 41, TINY_VOCAB_SIZE)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts") / "model"
    return make_checkpoint(directory, request.param, seed=6, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_tiny(checkpoint)


def saved(reference: Any, directory: Path, config: Mapping[str, Any]) -> tuple[Path, Any]:
    """What PEFT saves of random matrices, and the model that it saved."""
    peft = make_peft(
        reference, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **config}), size=0.3
    )
    return save_peft(peft, directory, save_embedding_layers=False), peft


def run(model: LoadedModel, adapter: LoweredAdapter, backend: Any, slots: tuple[int, ...]) -> list[Tensor]:
    prompts = [Prompt(IDS[:length], slot=slot, new_tokens=0) for length in (41, 13) for slot in slots]
    runner = Runner(model, backend, adapters={3: adapter})
    return [ran.stacked for ran in runner.run(prompts, all_logits=True, max_tokens=30)]


def check(model: LoadedModel, directory: Path, expected: Tensor, base: Tensor) -> LoweredAdapter:
    """Rows with the adapter and without in one batch, on both backends, and alone."""
    adapter = read_lowered(directory, model.description)
    for backend in (CpuBackend(2), TorchBackend(), batched_backend()):
        found = run(model, adapter, backend, (0, 3))
        for (without, own), length in zip((found[:2], found[2:]), (41, 13), strict=True):
            torch.testing.assert_close(without, base[:length], atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(own, expected[:length], atol=TOLERANCE, rtol=TOLERANCE)
        if isinstance(backend, CpuBackend):
            alone = run(model, adapter, CpuBackend(1), (3,))
            assert all(torch.equal(*pair) for pair in zip(alone, found[1::2], strict=True))
    assert (expected - base).abs().max() > 0.05
    return adapter


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_peft_s(
    config: dict[str, Any], checkpoint: Path, model: LoadedModel, tmp_path: Path
) -> None:
    reference = load_transformers(checkpoint)
    directory, peft = saved(reference, tmp_path / "adapter", config)
    check(model, directory, full_logits(peft, IDS), full_logits(reference, IDS))


def of_transformers_4(model: LoadedModel, directory: Path, rank: int = 3) -> Path:
    """A LoRA as PEFT saved it when each expert's linears were modules, in every layer that has experts."""
    base, tensors = model.description, {}
    generator = torch.Generator().manual_seed(2)
    modules = {path: parts[0].site for path, parts in base.modules.items() if parts[0].site.is_of_mixture}
    for path, site in modules.items():
        d_in, d_out = base.linears[site.name]
        a = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = a
        tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.4
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 5,
        "target_modules": sorted({path.rpartition(".")[2] for path in modules}),
        "inference_mode": True,
    }
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_files_of_transformers_4_are_what_peft_makes_of_them(
    checkpoint: Path, model: LoadedModel, tmp_path: Path
) -> None:
    directory = of_transformers_4(model, tmp_path / "adapter")
    reference = load_transformers(checkpoint)
    expected = peft_logits(reference, directory, tuple(IDS))
    adapter = check(model, directory, expected, full_logits(reference, IDS))
    assert {delta.site.name for delta in adapter.deltas} >= {
        "router",
        "experts.0.gate_proj",
        "experts.2.down_proj",
    }


def test_nf4_bases_take_them_too(checkpoint: Path, tmp_path: Path) -> None:
    model = load_tiny(checkpoint, "nf4")
    adapter = read_lowered(of_transformers_4(model, tmp_path / "adapter"), model.description)
    exact, oracle = (run(model, adapter, backend, (0, 3)) for backend in (CpuBackend(2), TorchBackend()))
    for ours, theirs in zip(exact, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """A base, and what PEFT saves of experts' LoRA on it."""
    directory = tmp_path_factory.mktemp("mixtral")
    checkpoint = make_checkpoint(directory / "model", "mixtral", seed=6)
    saved(
        load_transformers(checkpoint),
        directory / "adapter",
        {"target_modules": [], "target_parameters": BOTH},
    )
    return load_tiny(checkpoint), directory / "adapter"


OUTER = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
INNER = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
Config, Tensors = dict[str, Any], dict[str, Tensor]


@pytest.mark.parametrize(
    ("spoil", "error", "subject", "message"),
    [
        (
            lambda c, t: c.update(target_parameters=BOTH[:1]),
            AdapterInvalidError,
            OUTER,
            "expected [rank, 64]",
        ),
        (lambda c, t: c.update(target_parameters=BOTH[1:]), AdapterInvalidError, "base_layer", "leaves out"),
        (lambda c, t: c.update(target_parameters=None), AdapterInvalidError, "experts", "leaves out"),
        (lambda c, t: c.update(target_parameters="x"), AdapterInvalidError, "target_parameters", "a list"),
        (lambda c, t: c.update(target_parameters=[3]), AdapterInvalidError, "target_parameters", "a list"),
        (
            lambda c, t: c.update(target_parameters=[*BOTH, "q_proj.weight"]),
            AdapterUnsupportedError,
            "target_parameters",
            "q_proj.weight",
        ),
        (
            lambda c, t: c.update(r=5),
            AdapterInvalidError,
            "lora_A",
            "rank 16; the config says 5 for each of 4",
        ),
        (lambda c, t: c.update(r=1000), AdapterError, "r", "the limit is 256"),
        (
            lambda c, t: c.update(use_dora=True),
            AdapterUnsupportedError,
            "experts",
            "DoRA or lora_bias on experts",
        ),
        (lambda c, t: c.update(lora_bias=True), AdapterUnsupportedError, "experts", "DoRA or lora_bias"),
        (
            lambda c, t: t.update({OUTER: t[OUTER][:-1]}),
            AdapterInvalidError,
            "lora_B",
            "to match its partner",
        ),
        (lambda c, t: t.update({OUTER: t[OUTER][:, :-1]}), AdapterInvalidError, OUTER, "expected"),
        (lambda c, t: t.update({INNER: t[INNER][:-8]}), AdapterInvalidError, INNER, "expected [256, rank]"),
        (lambda c, t: t.update({INNER: t[INNER][None]}), AdapterInvalidError, INNER, "expected [256, rank]"),
        (lambda c, t: t.pop(INNER), AdapterInvalidError, "base_layer.lora_A", "partner"),
        (lambda c, t: t[INNER].fill_(torch.nan), AdapterInvalidError, INNER, "finite"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(
    spoil: Any,
    error: type[AdapterError],
    subject: str,
    message: str,
    mixtral: tuple[LoadedModel, Path],
    tmp_path: Path,
) -> None:
    model, directory = mixtral
    config = json.loads((directory / "adapter_config.json").read_bytes())
    tensors = load_file(directory / "adapter_model.safetensors")
    spoil(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(error) as caught:
        read_lowered(tmp_path, model.description)
    assert subject in caught.value.subject
    assert message in caught.value.description


@pytest.mark.parametrize("method", ["IA3", "VERA", "ADALORA"])
def test_other_methods_on_experts_are_refused_by_name(
    method: str, mixtral: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    model, _ = mixtral
    path = "model.layers.0.block_sparse_moe.experts.1.w2"
    d_in, d_out = model.description.linears["experts.1.down_proj"]
    fields: dict[str, tuple[dict[str, Any], Tensors]] = {
        "IA3": (
            {"target_modules": ["w2"], "feedforward_modules": ["w2"]},
            {"ia3_l": torch.ones(1, d_in) * 2},
        ),
        "VERA": (
            {"r": 2, "target_modules": ["w2"], "save_projection": True},
            {"vera_lambda_b": torch.ones(d_out), "vera_lambda_d": torch.ones(2)},
        ),
        "ADALORA": (
            {"r": 2, "init_r": 2, "target_r": 2, "lora_alpha": 2, "target_modules": ["w2"]},
            {
                "lora_A": torch.ones(2, d_in),
                "lora_B": torch.ones(d_out, 2),
                "lora_E": torch.ones(2, 1),
            },
        ),
    }
    config, tensors = fields[method]
    named = {f"base_model.model.{path}.{name}": tensor for name, tensor in tensors.items()}
    if method == "VERA":
        named |= {"base_model.vera_A": torch.ones(2, d_in), "base_model.vera_B": torch.ones(d_out, 2)}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": method, "task_type": "CAUSAL_LM", **config})
    )
    save_file(named, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="in mixtures of experts only LoRA is served"):
        read_lowered(tmp_path, model.description)


@pytest.mark.parametrize("has_base", [True, False], ids=["with base", "without"])
@pytest.mark.parametrize("config", ["both", "down", "all that PEFT calls linears, the router too"])
def test_inspection_shows_what_all_experts_have(
    config: str, has_base: bool, checkpoint: Path, model: LoadedModel, tmp_path: Path
) -> None:
    directory, _ = saved(load_transformers(checkpoint), tmp_path / "adapter", CONFIGS[config])
    found = inspect(directory, model.description if has_base else None)
    assert found.refusals == ()
    down = next(site for site in found.sites if site.site == "experts.*.down_proj")
    d_in, d_out = model.description.linears["experts.0.down_proj"]
    with_experts = [layer for layer in range(model.architecture.num_layers) if layer != 1 or d_in == 128]
    assert down.layers == tuple(with_experts)
    assert down.shapes == {"a": ((4, d_in),), "b": ((d_out, 4),)}
    assert ("router" in {site.site for site in found.sites}) == config.startswith("all")


@pytest.mark.parametrize("has_base", [True, False], ids=["with base", "without"])
def test_inspection_shows_files_of_transformers_4(has_base: bool, model: LoadedModel, tmp_path: Path) -> None:
    directory = of_transformers_4(model, tmp_path / "adapter")
    found = inspect(directory, model.description if has_base else None)
    assert found.refusals == ()
    assert "router" in {site.site for site in found.sites}


def test_compositions_add_up_on_experts(mixtral: tuple[LoadedModel, Path], tmp_path: Path) -> None:
    model, directory = mixtral
    old = of_transformers_4(model, tmp_path / "old")
    parts = [read_lowered(each, model.description) for each in (directory, old)]
    composed = compose_parts(parts, [0.5, 1.25], AdapterLimits())
    ours, theirs = (run(model, composed, backend, (3,)) for backend in (CpuBackend(2), TorchBackend()))
    merged = copy.deepcopy(model.weights)
    for part, weight in zip(parts, (0.5, 1.25), strict=True):
        for delta in part.deltas:
            assert isinstance(delta, LowRank)
            matrix = merged.blocks[delta.site.layer].linears[delta.site.name].matrix
            assert isinstance(matrix, Tensor)
            matrix += weight * delta.scale * (delta.b @ delta.a)
    expected = run(replace(model, weights=merged), composed, TorchBackend(), (0,))
    for found in (ours, theirs):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_deltas_of_an_expert_are_for_its_rows_alone(mixtral: tuple[LoadedModel, Path]) -> None:
    """An adapter on one expert leaves the rows as they are that do not go there in any layer."""
    model, _ = mixtral
    d_in, d_out = model.description.linears["experts.2.up_proj"]
    site = Site(1, "experts.2.up_proj")  # the last layer: nothing behind it mixes rows
    adapter = LoweredAdapter(
        "sha256:" + "7" * 64, (LowRank(site, torch.ones(1, d_in), torch.ones(d_out, 1), 1.0),)
    )
    plain, changed = (run(model, adapter, CpuBackend(2), (slot,))[0] for slot in (0, 3))
    same = [torch.equal(one, other) for one, other in zip(plain, changed, strict=True)]
    assert any(same)
    assert not all(same)
