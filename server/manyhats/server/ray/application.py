"""The application that ``serve run`` and ``serve deploy`` start: replicas of a server, from a server's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve

from manyhats.server.ray.replica import Replica
from manyhats.server.ray.settings import read_settings

NAME = "manyhats"
"""Of the deployment."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application.

    Args:
        args: see ``read_settings``.

    Raises:
        ConfigError: one is wrong, or is none of a replica's.
    """
    config, limit_s = read_settings(args, os.environ)
    engine = config.engine
    deployment = serve.deployment(
        name=NAME,
        # As many again wait at the replica, where adapters are loaded while they do.
        max_ongoing_requests=2 * engine.max_num_sequences,
        graceful_shutdown_timeout_s=config.drain_limit_s,
        ray_actor_options={"num_cpus": engine.num_threads or 1},
    )(serve.ingress()(Replica))
    return deployment.bind(config, limit_s)
