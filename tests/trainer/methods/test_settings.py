"""Settings that do not fit the base are refused when the adapter is made, by name, before any training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from manyhats.adapters.limits import AdapterLimits
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import BaseError, SettingError
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.methods.targets import with_named_modules
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from support.factories.trainables import tiny_base

Q = ("q_proj",)

REFUSED: dict[str, tuple[AdapterSettings, str, str]] = {
    "unknown module": (
        LoraSettings(target_modules=("q_proj", "query")),
        "target_modules",
        "'query' is not a linear of this base; it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj,",
    ),
    "embedding": (LoraSettings(target_modules=("embed_tokens",)), "target_modules", "embed_tokens"),
    "part of a name": (LoraSettings(target_modules=("proj",)), "target_modules", "'proj'"),
    "layer that is not there": (
        LoraSettings(target_modules=("layers.2.self_attn.q_proj",)),
        "target_modules",
        "layers.2",
    ),
    "rank": (LoraSettings(rank=257), "rank", "is 257; the limit is 256"),
    "rank of a pattern": (
        LoraSettings(target_modules=Q, rank_pattern={"q_proj": 999}),
        "rank_pattern",
        "is 999; the limit is 256",
    ),
    "alpha": (LoraSettings(alpha=1e7), "alpha", "at most 1e+06"),
    "alpha of a pattern": (
        LoraSettings(target_modules=Q, alpha_pattern={"q_proj": -1.0}),
        "alpha_pattern",
        "above 0",
    ),
    "pattern of nothing": (
        LoraSettings(target_modules=Q, rank_pattern={"k_proj": 4}),
        "rank_pattern",
        "'k_proj' matches none of the trained modules",
    ),
    "pattern behind another": (
        LoraSettings(target_modules=Q, alpha_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 2}),
        "alpha_pattern",
        "'layers.0.self_attn.q_proj' has no effect after the keys before it; put it first",
    ),
    "regex of nothing": (
        LoraSettings(target_modules=Q, rank_pattern={"[kv]_proj": 4}),
        "rank_pattern",
        "'[kv]_proj' matches none of the trained modules",
    ),
    "regex behind another": (
        LoraSettings(target_modules=Q, rank_pattern={".*_proj": 4, r"layers\.[0-9]+\..*": 2}),
        "rank_pattern",
        r"'layers\\.[0-9]+\\..*' has no effect after the keys before it; put it first",
    ),
    "regex that is none": (
        LoraSettings(target_modules=Q, alpha_pattern={"(q_proj": 4}),
        "alpha_pattern",
        "the key '(q_proj' is not a regular expression: a group is not closed",
    ),
    "regex that needs a lookahead": (
        LoraSettings(target_modules=Q, rank_pattern={"(?!k)._proj": 4}),
        "rank_pattern",
        "the key '(?!k)._proj' uses a lookahead, which is not supported",
    ),
    "dora on the head": (
        LoraSettings(target_modules=("q_proj", "lm_head"), use_dora=True),
        "target_modules",
        "DoRA is not served there",
    ),
    "ia3 of an unknown output": (Ia3Settings(output_modules=("key",)), "output_modules", "'key'"),
    "ia3 of an unknown input": (Ia3Settings(input_modules=("fc2",)), "input_modules", "'fc2'"),
    "ia3 on the head": (Ia3Settings(output_modules=("lm_head",)), "output_modules", "head"),
    "ia3 of one module by two names": (
        Ia3Settings(output_modules=("mlp.down_proj",), input_modules=("down_proj",)),
        "input_modules",
        "model.layers.0.mlp.down_proj is also in output_modules",
    ),
    "bottleneck of nothing": (
        BottleneckSettings(reduction_factor=65),
        "reduction_factor",
        "is 65, above the base's hidden size 64",
    ),
    "prefix as long as the context": (
        PrefixSettings(num_virtual_tokens=512),
        "num_virtual_tokens",
        "is 512, which leaves none of the base's 512",
    ),
    "prompt longer than the context": (
        PromptSettings(num_virtual_tokens=10**9),
        "num_virtual_tokens",
        "leaves none of the base's",
    ),
    "virtual tokens beyond the context": (
        PTuningSettings(num_virtual_tokens=600),
        "num_virtual_tokens",
        "leaves none of the base's",
    ),
}


def make(case: AdapterSettings, model: LoadedModel, **arguments: Any) -> None:
    make_adapter(case, "task", model, seed=0, **arguments)


@pytest.mark.parametrize(("case", "setting", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_do_not_fit_are_named(case: AdapterSettings, setting: str, text: str) -> None:
    with pytest.raises(SettingError) as caught:
        make(case, tiny_base().model)
    assert caught.value.setting == setting
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "case",
    [
        PrefixSettings(num_virtual_tokens=9),
        PromptSettings(num_virtual_tokens=9),
        PTuningSettings(num_virtual_tokens=9),
    ],
)
def test_virtual_tokens_keep_to_the_server_s_limit(case: AdapterSettings) -> None:
    with pytest.raises(SettingError, match="num_virtual_tokens: is 9; the limit is 8"):
        make(case, tiny_base().model, limits=AdapterLimits(max_virtual_tokens=8))


def test_ranks_up_to_the_server_s_limit_are_made() -> None:
    make(LoraSettings(rank=300, target_modules=Q), tiny_base().model, limits=AdapterLimits(max_rank=300))


@pytest.mark.parametrize("text", ["", "\u200b"])
def test_a_text_without_tokens_begins_no_prompt(text: str) -> None:
    class Silent:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [1] if add_special_tokens else []

    model = replace(tiny_base().model, tokenizer=Silent())  # type: ignore[arg-type]
    case = PromptSettings(init="text", init_text=text or " ")
    with pytest.raises(SettingError, match="init_text: has no tokens"):
        make(case, model)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3"])
def test_bottlenecks_are_refused_where_adapterhub_does_not_have_them(family: str) -> None:
    with pytest.raises(BaseError, match=f"bottleneck cannot be trained on this base: model_type: .*{family}"):
        make(BottleneckSettings(), tiny_base(family).model)


def test_a_prefix_needs_the_base_s_heads() -> None:
    model = tiny_base().model
    unknown = replace(model, description=replace(model.description, num_kv_heads=0))
    with pytest.raises(BaseError, match="heads are unknown"):
        make(PrefixSettings(), unknown)


def test_dora_needs_the_base_s_weights() -> None:
    model = tiny_base().model
    without = replace(model, description=replace(model.description, weights=None))
    with pytest.raises(BaseError, match="weights are not available"):
        make(LoraSettings(use_dora=True, target_modules=Q), without)


@pytest.mark.parametrize("case", [PromptSettings(), PromptSettings(init="random"), PTuningSettings()])
def test_virtual_tokens_are_refused_where_the_server_refuses_them(case: AdapterSettings) -> None:
    """An architecture that multiplies embeddings, the server knows not where."""
    model = tiny_base().model
    odd = replace(model, description=replace(model.description, model_type="novel", embedding_scale=2.0))
    with pytest.raises(BaseError, match="novel"):
        make(case, odd)


class TestFusedModules:
    """Phi-3 holds q, k and v in one module, gate and up in another."""

    def test_linears_named_together_stand_for_their_module(self) -> None:
        adapter = make_adapter(LoraSettings(rank=2), "task", tiny_base("phi3").model, seed=0)
        assert adapter.config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
        assert len(adapter.parameters) == 2 * 2 * 4

    def test_the_module_s_own_name_does_too(self) -> None:
        adapter = make_adapter(
            LoraSettings(rank=2, target_modules=("qkv_proj",)), "task", tiny_base("phi3").model, seed=0
        )
        assert len(adapter.lowered().deltas) == 2 * 3

    def test_some_of_them_alone_are_refused(self) -> None:
        with pytest.raises(SettingError) as caught:
            make(LoraSettings(target_modules=("q_proj", "v_proj")), tiny_base("phi3").model)
        assert "q_proj, k_proj, v_proj in one module, qkv_proj: name that, or k_proj as well" in str(
            caught.value
        )


def test_all_linear_is_every_linear_but_the_head() -> None:
    for family, count in (("llama", 7), ("phi3", 4)):
        case = LoraSettings(rank=2, target_modules=("all-linear",))
        adapter = make_adapter(case, "task", tiny_base(family).model, seed=0)
        assert len(adapter.parameters) == 2 * 2 * count
        assert "lm_head" not in adapter.config["target_modules"]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_is_recorded_names_the_linears_that_the_settings_leave_to_the_base(family: str) -> None:
    base = tiny_base(family).model.description
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert with_named_modules(LoraSettings(rank=2), base) == LoraSettings(rank=2, target_modules=linears)
    both = LoraSettings(target_modules=("lm_head", "up_proj", "all-linear"))
    ahead = ("lm_head", "up_proj")
    rest = tuple(name for name in linears if name != "up_proj")
    assert with_named_modules(both, base) == LoraSettings(target_modules=(*ahead, *rest))
    factors = with_named_modules(Ia3Settings(), base)
    assert isinstance(factors, Ia3Settings)
    assert set(factors.output_modules) == {"k_proj", "v_proj", *(("q_proj",) if family == "phi3" else ())}
    for settings in (LoraSettings(target_modules=("o_proj",)), Ia3Settings(output_modules=("v_proj",))):
        assert with_named_modules(settings, base) == settings


def test_a_pattern_decides_over_the_modules_that_it_matches() -> None:
    case = LoraSettings(
        rank=4,
        target_modules=("q_proj", "k_proj"),
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 6},
    )
    parameters = make_adapter(case, "task", tiny_base().model, seed=0).parameters
    ranks = {
        name.removeprefix("base_model.model.model.layers."): parameter.shape[0]
        for name, parameter in parameters.items()
        if "lora_A" in name
    }
    assert ranks == {
        "0.self_attn.k_proj.lora_A.weight": 4,
        "0.self_attn.q_proj.lora_A.weight": 6,
        "1.self_attn.k_proj.lora_A.weight": 4,
        "1.self_attn.q_proj.lora_A.weight": 2,
    }
