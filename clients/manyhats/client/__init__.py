"""The Python client. Needs grpcio and protobuf, never torch.

    from manyhats.client import Client

    with Client("127.0.0.1:50051") as client:
        client.wait_ready()
        answer = client.generate("List all users.", task_id="sql")
        with client.generate_stream("List all users.", task_id="sql") as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)

``AsyncClient`` is the same for asyncio. Every error is a ``ManyhatsError``; ``errors.py`` draws the tree.
"""

from manyhats.client.aio import AsyncClient
from manyhats.client.aio_stream import AsyncGenerationStream
from manyhats.client.channel import DEFAULT_TARGET
from manyhats.client.credentials import Credentials
from manyhats.client.errors import (
    AdapterError,
    AdapterInUseError,
    AdapterInvalidError,
    AdapterNoEffectError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    AuthenticationError,
    BaseMismatchError,
    CancelledError,
    CredentialsError,
    DataLossError,
    DeadlineError,
    DigestMismatchError,
    InvalidRequestError,
    ManyhatsError,
    NoActiveVersionError,
    NotOfferedError,
    NumericalError,
    PermissionDeniedError,
    PromptTooLongError,
    QueueFullError,
    RequestIdReusedError,
    ResourceExhaustedError,
    ServerError,
    SourceNotAllowedError,
    SourceNotFoundError,
    TaskNotFoundError,
    UnavailableError,
)
from manyhats.client.requests import (
    ChatMessage,
    ChatOptions,
    Continuation,
    GenerateOptions,
    Progress,
    Prompt,
    PromptOptions,
    RegisterOptions,
)
from manyhats.client.results import (
    AdapterInfo,
    AdapterRef,
    ArtifactPart,
    FinishReason,
    Generation,
    GenerationChunk,
    Registration,
    Score,
    ScoreResult,
    ServerInfo,
    ServerLimits,
    Token,
    Tokenization,
    TopToken,
    Usage,
)
from manyhats.client.stream import GenerationStream
from manyhats.client.sync import Client

__all__ = [
    "DEFAULT_TARGET",
    "AdapterError",
    "AdapterInUseError",
    "AdapterInfo",
    "AdapterInvalidError",
    "AdapterNoEffectError",
    "AdapterRef",
    "AdapterTooLargeError",
    "AdapterUnsafeError",
    "AdapterUnsupportedError",
    "ArtifactPart",
    "AsyncClient",
    "AsyncGenerationStream",
    "AuthenticationError",
    "BaseMismatchError",
    "CancelledError",
    "ChatMessage",
    "ChatOptions",
    "Client",
    "Continuation",
    "Credentials",
    "CredentialsError",
    "DataLossError",
    "DeadlineError",
    "DigestMismatchError",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "GenerationChunk",
    "GenerationStream",
    "InvalidRequestError",
    "ManyhatsError",
    "NoActiveVersionError",
    "NotOfferedError",
    "NumericalError",
    "PermissionDeniedError",
    "Progress",
    "Prompt",
    "PromptOptions",
    "PromptTooLongError",
    "QueueFullError",
    "RegisterOptions",
    "Registration",
    "RequestIdReusedError",
    "ResourceExhaustedError",
    "Score",
    "ScoreResult",
    "ServerError",
    "ServerInfo",
    "ServerLimits",
    "SourceNotAllowedError",
    "SourceNotFoundError",
    "TaskNotFoundError",
    "Token",
    "Tokenization",
    "TopToken",
    "UnavailableError",
    "Usage",
]
