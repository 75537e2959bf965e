"""A replica's settings, as an application's args have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from manyhats.server.access.errors import ConfigError
from manyhats.server.ray.ingress import add_services
from manyhats.server.ray.settings import read_settings

DEPLOYED = yaml.safe_load((Path(__file__).parents[3] / "deploy/ray/serve.yaml").read_text(encoding="utf-8"))


def test_args_are_a_server_s_settings_and_win_over_a_file_of_them(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("insecure: true\nmax-sequences: 5\nmax_adapters: 9\n")
    config, limit_s = read_settings({"config": str(file), "max_sequences": "7", "call_limit_s": "90"}, {})
    assert (config.engine.max_num_sequences, config.engine.max_loaded_adapters) == (7, 9)
    assert limit_s == 90


@pytest.mark.parametrize(
    ("args", "environment", "problem"),
    [
        ({}, {}, "token_file: is needed"),
        ({"http_port": 8001}, {}, "http_port: is for a server's own ports"),
        ({"tls_cert": "a.pem", "tls_key": "b.pem"}, {}, "tls_cert: is for a server's own ports"),
        ({"insecure": True, "max_hats": 3}, {}, "max_hats: is not a setting"),
        ({"insecure": True, "max_sequences": 0}, {}, "max_sequences"),
        (
            {"insecure": True, "call_limit_s": 0},
            {},
            "call_limit_s: must be a number of seconds above 0, not 0",
        ),
        ({"insecure": True, "call_limit_s": "soon"}, {}, "call_limit_s"),
        ({"insecure": True}, {"MANYHATS_STORE": "/srv"}, "store: is set by MANYHATS_STORE"),
    ],
)
def test_what_is_none_of_a_replica_s_is_refused_by_name(
    args: dict[str, Any], environment: dict[str, str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_settings(args, environment)


def test_the_caller_s_certificate_is_no_setting_of_a_replica() -> None:
    assert read_settings({"insecure": True}, {"MANYHATS_TLS_CERT": "mine.pem"})[0].insecure


def test_the_configuration_names_what_is_there() -> None:
    (application,) = DEPLOYED["applications"]
    config, _ = read_settings(application["args"], {})
    (deployment,) = application["deployments"]
    scaling = deployment["autoscaling_config"]
    assert scaling["target_ongoing_requests"] == config.engine.max_num_sequences
    names = [f"{add_services.__module__}.{add_services.__name__}"]
    assert DEPLOYED["grpc_options"]["grpc_servicer_functions"] == names
