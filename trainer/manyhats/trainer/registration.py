"""From the trainer's output to a running server: the artifact becomes a version of the task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manyhats.client import Client, Credentials, ManyhatsError, Progress, Registration, ServerInfo
from manyhats.trainer.errors import RegistrationError


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationServer:
    """A server that takes artifacts.

    Attributes:
        target: ``host:port``.
        credentials: what it requires of callers; None for none.
        timeout_s: for each call; None waits indefinitely.
    """

    target: str
    credentials: Credentials | None = None
    timeout_s: float | None = None

    def info(self) -> ServerInfo:
        """The server's own description.

        Raises:
            ManyhatsError: it cannot be reached, or does not answer.
        """
        with self._client() as client:
            return client.server_info()

    def register(
        self, task: str, directory: Path, progress: Progress | None = None, *, activate: bool = True
    ) -> Registration:
        """Upload the artifact in a directory as a version of a task.

        Uploading the same artifact again makes no new version.

        Args:
            task: its id.
            directory: the trainer's output; its config and safetensors are sent.
            progress: called with the bytes sent, and the total.
            activate: whether requests for the task use it from now on.

        Raises:
            RegistrationError: the server cannot be reached, or refuses it. The directory is unchanged.
        """
        try:
            with self._client() as client:
                return client.upload_adapter(task, directory, activate=activate, progress=progress)
        except ManyhatsError as error:
            raise RegistrationError(task, directory, self.target, str(error)) from error

    def _client(self) -> Client:
        return Client(self.target, timeout_s=self.timeout_s, credentials=self.credentials)
