"""Settings from flags and files: names, types, ranges, and which method has which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.artifact import AdapterMethod
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.methods import (
    BottleneckSettings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from manyhats.trainer.settings.settings import with_quantization
from manyhats.trainer.settings.settings_file import METHODS, make_settings, read_file, read_settings

MINIMUM = {"task": "sql", "data": "rows.jsonl"}


def settings_of(method: str, **values: Any) -> Any:
    return make_settings({"method": method, **MINIMUM, **values})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_needs_a_task_and_data_only(method: str) -> None:
    made = settings_of(method)
    assert (made.task, made.data.train, made.out) == ("sql", "rows.jsonl", "")
    assert isinstance(made.adapter, METHODS[method].settings)


@pytest.mark.parametrize(
    ("method", "quantization"),
    [(name, {"lora": "none", "qlora": "nf4"}.get(name, "auto")) for name in METHODS],
)
def test_quantization_of_each_method_unless_told(method: str, quantization: str) -> None:
    assert settings_of(method).model.quantization == quantization


def test_quantization_that_is_asked_for() -> None:
    assert settings_of("lora", quantization="nf4").model.quantization == "nf4"
    assert settings_of("prefix", quantization="none").model.quantization == "none"
    assert settings_of("lora", quantization="auto").model.quantization == "auto"
    with pytest.raises(SettingError, match=r"^quantization: qlora needs nf4"):
        settings_of("qlora", quantization="none")


def test_what_is_left_to_the_base_is_recorded_as_it_is() -> None:
    assert with_quantization(settings_of("ia3"), "none").model.quantization == "none"
    assert with_quantization(settings_of("ia3", quantization="nf4"), "none").model.quantization == "nf4"


def test_dora_is_lora_with_magnitudes() -> None:
    assert settings_of("dora").adapter.method is AdapterMethod.DORA
    assert settings_of("qlora").adapter.method is AdapterMethod.LORA


def test_values_reach_their_section() -> None:
    made = settings_of(
        "lora",
        rank=4,
        rank_pattern={"q_proj": 2},
        eval="held.jsonl",
        labels=["yes", "no"],
        batch_size=3,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        out="there",
        save_dtype="bfloat16",
    )
    assert (made.adapter.rank, made.adapter.rank_pattern) == (4, {"q_proj": 2})
    assert (made.data.eval, made.data.labels) == ("held.jsonl", ("yes", "no"))
    assert (made.optimization.batch_size, made.optimization.learning_rate) == (3, 1e-3)
    assert (made.model.gradient_checkpointing, made.out, made.save_dtype) == (False, "there", "bfloat16")


@pytest.mark.parametrize(
    ("method", "values", "kind"),
    [
        ("bottleneck", {"variant": "parallel", "scaling": 2}, BottleneckSettings),
        ("prefix", {"num_virtual_tokens": 4, "projection_size": 0}, PrefixSettings),
        ("prompt", {"init": "text", "init_text": "Say:"}, PromptSettings),
        ("ptuning", {"encoder_size": 8}, PTuningSettings),
    ],
)
def test_settings_of_a_method(method: str, values: dict[str, Any], kind: type) -> None:
    assert settings_of(method, **values).adapter == kind(**values)


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("magic", {}, "method: must be one of lora, qlora, dora, .*, not 'magic'"),
        ("lora", {"colour": "red"}, "colour: is not a setting"),
        ("prefix", {"rank": 4}, "rank: is not a setting of prefix, but of lora, qlora, dora"),
        ("lora", {"num_virtual_tokens": 4}, "num_virtual_tokens: .* but of prefix, prompt, ptuning"),
        ("lora", {"use_dora": True}, "use_dora: is not a setting"),
        ("lora", {"rank": 0}, "rank: must be at least 1"),
        ("lora", {"rank": "many"}, "rank: must be a whole number"),
        ("lora", {"rank": True}, "rank: must not be true"),
        ("lora", {"alpha": float("nan")}, "alpha: must be a finite number"),
        ("lora", {"labels": ["a", False]}, r"labels\.1: must be text"),
        ("lora", {"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\.q_proj: must be a whole number"),
        ("lora", {"schedule": "step"}, "schedule: input should be 'linear', 'cosine' or 'constant'"),
        ("lora", {"save_dtype": "int8"}, "save_dtype: input should be 'float32' or 'bfloat16'"),
        ("lora", {"max_length": 1}, "max_length: must be at least 2"),
        ("lora", {"task": "No Task"}, "task: 'No Task' is not a task name"),
        ("lora", {"task": 7}, "task: must be a string, not 7"),
        ("lora", {"task": None}, "task: must be given"),
        ("lora", {"data": ""}, "data: must be given"),
        ("lora", {"data": 7}, "data: must be text"),
        ("", {}, "method: must be given: one of lora, "),
        ("prompt", {"init": "text"}, "init_text: must be given with init text"),
        ("prompt", {"init_text": "Say:"}, "init_text: only applies to init text"),
        ("bottleneck", {"non_linearity": "step"}, "non_linearity: 'step' is not an .* these are: gelu, "),
        ("bottleneck", {"non_linearity": "prelu"}, "non_linearity: 'prelu' has parameters of its own"),
        ("bottleneck", {"scaling": 0}, "scaling: must be nonzero, and at most 1e[+]06"),
        ("bottleneck", {"scaling": -2e6}, "scaling: must be nonzero"),
        ("lora", {"labels": ["a"]}, "labels: need evaluation data"),
        ("lora", {"patience": 2}, "patience: early stopping needs evaluation data"),
        ("lora", {"epochs": 0}, "epochs: must be above 0"),
        ("lora", {"epochs": "1e30"}, "epochs: must be at most 10000"),
        ("lora", {"epochs": 10**400}, "epochs: "),
        ("lora", {"warmup_steps": 1e300}, "warmup_steps: must be at most 2147483647"),
        ("lora", {"weight_decay": -1}, "weight_decay: must be at least 0"),
        ("lora", {"rank_pattern": {"q_proj": 10**30}}, "rank_pattern: ranks must be at most 2147483647"),
        ("lora", {"num_threads": -1}, "num_threads: must be from 0 to 4096"),
        ("lora", {"num_threads": 2**31}, "num_threads: must be from 0 to 4096"),
        ("lora", {"max_train_rows": 0}, "max_train_rows: must be at least 1"),
    ],
)
def test_wrong_setting_is_named(method: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        settings_of(method, **values)


def test_file_has_the_flags_names(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        "method: lora\ndata: a.jsonl\nbatch-size: 4\ntarget_module: q_proj\nlearning-rate: 1e-4\n"
    )
    made = make_settings({**read_file(file), "task": "sql", "batch_size": 8})
    assert made.adapter == LoraSettings(target_modules=("q_proj",))
    assert (made.optimization.batch_size, made.optimization.learning_rate) == (8, 1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "learning_rat: 1\n",
            r"config: .*train\.yaml: learning_rat: is not a setting; did you mean learning_rate\?",
        ),
        (
            "batch-sise: 1\n",
            r"config: .*train\.yaml: batch_sise: is not a setting; did you mean batch_size\?",
        ),
        ("targets: 1\n", r"config: .*train\.yaml: targets: is not a setting"),
        ("num_virtual_token: 1\n", r"config: .*: is not a setting; did you mean num_virtual_tokens\?"),
        ("colour: red\n", r"config: .*train\.yaml: colour: is not a setting"),
        ("target-module: a\ntarget_modules: [b]\n", r"config: .*train\.yaml: target_modules: is given twice"),
        ("rank: 3\n\nrank: 4\n", r"config: .*train\.yaml:3: rank: is given twice"),
        ("rank: 3\nrank_pattern: {a: 1, b: 2, a: 3}\n", r"config: .*train\.yaml:2: a: is given twice"),
        ("- lora\n", "config: .* must have settings"),
        ("7: lora\n", "config: .* must have settings"),
        ("a: [\n", "config: .* is not YAML"),
        (b"\xff", "config: .* is not YAML"),
    ],
)
def test_bad_file(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingError, match=f"^{message}"):
        read_file(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9" * 5000, "has a number with too many digits, or an invalid date"),
        ("2024-13-45", "has a number with too many digits, or an invalid date"),
        ("[" * 10_000, "is nested too deeply"),
    ],
    ids=["digits", "date", "depth"],
)
def test_a_value_that_python_cannot_hold(tmp_path: Path, value: str, message: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(f"seed: {value}\n")
    with pytest.raises(SettingError, match=rf"^config: .*train\.yaml {message}$"):
        read_file(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"config: cannot read .*: No such file"):
        read_file(tmp_path / "none.yaml")


def test_empty_file_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.touch()
    assert read_file(file) == {}


def test_whole_numbers_end_where_libraries_overflow() -> None:
    for method, names in (
        ("lora", "rank batch_size batch_tokens gradient_accumulation max_steps max_length max_train_rows"),
        ("lora", "max_eval_rows eval_steps checkpoint_steps keep_checkpoints seed"),
        ("bottleneck", "reduction_factor"),
        ("prefix", "num_virtual_tokens projection_size"),
        ("prompt", "num_virtual_tokens"),
        ("ptuning", "num_virtual_tokens encoder_size"),
    ):
        for name in names.split():
            settings_of(method, **{name: 2**31 - 1})
            for value in (2**31, 10**23, 10**400):
                with pytest.raises(SettingError, match=f"^{name}: "):
                    settings_of(method, **{name: value})


def test_merged_keys_of_a_file_may_be_set_anew(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("rank_pattern: &a {q_proj: 1, k_proj: 2}\nalpha_pattern: {<<: *a, q_proj: 3}\n")
    assert read_file(file)["alpha_pattern"] == {"q_proj": 3, "k_proj": 2}


def settings_from(directory: Path, content: str, **flags: Any) -> Any:
    file = directory / "train.yaml"
    file.write_text(content)
    return read_settings(file, flags, MINIMUM)


def test_flags_win_over_the_file_and_the_file_over_what_is_otherwise(tmp_path: Path) -> None:
    made = settings_from(tmp_path, "method: lora\ntask: file\nrank: 3\nseed: 4\n", rank=5)
    assert (made.task, made.data.train, made.adapter.rank, made.optimization.seed) == (
        "file",
        "rows.jsonl",
        5,
        4,
    )


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("rank: 0\n", {}, r"config: .*train\.yaml: rank: must be at least 1"),
        ("rank_pattern: {a: b}\n", {}, r"config: .*train\.yaml: rank_pattern\.a: must be a whole number"),
        ("label: a\n", {}, r"config: .*train\.yaml: labels: need evaluation data"),
        (
            "num-virtual-tokens: 3\n",
            {},
            r"config: .*train\.yaml: num_virtual_tokens: is not a setting of lora",
        ),
        ("rank: 0\n", {"rank": -1}, "rank: must be at least 1"),
        ("seed: 0\n", {"rank": -1}, "rank: must be at least 1"),
        ("rank: 2\n", {"method": None}, "method: must be given"),
    ],
)
def test_wrong_setting_of_a_file_is_named_with_the_file_and_a_flag_by_itself(
    tmp_path: Path, content: str, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        settings_from(tmp_path, content, **{"method": "lora", **flags})


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(
    name=st.sampled_from([*sorted(METHODS["lora"].names), "task", "data", "batch_size", "labels", "dtype"]),
    value=st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=2), max_leaves=3),
)
def test_any_value_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    refused = None
    try:
        settings_of("lora", **{name: value})
    except SettingError as error:
        refused = error
    assert refused is None or refused.setting.split(".")[0] == name
    assert "\n" not in str(refused)
