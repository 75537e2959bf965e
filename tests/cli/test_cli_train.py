"""``manyhats train``: its flags, files and errors, and small trainings from data to artifact, in this process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from manyhats.cli.main import app
from manyhats.cli.options.settings import read_entries
from manyhats.trainer.settings import methods
from manyhats.trainer.settings import settings as trainer_settings
from manyhats.trainer.settings.settings import SETTINGS
from manyhats.trainer.settings.settings_file import METHODS, make_settings
from support.factories.tiny_models import make_checkpoint
from support.fakes.client import FakeServer


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["train", *args], prog_name="manyhats")


@cache
def tiny_model() -> Path:
    directory = Path(mkdtemp(prefix="manyhats-test-"))
    return make_checkpoint(directory / "tiny")


@pytest.fixture(autouse=True)
def in_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The command's own directory, with data in it; the base's NF4 weights are kept beside the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYHATS_HOME", str(tiny_model().parent / "home"))
    write_rows(tmp_path / "train.jsonl", 12)
    write_rows(tmp_path / "eval.jsonl", 5)
    return tmp_path


def write_rows(path: Path, count: int) -> None:
    rows = [{"prompt": f"number {i}: ", "completion": "odd" if i % 2 else "even"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small(method: str, *more: str) -> Result:
    """Two steps on the tiny model."""
    base = f"--task sql --data train.jsonl --model {tiny_model()} --max-steps 2 --batch-size 4 --device cpu"
    return run(method, *base.split(), "--dtype", "float32", *more)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of the training: the settings that it would have been given."""
    given: list[Any] = []

    def take(settings: Any, registrar: Any, resume: bool, as_json: bool) -> None:
        given.append((settings, registrar, resume, as_json))

    monkeypatch.setattr("manyhats.cli.training.runs.train_one", take)
    monkeypatch.setattr("manyhats.cli.training.runs.train_all", take)
    return given


# Flags


def test_help_shows_every_method_and_an_example() -> None:
    text = " ".join(run("--help").stdout.split())
    for method in METHODS:
        assert f" {method} " in text
    assert "$ manyhats train qlora --task sql --data train.jsonl" in text
    assert "qlora is LoRA on the base in NF4" in text


def test_every_setting_has_a_flag() -> None:
    kinds = [kind for module in (methods, trainer_settings) for kind in vars(module).values()]
    kinds = [kind for kind in kinds if isinstance(kind, type)]
    names = {field.name for kind in kinds if hasattr(kind, "__dataclass_fields__") for field in fields(kind)}
    sections = {"adapter", "optimization"}
    assert names - sections - {"use_dora", "train", "kind"} | {"data"} == {each.name for each in SETTINGS}


def test_flags_left_out_take_the_defaults_shown_in_the_help() -> None:
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    shown = {each.name: each.show_default for each in command.params if isinstance(each.show_default, str)}
    described = {
        "out": "tasks/T",
        "pooling": "auto, the base's own",
        "init_from": "fresh values",
        "quantization": "auto; none for lora, nf4 for qlora",
        "max_length": "the base's own",
        "max_train_rows": "all",
        "max_eval_rows": "all",
        "max_steps": "no limit",
        "learning_rate": "by the method",
        "scaling": "1; 4 for parallel",
        "target_modules": "all linears of the layers",
        "output_modules": "k_proj, v_proj",
        "input_modules": "down_proj",
        "chat": "no-chat",
        "ignore_fields": "no-ignore-fields",
        "shuffle": "shuffle",
        "use_rslora": "no-use-rslora",
        "gradient_checkpointing": "gradient-checkpointing",
    }
    assert described.items() <= shown.items()
    defaults: dict[str, Any] = {}
    for method in METHODS:
        made = make_settings({"method": method, "task": "t", "data": "d"})
        for section in (made, made.adapter, made.data, made.optimization, made.model):
            defaults |= {each.name: getattr(section, each.name) for each in fields(section)}
        defaults |= {"head": made.head.kind, "temperature": made.head.temperature}
    plain = shown.keys() - described.keys()
    assert len(plain) > 25
    assert {name: shown[name] for name in plain} == {name: str(defaults[name]) for name in plain}


