"""Help, wrong usage, and the commands that need the server's packages."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.lowering.lowering import ADAPTERHUB_METHODS, METHODS
from manyhats.cli import model
from manyhats.cli.adapters import register as adapter_register
from manyhats.cli.main import app
from manyhats.cli.options.common import DEFAULT_SERVER
from manyhats.cli.options.settings import read_entries
from manyhats.cli.terminal.extras import needs_extra
from manyhats.cli.terminal.failures import CommandError
from manyhats.cli.terminal.output import human_bytes, human_count
from manyhats.cli.terminal.progress import amount
from manyhats.client import DEFAULT_TARGET
from manyhats.server.lifetime.config import SETTINGS
from manyhats.settings.declaration import values_of
from manyhats.settings.sizes import parse_size

COMMANDS = [
    ["serve"],
    ["doctor"],
    ["generate"],
    ["chat"],
    ["score"],
    ["embed"],
    ["classify"],
    ["tag"],
    ["rerank"],
    ["info"],
    ["adapters", "register"],
    ["adapters", "upload"],
    ["adapters", "list"],
    ["adapters", "show"],
    ["adapters", "activate"],
    ["adapters", "delete"],
    ["adapters", "inspect"],
    ["adapters", "convert"],
    ["adapters", "verify"],
    ["adapters", "gc"],
    ["adapters", "export"],
    ["model", "fetch"],
    ["model", "info"],
]


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), prog_name="manyhats")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example_of_the_command(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"$ manyhats {' '.join(command)}" in result.stdout
    assert "Examples" in result.stdout


METHOD_NAMES = {
    AdapterMethod.LORA: "LoRA",
    AdapterMethod.DORA: "DoRA",
    AdapterMethod.ADALORA: "AdaLoRA",
    AdapterMethod.VERA: "VeRA",
    AdapterMethod.IA3: "IA3",
    AdapterMethod.BOTTLENECK: "bottleneck adapters",
    AdapterMethod.PREFIX_TUNING: "prefix tuning",
    AdapterMethod.PROMPT_TUNING: "prompt tuning",
    AdapterMethod.P_TUNING: "P-tuning",
    AdapterMethod.MULTITASK_PROMPT_TUNING: "multitask prompt tuning",
    AdapterMethod.TRAINABLE_TOKENS: "trainable tokens",
    AdapterMethod.UNION: "unions",
    AdapterMethod.REFT: "ReFT",
}


@pytest.mark.parametrize("command", ["register", "upload"])
def test_help_names_every_format_and_method_that_is_served(command: str) -> None:
    text = " ".join(run("adapters", command, "--help").stdout.split())
    peft, _, adapterhub = text.partition("A directory as AdapterHub's adapters saves it")
    assert "A directory as PEFT saves it" in peft
    for methods, part in ((METHODS, peft), (ADAPTERHUB_METHODS, adapterhub)):
        for method in methods:
            assert METHOD_NAMES[method] in part


@pytest.mark.parametrize("group", [[], ["adapters"], ["model"]], ids=str)
def test_group_without_a_command_shows_help_and_fails(group: list[str]) -> None:
    result = run(*group)
    assert result.exit_code == 2
    assert "Usage: manyhats" in result.stdout


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("manyhats ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["score"], "Missing argument 'PROMPT' (see `manyhats score --help`)"),
        (["generate"], "give either PROMPT or --file"),
        (["generate", "hi", "--top-k", "many"], "--top-k"),
        (["generate", "hi", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["adapters", "register", "sql", "/x", "--label", "team"], "--label must be KEY=VALUE"),
        (["adapters", "register", "sql"], "give either PATH or --part"),
        (["adapters", "register", "sql", "/x", "--part", "/y"], "give either PATH or --part"),
        (["adapters", "register", "sql", "--part", "=2"], "--part must be PATH or PATH=WEIGHT"),
        (["adapters", "register", "sql", "--part", "/x=nan"], "--part must be PATH or PATH=WEIGHT"),
        (["adapters", "gc", "--older-than", "-1"], "--older-than"),
        (["serve", "--register", "sql"], "--register must be TASK=PATH"),
        (["serve", "--register", "a=x", "--register", "a=y"], "names a twice"),
        (["serve", "--grpc-port", "99999"], "--grpc-port"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(args: list[str], message: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_unreachable_server_is_a_clear_line() -> None:
    result = run("generate", "hi", "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot reach the server at 127.0.0.1:1: Connection refused")
    assert result.stderr.endswith("; is `manyhats serve` running there?\n")


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_package_nobody_has", None)
    with (
        pytest.raises(CommandError, match=r"pip install -c constraints\.txt --editable '\.\[server\]' in "),
        needs_extra("server"),
    ):
        importlib.import_module("a_package_nobody_has.part")


def test_a_missing_module_of_our_own_is_not_taken_for_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError), needs_extra("server"):
        importlib.import_module("manyhats.nowhere")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the server's process; what it would have been started with."""
    configs: list[Any] = []

    async def fake_serve(config: Any, **_: Any) -> int:
        configs.append(SimpleNamespace(**values_of(config)))
        return 3

    monkeypatch.setattr("manyhats.server.lifetime.process.serve", fake_serve)
    return configs


