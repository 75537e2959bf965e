"""A file whose config leaves out a module that its tensors act on is refused exactly where PEFT drops the tensors."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.formats.peft.module_selection import check_selected
from manyhats.adapters.formats.peft.tensors import ModuleTensors
from manyhats.adapters.lowering.lowering import lower
from support.factories.adapters import make_base
from support.oracles.peft import (
    base_logits,
    check_against_peft,
    make_peft,
    peft_logits,
    read,
    save_peft,
    tiny_model,
)
from support.oracles.primitives import describe_model

# PEFT reads names that transformers has deprecated, and says which tensors it drops.
pytestmark = pytest.mark.filterwarnings("ignore")

BASE = make_base(num_layers=12)
PATHS = list(BASE.modules)
NAMES = st.lists(
    st.sampled_from(
        [
            *(
                "q_proj",
                "up_proj",
                "proj",
                "self_attn.q_proj",
                "lm_head",
                "embed_tokens",
                "1.self_attn.q_proj",
                "",
            ),
            *(
                "model.layers.1.self_attn.q_proj",
                "layers.11.mlp.up_proj",
                ".q_proj",
                "model.embed_tokens",
                "mlp",
            ),
        ]
    ),
    min_size=1,
    max_size=4,
)
PATTERNS = st.sampled_from(
    [
        *(
            r".*\.(q|up)_proj",
            r".*layers\.[01]\..*",
            "q_proj",
            ".*",
            "lm_head|.*embed.*",
            r"model\.layers\.\d\..*",
        ),
        *(r"(?:.*?self_attn.*?q_proj)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up_proj)", r"(.*\.)?mlp\.\w+", ""),
    ]
)
LAYERS = st.none() | st.integers(-1, 13) | st.lists(st.integers(0, 11), max_size=3)
CONTAINERS = st.none() | st.sampled_from(
    ["layers", "model", "", "h", r"lay\w+", "model.layers", "(layers|h)"]
)


def tensors_of(path: str) -> ModuleTensors:
    return ModuleTensors(path, {"lora_A.weight": (1, 1)})


def is_refused(config: dict[str, Any], path: str) -> bool:
    try:
        check_selected(config, [tensors_of(path)], BASE)
    except AdapterInvalidError as error:
        return error.subject == f"base_model.model.{path}.lora_A.weight"
    return False


@settings(max_examples=600, deadline=None)
@given(
    targets=NAMES | PATTERNS,
    excluded=st.none() | NAMES | PATTERNS,
    layers=LAYERS,
    containers=CONTAINERS | st.lists(CONTAINERS.filter(bool), max_size=2),
    path=st.sampled_from(PATHS),
)
def test_modules_are_left_out_as_peft_leaves_them_out(
    targets: Any, excluded: Any, layers: Any, containers: Any, path: str
) -> None:
    """But for what a config that selects nothing leaves out; PEFT does not take layers with a pattern."""
    if isinstance(targets, str):
        layers = containers = None
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": containers,
    }
    config = SimpleNamespace(**fields)
    used = {other for other in PATHS if check_target_module_exists(config, other)}
    if containers is not None and "|" in str(containers):
        assert not (path in used and is_refused(fields, path))
    else:
        assert is_refused(fields, path) == (bool(used) and path not in used)


LORAS: dict[str, dict[str, Any]] = {
    "a pattern": {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qk]_proj|mlp\.down_proj)"},
    "a pattern with a lookahead": {"target_modules": r"^(?!.*layers\.0).*(?:q_proj|up_proj)"},
    "excluded by a pattern": {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*|.*o_proj"},
    "excluded by names": {
        "target_modules": "all-linear",
        "exclude_modules": ["layers.0.mlp.up_proj", "q_proj"],
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers of a list": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "layers of one of several lists": {
        "target_modules": ["v_proj", "model.layers.0.self_attn.o_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "patterns of ranks and alphas": {
        "target_modules": "all-linear",
        # In the order in which PEFT writes them.
        "rank_pattern": {r".*layers\.0\.(self_attn|mlp)\.(q|up)_proj": 2, "[a-z]+_proj": 3},
        "alpha_pattern": {"(?:k|v)_proj": 5, r"model\.layers\.[1-9]\d*\..*": 20},
    },
}


@pytest.mark.parametrize("config", LORAS.values(), ids=LORAS.keys())
def test_what_peft_saves_is_served_as_peft_serves_it(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    peft = make_peft(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **config))
    check_against_peft(model, save_peft(peft, tmp_path))


OTHERS: dict[str, Any] = {
    "adalora": AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=3, total_step=9, target_modules=r".*layers\.1\..*(q|up)_proj"
    ),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "ia3": IA3Config(
        target_modules=r".*(k_proj|down_proj)",
        feedforward_modules=r".*down_proj",
        exclude_modules=r".*\.0\..*",
    ),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_so_it_is_with_the_other_methods(config: Any, tmp_path: Path) -> None:
    model = tiny_model()
    check_against_peft(model, save_peft(make_peft(model, config), tmp_path))


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "names": ({"target_modules": ["q_proj"]}, "layers.0.mlp.up_proj"),
    "a pattern": ({"target_modules": r".*layers\.[1-9]\..*_proj"}, "layers.0.self_attn.q_proj"),
    "excluded names": ({"exclude_modules": ["up_proj"]}, "layers.0.mlp.up_proj"),
    "an excluding pattern": ({"exclude_modules": ".*q_proj"}, "layers.0.self_attn.q_proj"),
    "layers": ({"layers_to_transform": [0]}, "layers.1.self_attn.q_proj"),
    "layers of a list": ({"layers_to_transform": 1, "layers_pattern": "layers"}, "layers.0.self_attn.q_proj"),
    "other modules": ({"target_modules": ["k_proj"]}, "layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize(("fields", "module"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_tensors_that_peft_would_drop_are_refused(
    fields: dict[str, Any], module: str, tmp_path: Path
) -> None:
    model = tiny_model()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    save_peft(make_peft(model, config), tmp_path)
    whole = peft_logits(model, tmp_path)
    edit(tmp_path, **fields)
    assert (peft_logits(model, tmp_path) - whole).abs().max() > 1e-2
    with pytest.raises(AdapterInvalidError) as caught:
        read(tmp_path, describe_model(model))
    assert caught.value.subject == f"base_model.model.model.{module}.lora_A.weight"
    assert f"acts on model.{module}, which {next(iter(fields))} leaves out" in caught.value.description


def test_what_was_registered_before_stays_served(tmp_path: Path) -> None:
    """The check is registration's: versions in the store are only lowered."""
    model = tiny_model()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    artifact = read(save_peft(make_peft(model, config), tmp_path), describe_model(model))
    edited = replace(artifact, config={**artifact.config, "target_modules": ["v_proj"]})
    assert len(lower(edited, describe_model(model)).deltas) == 2