def test_every_flag_reaches_its_setting(trained: list[Any]) -> None:
    flags = """
        --task sql --data d.jsonl --eval e.jsonl --chat --system Hello --label yes --label no --max-length 99
        --overlong skip --no-shuffle --max-train-rows 5 --max-eval-rows 6
        --rank 4 --alpha 9 --target-module q_proj --target-module v_proj --dropout 0.1 --use-rslora
        --rank-pattern layers.0.self_attn.q_proj=2 --alpha-pattern q_proj=1.5 --lora-plus-ratio 4
        --model tiny --quantization nf4 --dtype float32 --device cpu --no-gradient-checkpointing --num-threads 1
        --batch-size 3 --batch-tokens 64 --gradient-accumulation 2 --epochs 1.5 --max-steps 7
        --learning-rate 1e-4 --schedule cosine --warmup-steps 5 --optimizer adamw --weight-decay 0.01
        --beta1 0.8 --beta2 0.99 --max-grad-norm 0.5 --seed 3 --eval-steps 2 --patience 4 --checkpoint-steps 6
        --keep-checkpoints 1 --init-from before --out there --save-dtype bfloat16
        --register 127.0.0.1:7 --timeout 3 --tls --token secret --resume --json --activate-if
    """
    assert run("lora", *flags.split(), "accuracy >= 90% and loss < 2").exit_code == 0
    ((settings, registrar, resume, as_json),) = trained
    assert settings == trainer_settings.TrainSettings(
        task="sql",
        adapter=methods.LoraSettings(
            rank=4,
            alpha=9.0,
            target_modules=("q_proj", "v_proj"),
            dropout=0.1,
            use_rslora=True,
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"q_proj": 1.5},
            lora_plus_ratio=4.0,
        ),
        data=trainer_settings.DataSettings(
            train="d.jsonl",
            eval="e.jsonl",
            chat=True,
            system="Hello",
            labels=("yes", "no"),
            max_length=99,
            overlong="skip",
            shuffle=False,
            max_train_rows=5,
            max_eval_rows=6,
        ),
        optimization=trainer_settings.OptimizationSettings(
            batch_size=3,
            batch_tokens=64,
            gradient_accumulation=2,
            epochs=1.5,
            max_steps=7,
            learning_rate=1e-4,
            schedule="cosine",
            warmup_steps=5.0,
            weight_decay=0.01,
            beta1=0.8,
            beta2=0.99,
            max_grad_norm=0.5,
            eval_steps=2,
            patience=4,
            checkpoint_steps=6,
            keep_checkpoints=1,
            seed=3,
        ),
        model=trainer_settings.ModelSettings(
            model="tiny",
            quantization="nf4",
            dtype="float32",
            device="cpu",
            gradient_checkpointing=False,
            num_threads=1,
        ),
        out="there",
        init_from="before",
        save_dtype="bfloat16",
    )
    server = registrar.server
    assert (server.target, server.timeout_s) == ("127.0.0.1:7", 3.0)
    assert (server.credentials.token, server.credentials.tls) == ("secret", True)
    assert (registrar.activates, str(registrar.rule)) == (True, "accuracy >= 0.9 and loss < 2")
    assert (resume, as_json) == (True, True)


@pytest.mark.parametrize(
    ("flags", "adapter"),
    [
        (
            "ia3 --output-module o_proj --input-module up_proj",
            methods.Ia3Settings(output_modules=("o_proj",), input_modules=("up_proj",)),
        ),
        (
            "bottleneck --variant parallel --reduction-factor 8 --non-linearity gelu --scaling 2",
            methods.BottleneckSettings(
                variant="parallel", reduction_factor=8, non_linearity="gelu", scaling=2.0
            ),
        ),
        (
            "prefix --num-virtual-tokens 4 --projection-size 0",
            methods.PrefixSettings(num_virtual_tokens=4, projection_size=0),
        ),
        (
            "prompt --init text --init-text Say:",
            methods.PromptSettings(init="text", init_text="Say:"),
        ),
        ("ptuning --encoder-size 8", methods.PTuningSettings(encoder_size=8)),
    ],
)
def test_flags_of_each_method(trained: list[Any], flags: str, adapter: Any) -> None:
    assert run(*flags.split(), "--task", "sql", "--data", "d").exit_code == 0
    assert trained[0][0].adapter == adapter
    assert trained[0][0].out == "tasks/sql"


