"""Environment variables: those of settings are known, and others that look like them are refused."""

from __future__ import annotations

import pytest

from manyhats.cli.options.settings import refuse_unknown_variables
from manyhats.cli.terminal.failures import UsageError
from manyhats.server.lifetime.config import SETTINGS as SERVE
from manyhats.settings.reading import read_variables
from manyhats.trainer.settings.settings import SETTINGS as TRAIN


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("MANYHATS_MAX_TASK", "is not a setting; did you mean MANYHATS_MAX_TASKS?"),
        ("MANYHATS_KV_CACHE_BYTE", "is not a setting; did you mean MANYHATS_KV_CACHE_BYTES?"),
        ("MANYHATS_XYZZY", "is not a setting"),
        ("MANYHATS_PORT_50051_TCP_ADDR", "enableServiceLinks: false"),
        ("MANYHATS_SERVICE_HOST", "enableServiceLinks: false"),
    ],
)
def test_a_variable_that_is_no_setting_is_named_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_unknown_variables({name: "1"}, SERVE, TRAIN)
    assert str(caught.value).startswith(f"{name}: ")
    assert hint in str(caught.value)


def test_empty_variables_other_programs_and_other_commands_are_no_concern() -> None:
    environment = {
        "MANYHATS_XYZZY": "",
        "PATH": "/bin",
        "MANYHATSX": "1",
        "MANYHATS_HOME": "/home",
        "MANYHATS_TOKEN": "mh_1",
        "MANYHATS_RANK": "3",
    }
    refuse_unknown_variables(environment, SERVE, TRAIN)
    assert read_variables(SERVE, environment) == {}


def test_several_values_stand_between_commas() -> None:
    environment = {
        "MANYHATS_ADAPTER_ROOTS": "/a, /b",
        "MANYHATS_REGISTER": "sql=/a/x=1,tldr=/b",
        "MANYHATS_MODEL": "a,b",
    }
    assert read_variables(SERVE, environment) == {
        "adapter_roots": ["/a", "/b"],
        "register": ["sql=/a/x=1", "tldr=/b"],
        "model": "a,b",
    }


def test_variables_mean_one_thing_but_for_those_that_name_the_process_s_own_certificate() -> None:
    others = {f"MANYHATS_{name}" for name in ("SERVER", "TOKEN", "TLS", "TLS_CA", "HOME", "DEBUG", "CONFIG")}
    assert not others & {each.variable for each in (*SERVE, *TRAIN)}
    shared = {each.name for each in SERVE} & {each.name for each in TRAIN}
    assert shared == {"model", "quantization", "dtype", "device", "num_threads"}
