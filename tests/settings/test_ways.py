"""Every setting of a server and of a training, by each way that it may be given: one meaning, and one order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyhats.cli.main import app
from manyhats.cli.options.settings import Given
from manyhats.server.lifetime.config import SETTINGS as SERVE
from manyhats.server.lifetime.config_file import make_config, read_file
from manyhats.settings.declaration import Setting, values_of
from manyhats.settings.printing import config_text
from manyhats.settings.sizes import size_text
from manyhats.trainer.settings.settings import SETTINGS as TRAIN
from manyhats.trainer.settings.settings_file import METHODS, make_settings, method_of
from manyhats.trainer.settings.settings_file import read_file as read_train_file

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NAMES = st.text("abcdefgh_0123456789", min_size=1, max_size=6).map("n{}n".format)
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters=",="), min_size=1
)
FLOATS = st.floats(0.001, 0.9)
SPECIAL: Mapping[str, st.SearchStrategy[Any]] = {
    "catalogue": NAMES.map("postgresql://host/{}".format),
    "adapter_url_prefixes": st.lists(NAMES.map("s3://{}/".format), min_size=1, max_size=3),
    "cors_origins": st.lists(NAMES.map("https://{}.example".format), min_size=1, max_size=3),
    "grpc_port": st.integers(0, 7999),
    "http_port": st.integers(0, 50050),
    "max_sequences": st.integers(1, 256),
    "max_batched_tokens": st.integers(64, 9999),
    "task": NAMES,
    "non_linearity": st.sampled_from(["relu", "gelu", "silu"]),
    "quantization": st.just("nf4"),
    "epochs": st.floats(0.5, 9),
    "init": st.sampled_from(["vocabulary", "random"]),
}
# What a setting needs besides, wherever it is given.
NEEDS: Mapping[str, dict[str, Any]] = {
    "host": {"insecure": True},
    "tls_cert": {"tls_key": "/key"},
    "tls_key": {"tls_cert": "/cert"},
    "tls_client_ca": {"tls_key": "/key", "tls_cert": "/cert"},
    "labels": {"eval": "held-out"},
    "patience": {"eval": "held-out"},
    "init_text": {"init": "text"},
    "pooling": {"head": "embedding"},
    "temperature": {"head": "embedding"},
}
WAYS = [pytest.param("serve", each, id=f"serve-{each.name}") for each in SERVE]
WAYS += [pytest.param("train", each, id=f"train-{each.name}") for each in TRAIN]
QUICK = settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def values_for(each: Setting) -> st.SearchStrategy[Any]:
    """Values as a file has them."""
    if each.name in SPECIAL:
        return SPECIAL[each.name]
    if each.choices:
        return st.sampled_from(each.choices)
    least = int(each.declared.at_least or 0)
    numbers = st.integers(max(least, 2), least + 4000)
    if each.declared.unit == "bytes":
        return numbers | numbers.map(lambda size: size_text(size << 20))
    by_kind = {bool: st.booleans(), int: numbers, float: FLOATS.map(lambda x: x + least)}
    if each.kind is tuple:
        return st.lists(NAMES, min_size=1, max_size=3)
    if each.is_mapping:
        return st.dictionaries(NAMES, numbers if "dict" in str(each.type) else NAMES, min_size=1, max_size=2)
    return by_kind.get(each.kind, TEXTS)


def texts(each: Setting, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{key}={part}" for key, part in value.items()]
    return [str(part) for part in value] if isinstance(value, list) else [str(value)]


def words(each: Setting, value: Any) -> list[str]:
    """The flags that give a value."""
    if each.kind is bool:
        return [f"--{each.flag}" if value else f"--no-{each.flag}"]
    return [f"--{each.flag}={text}" for text in texts(each, value)]


class Command:
    """A command's settings from what its line, the environment and a file say."""

    def __init__(self, name: str, base: Mapping[str, Any], file: Path) -> None:
        self.settings = {"serve": SERVE, "train": TRAIN}[name]
        self._command = COMMANDS[name]
        self._name = name
        self._file = file
        self._base = base

    def given(self, flags: list[str], environment: Mapping[str, str]) -> Given:
        context = self._command.make_context(self._name, list(flags))
        values = {each.name: context.params[each.name] for each in self.settings}
        return Given.of(
            self.settings,
            {name: value for name, value in values.items() if value not in (None, (), [])},
            environment,
        )

    def made(
        self,
        in_file: Mapping[str, Any] = {},
        flags: list[str] = [],  # noqa: B006
        environment: Mapping[str, str] = {},
    ) -> Any:
        self._file.write_text(yaml.safe_dump({**self._base, **in_file}, allow_unicode=True))
        read: Callable[[Path], dict[str, Any]] = read_file if self._name == "serve" else read_train_file
        make: Callable[[Mapping[str, Any]], Any] = make_config if self._name == "serve" else make_settings
        return make({**read(self._file), **self.given(flags, environment).values})


