"""A real S3 endpoint on loopback, by moto, for tests."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import Any

_CREDENTIALS = {"key": "testing", "secret": "testing"}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of its own.

    Attributes:
        url: ``s3://…``.
        options: what fsspec needs to reach it.
    """

    url: str
    options: dict[str, Any]


class S3Server:
    """Serves S3 from a thread until it is closed."""

    def __init__(self) -> None:
        # Imported here and below, for it takes a second that most test runs need not spend.
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint_url = f"http://{host}:{port}"

    def new_bucket(self) -> Bucket:
        import boto3

        name = f"bucket-{uuid.uuid4().hex}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=_CREDENTIALS["key"],
            aws_secret_access_key=_CREDENTIALS["secret"],
        )
        client.create_bucket(Bucket=name)
        client.close()
        return Bucket(f"s3://{name}/store", {**_CREDENTIALS, "endpoint_url": self.endpoint_url})

    def close(self) -> None:
        self._server.stop()