def test_serve_passes_every_flag_and_the_exit_code(served: list[Any], tmp_path: Path) -> None:
    flags = f"""
        --model tiny --base-name org/tiny --device cpu --dtype float32 --quantization none
        --store {tmp_path} --adapter-root {tmp_path} --adapter-root /adapters
        --register sql={tmp_path}/sql --register tldr=x=y
        --catalogue sqlite:////x/c.db --store-cache /cache --store-cache-bytes 5 --store-poll-s 0.25
        --adapter-url-prefix s3://a/ --adapter-url-prefix https://b/c/
        --max-artifact-bytes 11 --max-adapter-rank 12 --max-virtual-tokens 13 --max-parts 14 --max-tasks 15
        --max-versions-per-task 16 --max-bytes-per-task 17 --max-bytes 18 --max-transfers 19
        --host 0.0.0.0 --insecure --grpc-port 0 --http-port 1
        --max-context-length 99 --max-sequences 3 --max-batched-tokens 64 --kv-cache-bytes 1000000
        --kv-cache-dtype float32 --max-adapters 7 --max-waiting 8 --num-threads 1
        --max-bulk-tokens 6 --max-score-tokens 5
        --log-level debug --log-format json
    """
    make_adapter_files(tmp_path / "sql", "adapter_config.json", "adapter_model.safetensors")
    make_adapter_files(tmp_path / "x=y", "adapter_config.json", "adapter_model.safetensors")
    assert run("serve", *flags.split()).exit_code == 3
    (config,) = served
    assert (config.model, config.store) == ("tiny", str(tmp_path))
    assert (config.catalogue, config.store_cache) == ("sqlite:////x/c.db", Path("/cache"))
    assert (config.store_cache_bytes, config.store_poll_s) == (5, 0.25)
    assert config.adapter_url_prefixes == ("s3://a/", "https://b/c/")
    assert (config.max_artifact_bytes, config.max_adapter_rank) == (11, 12)
    assert (config.max_virtual_tokens, config.max_parts, config.max_tasks) == (13, 14, 15)
    assert (config.max_versions_per_task, config.max_bytes_per_task) == (16, 17)
    assert (config.max_bytes, config.max_transfers) == (18, 19)
    assert config.adapter_roots == (tmp_path, Path("/adapters"))
    assert dict(config.register) == {"sql": f"{tmp_path}/sql", "tldr": "x=y"}
    assert config.base_names == ("org/tiny",)
    assert (config.host, config.insecure, config.grpc_port, config.http_port) == ("0.0.0.0", True, 0, 1)
    assert (config.device, config.dtype, config.quantization) == ("cpu", "float32", "none")
    assert (config.max_context_length, config.max_sequences, config.max_batched_tokens) == (99, 3, 64)
    assert (config.kv_cache_bytes, config.kv_cache_dtype) == (1000000, "float32")
    assert (config.max_adapters, config.max_waiting, config.num_threads) == (7, 8, 1)
    assert (config.max_bulk_tokens, config.max_score_tokens) == (6, 5)
    assert (config.log_level, config.log_format) == ("debug", "json")