@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods_refuse_them_as_well(method: str, tmp_path: Path) -> None:
    model = tiny_model()
    save_peft(make_peft(model, OTHERS[method]), tmp_path)
    edit(tmp_path, target_modules=["v_proj"], layers_to_transform=None, layers_pattern=None)
    with pytest.raises(AdapterInvalidError, match="which target_modules leaves out; PEFT would not use it"):
        read(tmp_path, describe_model(model))


def test_fields_that_peft_s_config_lacks_leave_nothing_out(tmp_path: Path) -> None:
    model = tiny_model()
    for method, fields in (("vera", {"exclude_modules": ["q_proj"]}), ("ia3", {"layers_to_transform": [0]})):
        directory = save_peft(make_peft(model, OTHERS[method]), tmp_path / method)
        edit(directory, **fields)
        check_against_peft(model, directory)


def test_modules_that_are_selected_and_have_no_tensors_change_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], layers_to_transform=[0])
    save_peft(make_peft(model, config), tmp_path)
    edit(tmp_path, target_modules=["q_proj", "down_proj"], layers_to_transform=None)
    check_against_peft(model, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": None},
        {"target_modules": "model.language_model.*q_proj"},
        {"target_modules": []},
        {"target_modules": "(a+)+$", "exclude_modules": "(a+)+$"},
        {"target_modules": "(a{1000}){1000}", "exclude_modules": "(?=a)"},
        {"target_modules": "(", "exclude_modules": "x" * 9999},
        {"exclude_modules": ".*"},
        {"layers_to_transform": [99]},
    ],
)
def test_tensors_decide_where_the_config_says_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT could not load most of these; the others have patterns that only it runs."""
    model = tiny_model()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    whole = save_peft(make_peft(model, config), tmp_path)
    assert (peft_logits(model, whole) - base_logits(model)).abs().max() > 1e-2
    edit(tmp_path, **fields)
    assert set(read(tmp_path, describe_model(model)).tensors) == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
        for layer in (0, 1)
        for part in "AB"
    }


@pytest.mark.parametrize("ensure", [False, True])
def test_tied_modules_are_selected_together(ensure: bool) -> None:
    config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": ensure}
    modules = [tensors_of("model.embed_tokens"), tensors_of("lm_head")]
    if ensure:
        check_selected(config, modules, BASE)
        return
    with pytest.raises(AdapterInvalidError, match="acts on lm_head, which target_modules leaves out"):
        check_selected(config, modules, BASE)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "(?:.{0,1000}[a-z]*)" * 200, "exclude_modules": "(.*)*(.*)*x"},
        {
            "target_modules": [f"x{i}" for i in range(60_000)],
            "exclude_modules": [f"{i}" for i in range(60_000)],
        },
        {"layers_to_transform": list(range(60_000)), "layers_pattern": ["(x+x+)+y", "(.?){999}"] * 2000},
    ],
)
def test_hostile_fields_are_answered_in_bounded_time(config: dict[str, Any]) -> None:
    base = make_base(num_layers=60)
    start = time.process_time()
    with contextlib.suppress(AdapterInvalidError):
        check_selected(
            {"target_modules": ["q_proj"]} | config, [tensors_of(path) for path in base.modules], base
        )
    assert time.process_time() - start < 20