def test_flags_win_over_the_settings_file(trained: list[Any], in_directory: Path) -> None:
    (in_directory / "sql.yaml").write_text("method: qlora\ntask: sql\ndata: d\nrank: 3\nbatch-size: 9\n")
    assert run("--config", "sql.yaml", "--batch-size", "2").exit_code == 0
    assert run("dora", "--config", "sql.yaml").exit_code == 0
    (first, *_), (second, *_) = trained
    assert (first.adapter.rank, first.optimization.batch_size, first.adapter.use_dora) == (3, 2, False)
    assert (second.optimization.batch_size, second.adapter.use_dora) == (9, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "METHOD: must be given: one of lora, qlora"),
        ("magic --task t --data d", "METHOD: must be one of lora, qlora"),
        ("lora --data d", "--task: must be given"),
        ("lora --task t", "--data: must be given"),
        ("lora --task T --data d", "--task: 'T' is not a task name"),
        ("prefix --task t --data d --rank 4", "--rank: is not a setting of prefix, but of lora, qlora, dora"),
        ("lora --task t --data d --target-module q_proj --init text", "--init: is not a setting of lora"),
        ("lora --task t --data d --rank 0", "--rank: must be at least 1"),
        ("lora --task t --data d --schedule step", "--schedule: input should be 'linear'"),
        ("lora --task t --data d --rank-pattern q_proj", "--rank-pattern must be NAME=NUMBER"),
        (
            "lora --task t --data d --rank-pattern q_proj=x",
            "--rank-pattern.q_proj: must be a whole number",
        ),
        ("qlora --task t --data d --quantization none", "--quantization: qlora needs nf4"),
        ("prompt --task t --data d --init text", "--init-text: must be given"),
        ("lora --tasks tasks.yaml", "leave out METHOD and --config"),
        ("--tasks none.yaml", "--tasks: cannot read none.yaml"),
        ("lora --config none.yaml", "--config: cannot read none.yaml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(args: str, message: str) -> None:
    result = run(*args.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_wrong_task_of_a_file_is_named(in_directory: Path) -> None:
    (in_directory / "tasks.yaml").write_text("tasks:\n  - {task: sql, method: lora, data: d, rank: 0}\n")
    result = run("--tasks", "tasks.yaml")
    assert result.exit_code == 2
    assert result.stderr == "error: tasks[sql].rank: must be at least 1\n"


def test_a_wrong_value_of_a_settings_file_names_the_file_and_one_of_a_flag_does_not(
    in_directory: Path,
) -> None:
    (in_directory / "c.yaml").write_text("task: sql\ndata: train.jsonl\nrank: 0\n")
    result = run("lora", "--config", "c.yaml")
    assert (result.exit_code, result.stderr) == (2, "error: --config: c.yaml: rank: must be at least 1\n")
    result = run("lora", "--config", "c.yaml", "--rank", "-1")
    assert (result.exit_code, result.stderr) == (2, "error: --rank: must be at least 1\n")


def test_patterns_may_hold_equals_signs() -> None:
    (pattern,) = (each for each in SETTINGS if each.name == "rank_pattern")
    assert read_entries(pattern, "--x", ["a=b=3", "c=4"]) == {"a=b": "3", "c": "4"}


def test_variables_are_settings_and_named_where_they_are_wrong(
    trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHATS_RANK", "3")
    monkeypatch.setenv("MANYHATS_ALPHA_PATTERN", "a=b=2,c=1e-3")
    monkeypatch.setenv("MANYHATS_MAX_TASKS", "5")  # a server's
    assert run(*["lora", "--task", "t", "--data", "d", "--seed", "4"]).exit_code == 0
    ((settings, *_),) = trained
    assert (settings.adapter.rank, settings.optimization.seed) == (3, 4)
    assert settings.adapter.alpha_pattern == {"a=b": 2.0, "c": 1e-3}
    monkeypatch.setenv("MANYHATS_RANK", "0")
    result = run(*["lora", "--task", "t", "--data", "d"])
    assert (result.exit_code, result.stderr) == (2, "error: MANYHATS_RANK: must be at least 1\n")
    monkeypatch.setenv("MANYHATS_RANKS", "1")
    result = run(*["lora", "--task", "t", "--data", "d"])
    assert result.stderr == "error: MANYHATS_RANKS: is not a setting; did you mean MANYHATS_RANK?\n"


@pytest.mark.parametrize("method", METHODS)
def test_print_config_trains_nothing_and_can_be_trained_from(
    trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("data: d\nbatch-size: 3\nlearning-rate: 1e-5\n")
    monkeypatch.setenv("MANYHATS_SEED", "7")
    words = ["--config", str(file), "--task", "t"]
    result = run(method, *words, "--print-config")
    assert (result.exit_code, trained) == (0, [])
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"method: {method}  # METHOD", "task: t  # --task"]
    assert {"seed: 7  # MANYHATS_SEED", f"batch_size: 3  # {file}", "epochs: 1.0  # default"} <= set(lines)
    run(method, *words)
    monkeypatch.delenv("MANYHATS_SEED")
    file.write_text(result.stdout)
    run("--config", str(file))
    assert trained[0][0] == trained[1][0]


def test_print_config_is_of_one_training() -> None:
    result = run("--tasks", "tasks.yaml", "--print-config")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--print-config prints the settings of one task: leave out --tasks" in result.stderr


# Trainings


def test_a_training_leaves_the_artifact_and_prints_what_it_came_to(in_directory: Path) -> None:
    result = small("qlora", "--eval", "eval.jsonl")
    assert result.exit_code == 0, result.stderr
    assert (in_directory / "tasks/sql/adapter_model.safetensors").is_file()
    printed = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert printed["task"] == f"sql (lora, on {tiny_model()} in nf4)"
    assert printed["artifact"].startswith("tasks/sql (")
    assert printed["report"] == "tasks/sql/training/report.json"
    assert printed["held out"].endswith("(5 rows)")
    assert "step 2/2" in result.stderr


def test_json_is_the_report(in_directory: Path) -> None:
    result = small("prompt", "--json", "--out", "p")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["report"] == json.loads((in_directory / "p/training/report.json").read_bytes())
    assert (printed["out"], printed["registration"], printed["error"]) == ("p", None, None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--data", "bad.jsonl"], "bad.jsonl:2: "),
        (["--model", "nowhere"], "nowhere"),
        (["--learning-rate", "1e30", "--warmup-steps", "0", "--max-grad-norm", "0"], "is not finite"),
    ],
)
def test_a_failed_training_is_one_error_line(in_directory: Path, args: list[str], message: str) -> None:
    (in_directory / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    result = small("lora", *args)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr.splitlines()[-1]


FIRST_ROWS: dict[str, dict[str, object]] = {
    "half": {"prompt": "a"},
    "more": {"prompt": "a", "completion": "b", "topic": "c"},
    "light": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0.5},
        ]
    },
    "system": {"prompt": "a", "completion": "b", "system": "c"},
}
SERVER = ["--register", "127.0.0.1:1"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--data", "none.jsonl"], 1, "none.jsonl"),
        (["--eval", "none.jsonl"], 1, "none.jsonl"),
        (["--data", "half.jsonl"], 1, "half.jsonl:1: has a prompt but no completion"),
        (
            ["--data", "more.jsonl"],
            1,
            "more.jsonl:1: topic: nothing reads it; remove it, or give --ignore-fields",
        ),
        (["--data", "light.jsonl"], 1, "light.jsonl:1: messages[1].weight: must be 0 or 1"),
        (
            ["--data", "system.jsonl"],
            1,
            "system.jsonl:1: system: does not apply to a plain-text prompt; give --chat",
        ),
        (["--eval", "eval.jsonl", "--label", "x", "--label", "y"], 1, "'even' is not one of the 2 labels"),
        (["--init-from", "nowhere"], 2, "--init-from: nowhere: is not a directory"),
        (["--resume"], 1, "tasks/sql/training/checkpoints has no checkpoint to resume from"),
        (["--out", "mine"], 2, "--out: mine has notes.txt, which is not from a training run"),
        (["--register", "no port"], 2, "--register must be HOST:PORT, not 'no port'"),
        (
            ["--register", "127.0.0.1"],
            2,
            "--register must be HOST:PORT, as in 127.0.0.1:50051, not '127.0.0.1'",
        ),
        (["--no-activate"], 2, "--no-activate needs --register HOST:PORT"),
        (["--activate-if", "loss < 1"], 2, "--activate-if needs --register HOST:PORT"),
        ([*SERVER, "--no-activate", "--activate-if", "loss < 1"], 2, "contradict each other"),
        ([*SERVER, "--activate-if", "recall > 0.9"], 2, "--activate-if: 'recall' is not a metric"),
        ([*SERVER, "--activate-if", "f1 > 0.9"], 2, "--activate-if: f1 is not measured with head none"),
        ([*SERVER, "--activate-if", "loss < 1"], 2, "--activate-if: loss is measured on evaluation data"),
        (
            [*SERVER, "--eval", "eval.jsonl", "--activate-if", "accuracy > 0.9"],
            2,
            "--activate-if: accuracy is measured on labels",
        ),
    ],
)
def test_what_needs_no_base_is_refused_before_one_is_loaded(
    in_directory: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, message: str
) -> None:
    monkeypatch.setattr(
        "manyhats.cli.training.runs.load_model", lambda *args, **kwargs: pytest.fail("loaded")
    )
    (in_directory / "mine").mkdir()
    (in_directory / "mine" / "notes.txt").write_text("keep")
    for name, row in FIRST_ROWS.items():
        (in_directory / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    result = small("lora", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert not (in_directory / "tasks").exists()
    assert [path.name for path in (in_directory / "mine").iterdir()] == ["notes.txt"]


def test_a_training_in_place_of_another_says_so(in_directory: Path) -> None:
    notice = "sql: the artifact in tasks/sql will be replaced"
    assert notice not in small("lora").stderr
    assert notice in small("ia3").stderr


def test_the_artifact_is_registered(fake: FakeServer, in_directory: Path) -> None:
    result = small("lora", "--register", fake.target, "--token", "secret")
    assert result.exit_code == 0, result.stderr
    assert fake.last_request.task_id == "sql"
    assert set(fake.authorizations) == {"Bearer secret"}
    sent = bytes(fake.uploaded["adapter_model.safetensors"])
    assert sent == (in_directory / "tasks/sql/adapter_model.safetensors").read_bytes()
    assert f"registered: sql@3 (active, sha256:{3:064x})" in result.stdout


def test_a_head_is_registered_with_the_names_of_its_classes(fake: FakeServer, in_directory: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in (("x", "dry"), ("y", "wet"))]
    (in_directory / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 4 * rows))
    flags = ["--data", "texts.jsonl", "--eval", "texts.jsonl", "--head", "classification", "--activate-if"]
    result = small("lora", *flags, "f1 >= 0", "--register", fake.target)
    assert result.exit_code == 0, result.stderr
    assert dict(fake.last_request.labels) == {"class.0": "dry", "class.1": "wet"}
    assert fake.last_request.activate
    assert re.search(r"held out: loss [0-9.]+, accuracy [0-9.]+%, f1 [0-9.]+% \(8 rows\)", result.stdout)


def test_a_small_base_in_four_bits_is_said_to_differ_from_what_is_served(in_directory: Path) -> None:
    (in_directory / "texts.jsonl").write_text('{"query": "x", "positive": "y"}\n' * 4)
    asked = ["--head", "embedding", "--data", "texts.jsonl"]
    said = small("qlora", *asked).stderr
    assert "note: the base is in NF4, but a server keeps this one dense unless told otherwise" in said
    assert "serve it with --quantization nf4, or train with --quantization none" in said
    for method in ("lora", "ia3"):
        result = small(method, *asked)
        assert "note: the base" not in result.stderr
        assert "in nf4" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("condition", "unmet"),
    [
        ([], ""),
        (["--no-activate"], ""),
        (["--activate-if", "perplexity > 1"], ""),
        (["--activate-if", "loss < 0.001"], "loss [0-9.]+, not < 0.001"),
    ],
)
def test_what_is_registered_is_activated_only_if_that_is_wanted_and_its_results_are_good_enough(
    fake: FakeServer, condition: list[str], unmet: str
) -> None:
    result = small("lora", "--eval", "eval.jsonl", "--register", fake.target, *condition)
    assert result.exit_code == 0, result.stderr
    is_wanted = condition != ["--no-activate"]
    assert fake.last_request.activate == (is_wanted and not unmet)
    lines = [line for line in result.stdout.splitlines() if line.startswith("not activated")]
    assert len(lines) == bool(unmet)
    assert re.search(unmet, " ".join(lines))


