"""Adapters whose config and tensors are well-formed files, and still must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hostile.case import BASE, CONFIG, WEIGHTS, Call, Case, World, register
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterNoEffectError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    BaseMismatchError,
)
from support.factories.adapters import lora_config, lora_tensors, make_base, write_adapter

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass
class Draft:
    """A good adapter in memory, to be spoilt."""

    config: dict[str, Any] = field(default_factory=lambda: lora_config(BASE, rank=4))
    tensors: dict[str, Tensor] = field(default_factory=lambda: lora_tensors(BASE, rank=4))


def named(name: str, spoil: Callable[[Draft], object]) -> Callable[[Draft], object]:
    """The same, with a name for pytest."""
    spoil.__name__ = name
    return spoil


def config_with(**fields: Any) -> Callable[[Draft], object]:
    return named(f"{fields!a:.60}", lambda draft: draft.config.update(fields))


def tensors_with(**tensors: Tensor) -> Callable[[Draft], object]:
    """Tensors named by what follows the first q_proj's path."""
    added = {f"{PREFIX}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    shapes = {name.replace("__", "."): tuple(tensor.shape) for name, tensor in tensors.items()}
    return named(f"{shapes!a:.60}", lambda draft: draft.tensors.update(added))


def without(name: str) -> Callable[[Draft], object]:
    return named(f"without {name}", lambda draft: draft.tensors.__delitem__(f"{PREFIX}.{name}"))


def renamed(old: str, new: str) -> Callable[[Draft], object]:
    def rename(draft: Draft) -> None:
        draft.tensors = {name.replace(old, new): tensor for name, tensor in draft.tensors.items()}

    return named(f"{old} named {new!a}", rename)


def replaced(make: Callable[[Tensor], Tensor], part: str = f"{PREFIX}.lora_A") -> Callable[[Draft], object]:
    def replace(draft: Draft) -> None:
        draft.tensors = {name: make(t) if part in name else t for name, t in draft.tensors.items()}

    return named(f"{make.__name__} of {part[-20:]}", replace)


def with_head(**tensors: Tensor) -> Callable[[Draft], object]:
    """A head that classifies texts; tensors named by what follows the model's path."""
    added = {f"base_model.model.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}

    def add(draft: Draft) -> None:
        draft.config["task_type"] = "SEQ_CLS"
        draft.tensors.update(added)

    shapes = [(name, *tensor.shape, str(tensor.flatten()[:1])) for name, tensor in tensors.items()]
    return named(f"head {shapes}", add)


def of_base(base: Any, **fields: Any) -> Callable[[Draft], object]:
    def replace(draft: Draft) -> None:
        draft.tensors = lora_tensors(base, rank=4)
        draft.config.update(fields)

    return named(f"base of {base.num_layers}x{base.hidden_size} {fields!a}", replace)


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[-1, -1] = value
        return tensor

    poison.__name__ = str(value)
    return poison


def float8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


OTHER_BASE = make_base(hidden_size=48, num_heads=6, num_kv_heads=3, intermediate_size=64)
DEEPER_BASE = make_base(num_layers=3)
Unsupported, Invalid, TooLarge, Mismatch = (
    AdapterUnsupportedError,
    AdapterInvalidError,
    AdapterTooLargeError,
    BaseMismatchError,
)

SPOILT: list[tuple[Callable[[Draft], object], type[AdapterError], str]] = [
    # Variants of LoRA that compute something else.
    *(
        (config_with(init_lora_weights=name), Unsupported, "init_lora_weights")
        for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "surprise")
    ),
    (config_with(layer_replication=[[0, 1], [0, 1]]), Unsupported, "layer_replication"),
    (config_with(use_qalora=True), Unsupported, "use_qalora"),
    (config_with(use_bdlora={"nblocks": 2}), Unsupported, "use_bdlora"),
    (config_with(arrow_config={"top_k": 3}), Unsupported, "arrow_config"),
    (config_with(kasa_config={"beta": 1e-4}), Unsupported, "kasa_config"),
    (config_with(monteclora_config={"num_samples": 2}), Unsupported, "monteclora_config"),
    (config_with(velora_config={"scale": 1.0}), Unsupported, "velora_config"),
    (config_with(megatron_config={"a": 1}), Unsupported, "megatron_config"),
    # Tensors that the config promises.
    (config_with(use_dora=True), Invalid, "lora_A.weight"),
    (config_with(use_dora=1), Invalid, "use_dora"),
    (config_with(use_dora=True, lora_bias=True), Unsupported, "lora_bias"),
    (config_with(lora_bias=True), Invalid, "lora_A.weight"),
    (config_with(modules_to_save=["lm_head"]), Invalid, "modules_to_save"),
    (config_with(modules_to_save=["q_proj"]), Unsupported, "modules_to_save"),
    (config_with(trainable_token_indices=[1]), Invalid, "trainable_token_indices"),
    (config_with(target_parameters=["experts"]), Unsupported, "target_parameters"),
    (config_with(alora_invocation_tokens=[1]), Unsupported, "alora_invocation_tokens"),
    (config_with(new_and_unknown=1), Unsupported, "new_and_unknown"),
    (config_with(new_and_unknown=0), Unsupported, "new_and_unknown"),
    # Tasks, methods and formats.
    (config_with(task_type="SEQ_CLS"), Invalid, "task_type"),
    (config_with(task_type="TOKEN_CLS"), Invalid, "task_type"),
    (with_head(score__weight=torch.ones(2, BASE.hidden_size + 1)), Invalid, "score.weight"),
    (with_head(score__weight=torch.ones(BASE.hidden_size)), Invalid, "score.weight"),
    (with_head(score__weight=torch.ones(2, BASE.hidden_size, 1)), Invalid, "score.weight"),
    (with_head(score__weight=torch.ones(0, BASE.hidden_size)), Invalid, "score.weight"),
    (with_head(score__weight=torch.full((2, BASE.hidden_size), torch.nan)), Invalid, "score.weight"),
    (with_head(score__weight=torch.ones(2, BASE.hidden_size).long()), Unsupported, "score.weight"),
    (with_head(score__bias=torch.ones(2)), Invalid, "task_type"),
    (
        with_head(score__weight=torch.ones(2, BASE.hidden_size), score__bias=torch.ones(3)),
        Invalid,
        "score.bias",
    ),
    (
        with_head(score__weight=torch.ones(2, BASE.hidden_size), classifier__weight=torch.ones(2, 2)),
        Unsupported,
        "classifier.weight",
    ),
    (config_with(task_type="SEQ_2_SEQ_LM"), Unsupported, "task_type"),
    (config_with(task_type=3), Unsupported, "task_type"),
    *(
        (config_with(peft_type=name), Unsupported, "peft_type")
        for name in (
            "HIRA",
            "BOFT",
            "LOHA",
            "XLORA",
            "lora",
            "",
            "\x00",
        )
    ),
    (config_with(peft_type=None), Invalid, "peft_type"),
    (config_with(peft_type=["LORA"]), Invalid, "peft_type"),
    (named("no peft_type", lambda draft: draft.config.pop("peft_type")), Invalid, CONFIG),
    # Values out of range.
    (config_with(r=0), Invalid, "r"),
    (config_with(r=-4), Invalid, "r"),
    (config_with(r=4.0), Invalid, "r"),
    (config_with(r=True), Invalid, "r"),
    (config_with(r="4"), Invalid, "r"),
    (config_with(r=None), Invalid, "r"),
    (config_with(r=10**30), TooLarge, "r"),
    (config_with(r=65), TooLarge, "r"),
    (config_with(lora_alpha=None), Invalid, "lora_alpha"),
    (config_with(lora_alpha="16"), Invalid, "lora_alpha"),
    (config_with(lora_alpha=1e300), Invalid, "lora_alpha"),
    (config_with(lora_alpha=10**38), Invalid, "lora_alpha"),
    (config_with(use_rslora="yes"), Invalid, "use_rslora"),
    (config_with(bias="some"), Invalid, "bias"),
    (config_with(bias=1), Invalid, "bias"),
    (config_with(init_lora_weights=3), Invalid, "init_lora_weights"),
    (config_with(rank_pattern=[1]), Invalid, "rank_pattern"),
    (config_with(rank_pattern={"q_proj": 0}), Invalid, "rank_pattern"),
    (config_with(rank_pattern={"q_proj": "4"}), Invalid, "rank_pattern"),
    (config_with(rank_pattern={"(?!x)y": 4}), Unsupported, "rank_pattern"),
    (config_with(rank_pattern={"(a{1000}){1000}": 4}), TooLarge, "rank_pattern"),
    (config_with(alpha_pattern={r"(.*)\1": 4}), Unsupported, "alpha_pattern"),
    (config_with(alpha_pattern={"(q_proj": 4}), Invalid, "alpha_pattern"),
    (config_with(alpha_pattern={f"{i}.{{900}}": 4 for i in range(500)}), TooLarge, "alpha_pattern"),
    (config_with(alpha_pattern={"q_proj": None}), Invalid, "alpha_pattern"),
    (config_with(alpha_pattern={"q" * 600: 1}), TooLarge, "alpha_pattern"),
    (config_with(base_model_name_or_path=7), Invalid, "base_model_name_or_path"),
    (config_with(base_model_name_or_path="a\nb"), Invalid, "base_model_name_or_path"),
    (config_with(target_modules=["x" * 30_000]), TooLarge, CONFIG),
    (config_with(target_modules=7), Invalid, "target_modules"),
    (config_with(exclude_modules=[["q_proj"]]), Invalid, "exclude_modules"),
    (config_with(layers_to_transform="1"), Invalid, "layers_to_transform"),
    (config_with(layers_to_transform=[True]), Invalid, "layers_to_transform"),
    (config_with(layers_to_transform=[0], layers_pattern={"a": 1}), Invalid, "layers_pattern"),
    # PEFT would not use these tensors.
    (config_with(target_modules=["v_proj"]), Invalid, "lora_A.weight"),
    (config_with(target_modules="all-linear", exclude_modules=["q_proj"]), Invalid, "lora_A.weight"),
    (config_with(target_modules=r".*layers\.[1-9]\..*"), Invalid, "lora_A.weight"),
    (config_with(layers_to_transform=[7], target_modules=["lm_head", "q_proj"]), Invalid, "lora_A.weight"),
    # Ranks and shapes.
    (config_with(r=8), Invalid, "lora_A.weight"),
    (config_with(rank_pattern={"layers.0.self_attn.q_proj": 5}), Invalid, f"{PREFIX}.lora_A.weight"),
    (
        tensors_with(lora_A__weight=torch.zeros(0, 32), lora_B__weight=torch.zeros(32, 0)),
        Invalid,
        f"{PREFIX}.lora_A.weight",
    ),
    (
        tensors_with(lora_A__weight=torch.ones(65, 32), lora_B__weight=torch.ones(32, 65)),
        Invalid,
        f"{PREFIX}.lora_A.weight",
    ),
    (tensors_with(lora_A__weight=torch.ones(4, 31)), Invalid, f"{PREFIX}.lora_A.weight"),
    (tensors_with(lora_A__weight=torch.ones(32, 4)), Invalid, f"{PREFIX}.lora_A.weight"),
    (tensors_with(lora_A__weight=torch.ones(4, 32, 1)), Invalid, f"{PREFIX}.lora_A.weight"),
    (tensors_with(lora_A__weight=torch.ones(128)), Invalid, f"{PREFIX}.lora_A.weight"),
    (tensors_with(lora_A__weight=torch.ones(())), Invalid, f"{PREFIX}.lora_A.weight"),
    (tensors_with(lora_B__weight=torch.ones(33, 4)), Invalid, f"{PREFIX}.lora_B.weight"),
    (tensors_with(lora_B__weight=torch.ones(32, 5)), Invalid, f"{PREFIX}.lora_B.weight"),
    # Names of tensors.
    (without("lora_A.weight"), Invalid, f"{PREFIX}.lora_B.weight"),
    (without("lora_B.weight"), Invalid, f"{PREFIX}.lora_A.weight"),
    (tensors_with(lora_magnitude_vector=torch.ones(32)), Unsupported, "lora_magnitude_vector"),
    (tensors_with(lora_B__bias=torch.ones(32)), Unsupported, "lora_B.bias"),
    (tensors_with(bias=torch.ones(32)), Unsupported, f"{PREFIX}.bias"),
    (tensors_with(base_layer__bias=torch.ones(32)), Unsupported, f"{PREFIX}.base_layer.bias"),
    (tensors_with(base_layer__weight=torch.ones(32, 32)), Unsupported, "base_layer.weight"),
    (tensors_with(weight=torch.ones(32, 32)), Unsupported, f"{PREFIX}.weight"),
    (tensors_with(lora_E=torch.ones(4, 1)), Unsupported, "lora_E"),
    (tensors_with(lora_embedding_A=torch.ones(4, 64)), Unsupported, "lora_embedding_A"),
    (
        tensors_with(token_adapter__trainable_tokens_delta=torch.ones(1, 32)),
        Unsupported,
        "trainable_tokens_delta",
    ),
    (tensors_with(stray=torch.ones(1)), Invalid, "stray"),
    (renamed(".lora_A.weight", ".lora_A.default.weight"), Invalid, ".lora_A.default.weight"),
    (renamed("base_model.model.", ""), Invalid, "model.layers.0"),
    (renamed("layers.1.", "layers.2."), Invalid, "layers.2."),
    (renamed("layers.1.", "layers.01."), Invalid, "layers.01."),
    (renamed("q_proj", "qkv_proj"), Invalid, "qkv_proj"),
    (renamed("model.layers.0.self_attn.q_proj", "lm_head"), Invalid, "lm_head.lora_B.weight"),
    (renamed("model.layers.0.self_attn.q_proj", "model.embed_tokens"), Invalid, "embed_tokens.lora_A"),
    (renamed("q_proj", "q\n\u202e"), Invalid, "q\\x0a\\x202e"),
    # Values of tensors.
    (replaced(poisoned(float("nan"))), Invalid, f"{PREFIX}.lora_A.weight"),
    (replaced(poisoned(float("inf"))), Invalid, f"{PREFIX}.lora_A.weight"),
    (
        replaced(poisoned(-float("inf")), "layers.1.mlp.down_proj.lora_B"),
        Invalid,
        "layers.1.mlp.down_proj.lora_B.weight",
    ),
    (replaced(Tensor.double), Unsupported, f"{PREFIX}.lora_A.weight"),
    (replaced(Tensor.int), Unsupported, f"{PREFIX}.lora_A.weight"),
    (replaced(float8), Unsupported, f"{PREFIX}.lora_A.weight"),
    (replaced(torch.zeros_like, "lora_B"), AdapterNoEffectError, WEIGHTS),
    (config_with(lora_alpha=0), AdapterNoEffectError, WEIGHTS),
    # Another base.
    (config_with(base_model_name_or_path="org/other"), Mismatch, "base_model_name_or_path"),
    (of_base(OTHER_BASE, base_model_name_or_path="org/other"), Mismatch, "base_model_name_or_path"),
    (of_base(OTHER_BASE, base_model_name_or_path=""), Mismatch, "lora_A"),
    (of_base(OTHER_BASE, base_model_name_or_path="/models/other"), Mismatch, "lora_A"),
    (of_base(OTHER_BASE), Invalid, "lora_A"),
    (of_base(DEEPER_BASE), TooLarge, WEIGHTS),
    (of_base(DEEPER_BASE, base_model_name_or_path=""), TooLarge, WEIGHTS),
]


def case_of(spoil: Callable[[Draft], object], error: type[AdapterError], subject: str) -> Case:
    """The registration of a spoilt draft."""

    def call(world: World) -> Call:
        draft = Draft()
        spoil(draft)
        write_adapter(world.source, draft.config, draft.tensors)
        return register(world)

    return Case(f"adapter {spoil.__name__}", error, subject, call)


CASES = [case_of(*each) for each in SPOILT]