def method_with(name: str) -> str:
    return next((method for method in METHODS if name in METHODS[method].names), "qlora")


def command_for(name: str, each: Setting, tmp_path: Path) -> Command:
    base = {"store": "/store", **NEEDS.get(each.name, {})}
    if name == "train":
        base = {"method": method_with(each.name), "task": "t", "data": "d", **NEEDS.get(each.name, {})}
    return Command(name, base, tmp_path / "file.yaml")


@pytest.mark.parametrize(("name", "each"), WAYS)
@QUICK
@given(data=st.data())
def test_flag_variable_and_file_mean_the_same(
    name: str, each: Setting, tmp_path: Path, data: st.DataObject
) -> None:
    command = command_for(name, each, tmp_path)
    value = data.draw(values_for(each))
    by_file = command.made({each.name: value})
    assert command.made(flags=words(each, value)) == by_file
    assert command.made(environment={each.variable: ",".join(texts(each, value))}) == by_file
    assert command.made({each.flag: value}) == by_file
    assert values_of(by_file)[each.name] is not None


@pytest.mark.parametrize(("name", "each"), WAYS)
@QUICK
@given(data=st.data())
def test_flags_win_over_variables_and_they_over_files(
    name: str, each: Setting, tmp_path: Path, data: st.DataObject
) -> None:
    command = command_for(name, each, tmp_path)
    first, second, third = (data.draw(values_for(each)) for _ in range(3))
    variable = {each.variable: ",".join(texts(each, second))}
    everywhere = command.made({each.name: third}, words(each, first), variable)
    assert everywhere == command.made({each.name: first})
    assert command.made({each.name: third}, environment=variable) == command.made({each.name: second})
    assert command.made({each.name: third}, environment={each.variable: ""}) == command.made(
        {each.name: third}
    )


@pytest.mark.parametrize(("name", "each"), WAYS)
@QUICK
@given(data=st.data())
def test_what_is_printed_is_a_file_of_the_same_settings(
    name: str, each: Setting, tmp_path: Path, data: st.DataObject
) -> None:
    command = command_for(name, each, tmp_path)
    made = command.made({each.name: data.draw(values_for(each))})
    text = config_text(command.settings, values_of(made), {each.name: "here"})
    assert f"{each.name}: " in text
    assert text.count("  # here\n") == 1
    printed = yaml.safe_load(text)
    assert printed.keys() == values_of(made).keys()
    if name == "serve":
        assert make_config(printed) == made
    else:
        assert make_settings({"method": method_of(made), **printed}) == made


@pytest.mark.parametrize(("name", "each"), WAYS)
def test_every_setting_has_its_flag_under_its_title(name: str, each: Setting) -> None:
    command = COMMANDS[name]
    (option,) = (param for param in command.params if param.name == each.name)
    assert f"--{each.flag}" in option.opts
    assert option.rich_help_panel == each.declared.group
    assert option.help == each.declared.help
    assert each.declared.help.endswith((".", "`datasets` name."))