def test_a_failed_registration_keeps_the_artifact_and_says_where(in_directory: Path) -> None:
    result = small("lora", "--register", "127.0.0.1:1", "--json")
    assert result.exit_code == 1
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("warning: ")
    assert "cannot reach the server at 127.0.0.1:1" in first
    assert last.startswith("error: cannot reach the server at 127.0.0.1:1")
    assert "the artifact is in tasks/sql" in last
    assert (in_directory / "tasks/sql/adapter_config.json").is_file()
    assert json.loads(result.stdout)["report"]["task"] == "sql"


TASKS = """
batch_size: 4
max_steps: 2
dtype: float32
device: cpu
data: train.jsonl
tasks:
  - {task: one, method: lora, rank: 2}
  - {task: two, method: prompt, num-virtual-tokens: 2}
"""


@pytest.mark.parametrize("is_uniform", [True, False])
def test_a_task_that_answers_with_labels_is_registered_with_them(
    fake: FakeServer, in_directory: Path, is_uniform: bool
) -> None:
    if not is_uniform:
        rows = [
            {"prompt": "1: ", "completion": "odd", "system": "Be brief."},
            {"prompt": "2: ", "completion": "even"},
        ]
        (in_directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = small("lora", "--chat", "--eval", "eval.jsonl", "--label", "auto", "--register", fake.target)
    assert result.exit_code == 0, result.stderr
    defaults = {"default.temperature": "0", "default.max_tokens": "5"}
    classes = {"class.0": "even", "class.1": "odd"}
    note = "note: sql is registered without classes: its prompts are made in several ways"
    assert dict(fake.last_request.labels) == (defaults | classes if is_uniform else defaults)
    assert (note in result.stderr) == (not is_uniform)


def test_several_tasks_are_trained_and_registered(fake: FakeServer, in_directory: Path) -> None:
    (in_directory / "tasks.yaml").write_text(TASKS)
    result = run("--tasks", "tasks.yaml", "--model", str(tiny_model()), "--register", fake.target, "--json")
    assert result.exit_code == 0, result.stderr
    tasks = json.loads(result.stdout)["tasks"]
    assert [each["task"] for each in tasks] == ["one", "two"]
    assert [each["report"]["method"] for each in tasks] == ["lora", "prompt_tuning"]
    assert [each["registration"]["adapter"]["task_id"] for each in tasks] == ["one", "two"]
    assert (in_directory / "tasks/two/adapter_config.json").is_file()


def test_one_of_several_tasks_that_fails_is_reported_and_the_others_are_there(in_directory: Path) -> None:
    (in_directory / "tasks.yaml").write_text(f"{TASKS}  - {{task: three, method: ia3, data: none.jsonl}}\n")
    result = run("--tasks", "tasks.yaml", "--model", str(tiny_model()))
    assert result.exit_code == 1
    assert "error: three: none.jsonl: " in result.stderr
    assert result.stderr.splitlines()[-1] == "error: 1 of 3 tasks failed: three"
    assert [line for line in result.stdout.splitlines() if line.startswith("task: ")] == [
        f"task: one (lora, on {tiny_model()})",
        f"task: two (prompt tuning, on {tiny_model()})",
    ]


# Dry runs


def test_a_dry_run_prints_the_parts_and_trains_nothing(in_directory: Path) -> None:
    result = small("lora", "--dry-run")
    assert result.exit_code == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert head == "memory of the process\tbytes\tshare"
    parts = [line.split("\t")[0] for line in lines]
    assert {"runtime", "base: linears", "adapter", "optimizer", "total"} <= set(parts)
    assert "sql: 32.8 k trained parameters" in result.stdout
    assert not (in_directory / "tasks").exists()


def test_a_dry_run_needs_only_a_config(in_directory: Path) -> None:
    config = in_directory / "big.json"
    config.write_text((tiny_model() / "config.json").read_text())
    result = run("qlora", "--model", str(config), "--max-length", "100", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["total_bytes"] == sum(printed["parts"].values())
    assert printed["tasks"][0]["batch"]["num_tokens"] == 16 * 100
    assert any("tokenizer" in note for note in printed["notes"])


def test_a_dry_run_of_several_tasks_counts_each_adapter(in_directory: Path) -> None:
    (in_directory / "tasks.yaml").write_text(TASKS)
    result = run("--tasks", "tasks.yaml", "--model", str(tiny_model()), "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    trained = [task["trained_parameters"] for task in printed["tasks"]]
    assert printed["parts"]["adapter"] == 4 * sum(trained)


def test_a_dry_run_of_a_model_that_is_not_there() -> None:
    result = run("lora", "--model", "nowhere", "--dry-run")
    assert result.exit_code == 1
    assert "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("lora --data none.jsonl", 1, "none.jsonl: cannot be read: No such file"),
        ("lora --data train.jsonl --eval none.jsonl", 1, "none.jsonl: cannot be read: No such file"),
        ("lora --data train.jsonl --eval pipe.jsonl", 1, "pipe.jsonl: is not a regular file"),
        ("lora --data train.jsonl --eval eval.jsonl --label odd", 1, "'even' is not the one label"),
        ("lora --label odd", 2, "--label: need evaluation data; give --eval"),
        ("lora --patience 2", 2, "--patience: early stopping needs evaluation data"),
        (
            "lora --rank-pattern nonsense=3",
            2,
            "--rank-pattern: 'nonsense' matches none of the trained modules",
        ),
        ("lora --epochs 1e30", 2, "--epochs: must be at most 10000"),
        ("lora --batch-size 99999999999999999999999", 2, "--batch-size: must be at most 2147483647"),
        ("bottleneck --reduction-factor 65", 2, "--reduction-factor: is 65, above the base's hidden size 64"),
        ("bottleneck --non-linearity step", 2, "--non-linearity: 'step' is not an activation that is served"),
        ("prompt --init-text Say:", 2, "--init-text: only applies to init text"),
        ("lora --model /nonexisting", 1, "/nonexisting: there is no such file or directory"),
        ("lora --model thin.json", 1, "thin.json: has no vocab_size"),
        ("lora --config twice.yaml", 2, "--config: twice.yaml:2: seed: is given twice"),
        ("lora --config odd.yaml", 2, "--config: odd.yaml: foo: is not a setting"),
    ],
)
def test_a_dry_run_refuses_what_a_training_would(
    in_directory: Path, args: str, code: int, message: str
) -> None:
    os.mkfifo(in_directory / "pipe.jsonl")
    config = json.loads((tiny_model() / "config.json").read_bytes())
    (in_directory / "thin.json").write_text(json.dumps({**config, "vocab_size": None}))
    (in_directory / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (in_directory / "odd.yaml").write_text("foo: 1\n")
    result = run("--model", str(tiny_model()), "--device", "cpu", *args.split(), "--dry-run")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