def test_flags_win_over_the_settings_file(served: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    make_adapter_files(tmp_path / "b", "adapter_config.json", "adapter_model.safetensors")
    file.write_text(
        f"model: tiny\nstore: s\nadapter-root: [{tmp_path}]\ngrpc-port: 7\nhttp_port: 8\n"
        f"register: {{sql: {tmp_path}/b}}\n"
    )
    run("serve", "--config", str(file), "--grpc-port", "9")
    (config,) = served
    assert (config.model, config.grpc_port, config.http_port) == ("tiny", 9, 8)
    assert config.adapter_roots == (tmp_path,)
    assert dict(config.register) == {"sql": f"{tmp_path}/b"}


def test_a_settings_file_takes_register_as_the_flag_does(served: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    make_adapter_files(tmp_path / "b", "adapter_config.json", "adapter_model.safetensors")
    file.write_text(f"adapter-root: [{tmp_path}]\nregister: [sql={tmp_path}/b, 'a={tmp_path}/b']\n")
    run("serve", "--config", str(file))
    (config,) = served
    assert dict(config.register) == {"sql": f"{tmp_path}/b", "a": f"{tmp_path}/b"}


def test_flags_left_out_take_the_defaults_shown_in_the_help(served: list[Any]) -> None:
    run("serve")
    (config,) = served
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    shown = {
        param.name: param.show_default for param in command.params if isinstance(param.show_default, str)
    }
    computed = {"max_context_length", "store", "catalogue", "store_cache", "metrics_port"}
    computed |= {"insecure", "http_insecure", "openai_lenient", "page", "kv_cache_bytes", "gpu_adapter_bytes"}
    unbounded = {name: "no limit" for name in shown if shown[name] == "no limit"}
    assert all(getattr(config, name) is None for name in unbounded)
    computed |= unbounded.keys()
    assert len(shown) > len(computed)
    assert {name: str(getattr(config, name)) for name in shown.keys() - computed} == {
        name: str(parse_size(text)) if "bytes" in name.split("_") else text
        for name, text in shown.items()
        if name not in computed
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: m\nstore: s\ncolour: red\n", "server.yaml: colour: is not a setting\n"),
        ("model: m\nstore: s\nadapter_root: 7\n", "server.yaml: adapter_root: must be a list, not 7\n"),
        ("grpc-port: x\n", "server.yaml: grpc_port: must be a whole number"),
        ("register: 7\n", "server.yaml: register: must be a list of TASK=PATH, or a mapping"),
        ("register: [sql]\n", "server.yaml: register must be TASK=PATH, not 'sql'\n"),
        ("register: [a=b, a=c]\n", "server.yaml: register names a twice\n"),
        ("register: {sql: [1]}\n", "server.yaml: register: must be a list of TASK=PATH, or a mapping"),
        ("- a\n", "--config"),
    ],
)
def test_bad_settings_file(served: list[Any], tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(content)
    result = run("serve", "--config", str(file))
    assert (result.exit_code, served) == (2, [])
    assert message in result.stderr


def test_print_config_serves_nothing_and_can_be_served_from(
    served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHATS_MAX_TASKS", "5")
    file = tmp_path / "server.yaml"
    file.write_text("store: s\ngrpc-port: 7\nhttp-port: 8\nadapter-root: [/a]\nkv_cache_bytes: 3MiB\n")
    result = run("serve", "--config", str(file), "--http-port", "9", "--print-config")
    assert (result.exit_code, served) == (0, [])
    lines = result.stdout.splitlines()
    assert f"grpc_port: 7  # {file}" in lines
    assert f"adapter_roots: [/a]  # {file}" in lines
    assert f"kv_cache_bytes: 3MiB  # {file}" in lines
    assert "http_port: 9  # --http-port" in lines
    assert "max_tasks: 5  # MANYHATS_MAX_TASKS" in lines
    assert "max_waiting: 1024  # default" in lines
    monkeypatch.delenv("MANYHATS_MAX_TASKS")
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    run("serve", "--config", str(printed))
    monkeypatch.setenv("MANYHATS_MAX_TASKS", "5")
    run("serve", "--config", str(file), "--http-port", "9")
    assert served[0] == served[1]


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ("", {"MANYHATS_GRPC_PORT": "x"}, "MANYHATS_GRPC_PORT: must be a whole number"),
        ("", {"MANYHATS_GRPC_PORT": "-1"}, "MANYHATS_GRPC_PORT: must be in [0, 65535], not -1\n"),
        ("--grpc-port -2", {"MANYHATS_GRPC_PORT": "-1"}, "--grpc-port: must be in [0, 65535], not -2\n"),
        ("--max-sequences 0", {}, "--max-sequences: must be at least 1, not 0\n"),
        ("--max-bytes 1G", {}, "--max-bytes: must be a size such as 1GiB"),
        (
            "--max-batched-tokens 7",
            {},
            "--max-batched-tokens: must be at least max_num_sequences = 64, not 7",
        ),
        ("", {"MANYHATS_REGISTER": "sql"}, "MANYHATS_REGISTER must be TASK=PATH, not 'sql'\n"),
        ("", {"MANYHATS_INSECURE": "perhaps"}, "MANYHATS_INSECURE: must be true or false, not 'perhaps'"),
        ("", {"MANYHATS_HOST": "::"}, "MANYHATS_HOST: :: can be reached by other machines"),
        (
            "",
            {"MANYHATS_MAX_TASK": "1"},
            "MANYHATS_MAX_TASK: is not a setting; did you mean MANYHATS_MAX_TASKS?",
        ),
        ("", {"MANYHATS_CONFIG": "none.yaml"}, "--config: cannot read none.yaml"),
        ("--tls-cert c", {}, "--tls-key: certificate and key must be given together"),
    ],
)
def test_a_wrong_setting_is_named_by_what_gives_it(
    served: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run("serve", *flags.split())
    assert (result.exit_code, served) == (2, [])
    assert result.stderr.startswith(f"error: {message}")


def test_a_file_that_has_a_setting_twice_is_refused_with_the_line(served: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("grpc_port: 1\n\ngrpc_port: 2\n")
    result = run("serve", "--config", str(file))
    assert (result.exit_code, served) == (2, [])
    assert result.stderr == f"error: --config: {file}:3: grpc_port: is given twice\n"


MISSPELT = {
    "modle": "model",
    "grpc_prot": "grpc_port",
    "grpc-prot": "grpc_port",
    "http_ports": "http_port",
    "max_sequence": "max_sequences",
    "maxsequences": "max_sequences",
    "MODEL": "model",
    "quantisation": "quantization",
    "log_fromat": "log_format",
    "kv_cache_byte": "kv_cache_bytes",
    "adapters_root": "adapter_roots",
    "tls_certificate": "tls_cert",
    "token_files": "token_file",
    "num_thread": "num_threads",
    "max_waitings": "max_waiting",
    "drain_limit": "drain_limit_s",
    "store_poll": "store_poll_s",
    "catalog": "catalogue",
    "registers": "register",
    "hosts": "host",
    "devices": "device",
    "xyzzy": "",
}


@pytest.mark.parametrize(("key", "near"), MISSPELT.items())
def test_unknown_key_of_a_settings_file_is_named_with_the_file_and_the_nearest(
    served: list[Any], tmp_path: Path, key: str, near: str
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(f"store: s\n{key}: 1\n")
    result = run("serve", "--config", str(file))
    assert (result.exit_code, served) == (2, [])
    hint = f"; did you mean {near}?" if near else ""
    assert result.stderr == f"error: --config: {file}: {key.replace('-', '_')}: is not a setting{hint}\n"


REFUSED_SOURCES = {
    "missing": "nothing is there",
    "file": "is not a directory",
    "empty": "adapter_config.json: is missing",
    "no-weights": "adapter_model.safetensors: is missing",
    "pickle": "adapter_model.bin",
    "link-out": "adapter_config.json: is a",
    "pipe": "adapter_model.safetensors: is a pipe",
    "../outside": "lies outside the allowed roots",
    "/nowhere": "lies outside the allowed roots",
    "s3://bucket/sql": "lies outside the allowed URL prefixes",
    "ftp:sql": "the scheme 'ftp' is not served",
    "nested": "adapter_config.json: is missing",
    "large": "has 2000000 bytes; the limit is 1048576",
    "large-template": "has 2000000 bytes; the limit is 1048576",
}


def make_adapter_files(directory: Path, *names: str) -> None:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_text("{}")


@pytest.fixture
def adapter_root(tmp_path: Path) -> Path:
    """Directories that are no adapters, each in its own way, and one that is."""
    root, config, weights = tmp_path / "root", "adapter_config.json", "adapter_model.safetensors"
    make_adapter_files(tmp_path / "outside", config, weights)
    make_adapter_files(root / "sql", config, weights)
    make_adapter_files(root / "hub", config, "adapter.safetensors")
    make_adapter_files(root / "empty")
    make_adapter_files(root / "no-weights", config)
    make_adapter_files(root / "pickle", config, "adapter_model.bin")
    make_adapter_files(root / "link-out", weights)
    (root / "link-out" / config).symlink_to(tmp_path / "outside" / config)
    make_adapter_files(root / "pipe", config)
    os.mkfifo(root / "pipe" / weights)
    make_adapter_files(root / "nested" / "checkpoint-1", config, weights)
    make_adapter_files(root / "large", weights)
    (root / "large" / config).write_text(" " * 2_000_000)
    make_adapter_files(root / "large-template", config, weights)
    (root / "large-template" / "chat_template.jinja").write_text(" " * 2_000_000)
    (root / "file").write_text("{}")
    return root


@pytest.mark.parametrize("source", REFUSED_SOURCES)
@pytest.mark.parametrize("absolute", [True, False])
def test_what_cannot_be_registered_at_start_is_refused_before_anything_is_loaded(
    served: list[Any], adapter_root: Path, source: str, absolute: bool
) -> None:
    path = str(adapter_root / source) if absolute and ":" not in source else source
    result = run("serve", "--adapter-root", str(adapter_root), "--register", f"sql={path}")
    assert (result.exit_code, served) == (2, [])
    assert result.stderr.startswith("error: --register: sql: ")
    assert path in result.stderr
    expected = (
        "no allowed root has this directory; `manyhats adapters upload`"
        if path == "missing"
        else REFUSED_SOURCES[source]
    )
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("source", ["sql", "hub", "./sql", "{root}/sql", "file://{root}/hub"])
def test_what_can_be_registered_at_start_is_only_looked_at(
    served: list[Any], adapter_root: Path, source: str
) -> None:
    path = source.format(root=adapter_root)
    assert run("serve", "--adapter-root", str(adapter_root), "--register", f"a={path}").exit_code == 3
    assert [dict(config.register) for config in served] == [{"a": path}]


def test_registering_without_a_root_says_how_to_name_one(served: list[Any], adapter_root: Path) -> None:
    result = run("serve", "--register", f"sql={adapter_root / 'sql'}")
    assert (result.exit_code, served) == (2, [])
    assert "--adapter-root names a directory" in result.stderr


def test_model_fetch_reports_progress_and_prints_the_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(alias: str, home: Path, progress: Any) -> Path:
        for done in range(3):
            progress("download", done, 2)
        return home / alias

    monkeypatch.setattr("manyhats.engine.checkpoints.fetch.fetch_model", fetch)
    result = run("model", "fetch", "--home", str(tmp_path))
    assert (result.exit_code, result.stderr) == (0, "download ...\n")
    assert result.stdout == f"{tmp_path / model.DEFAULT_MODEL}\n"


def test_model_fetch_of_an_unknown_model_fails(tmp_path: Path) -> None:
    result = run("model", "fetch", "nosuchmodel", "--home", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nosuchmodel" in result.stderr


TINY_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LINEARS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
OTHERS = 100 * 64 + 64 * (2 * 2 + 1)


def test_model_info_counts_parameters_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1500)
    found = json.loads(run("model", "info", str(tmp_path), "--json").stdout)
    assert found["num_parameters"] == LINEARS + OTHERS
    assert found["nf4_bytes"] == round(LINEARS * (0.5 + 1 / 64 + 1 / 4096)) + 2 * OTHERS
    assert (found["size_bytes"], found["max_context_length"], found["quantization"]) == (1500, 512, "none")
    assert found["path"] == str(tmp_path)
    assert "size on disk: 1.5 kB" in run("model", "info", str(tmp_path)).stdout.splitlines()


def test_model_info_fetches_nothing(tmp_path: Path) -> None:
    result = run("model", "info", "--home", str(tmp_path))
    assert result.exit_code == 1
    assert "`manyhats model fetch smollm2-135m-instruct` gets it" in result.stderr


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (269_000_000, "269 MB"),
        (1.5e9, "1.5 GB"),
        (2e15, "2000.0 TB"),
    ],
)
def test_human_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (134_515_008, "135 M"), (8_030_000_000, "8.0 G")])
def test_human_count(count: float, text: str) -> None:
    assert human_count(count) == text


def test_progress_amounts() -> None:
    assert amount("quantize", 12, 210) == "12 / 210"
    assert amount("download", 1_500_000, 90_000_000) == "1.5 MB / 90.0 MB"
    assert amount("download", 5, 0) == "5 B"


def test_default_server_is_the_clients() -> None:
    assert DEFAULT_SERVER == DEFAULT_TARGET


def test_labels_and_registrations_may_hold_equals_signs() -> None:
    assert adapter_register.parse_labels(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    (register,) = (each for each in SETTINGS if each.name == "register")
    assert read_entries(register, "--register", ["sql=/x=y"]) == {"sql": "/x=y"}
