"""The server's own errors.

ServerError
├── ConfigError         a setting that cannot be served with; names it
├── AddressError        a port that cannot be bound
├── LoadingError        the model is not loaded yet
└── NotOfferedError     a part of the API that this version does not serve
"""

from __future__ import annotations


class ServerError(Exception):
    """Any error the server raises on purpose."""


class ConfigError(ServerError):
    """A setting is wrong; ``setting`` is its name as in ``ServeConfig``."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting


class AddressError(ServerError):
    """A port cannot be bound, most often because another process has it."""

    def __init__(self, purpose: str, address: str) -> None:
        super().__init__(
            f"cannot listen for {purpose} on {address}: is the port taken, or the host not this machine's?"
        )
        self.address = address


class LoadingError(ServerError):
    """The model is being loaded; try again soon."""

    def __init__(self) -> None:
        super().__init__("the model is being loaded")


class NotOfferedError(ServerError):
    """The API names it, but this version of the server does not serve it; ``feature`` is its name."""

    def __init__(self, feature: str) -> None:
        super().__init__(f"{feature} is not served by this version")
        self.feature = feature
