"""The image's health check: exits with 0 if the server in this container is ready.

It asks with TLS if the server has it, whoever issued the certificate: nothing leaves the container.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
import urllib.request

_LIMIT_S = 2.0


def is_ready(port: str) -> bool:
    """Whether the HTTP port of this machine says so."""
    for scheme in ("http", "https"):
        with contextlib.suppress(OSError, ValueError):
            # The standard library's one way not to verify, for a check that never leaves the container.
            context = ssl._create_unverified_context() if scheme == "https" else None
            address = f"{scheme}://127.0.0.1:{port}/readyz"
            with urllib.request.urlopen(address, timeout=_LIMIT_S, context=context):
                return True
    return False


if __name__ == "__main__":
    # As the server takes it; a port from a settings file must be given as this variable, too.
    sys.exit(0 if is_ready(os.environ.get("MANYHATS_HTTP_PORT") or "8000") else 1)
