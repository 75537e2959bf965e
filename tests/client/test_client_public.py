"""What the client package offers, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys

from manyhats import client

PUBLIC = [
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
    "ClassScore",
    "Classification",
    "ClassifyFrameOptions",
    "ClassifyOptions",
    "ClassifyResult",
    "Client",
    "Continuation",
    "Credentials",
    "CredentialsError",
    "DEFAULT_TARGET",
    "DataLossError",
    "DeadlineError",
    "DigestMismatchError",
    "EmbedFrameOptions",
    "EmbedOptions",
    "Embeddings",
    "Entity",
    "FinishReason",
    "GenerateManyOptions",
    "GenerateOptions",
    "Generation",
    "GenerationChunk",
    "GenerationStream",
    "InvalidRequestError",
    "ManyOptions",
    "ManyhatsError",
    "NoActiveVersionError",
    "NotOfferedError",
    "NumericalError",
    "OnError",
    "PermissionDeniedError",
    "Progress",
    "Prompt",
    "PromptOptions",
    "PromptTooLongError",
    "QueueFullError",
    "RankedText",
    "RegisterOptions",
    "Registration",
    "RequestIdReusedError",
    "RerankOptions",
    "RerankResult",
    "ResourceExhaustedError",
    "Score",
    "ScoreFrameOptions",
    "ScoreResult",
    "ServerError",
    "ServerInfo",
    "ServerLimits",
    "SourceNotAllowedError",
    "SourceNotFoundError",
    "TagOptions",
    "TagResult",
    "TaggedText",
    "TaskKindError",
    "TaskNotFoundError",
    "TextToRead",
    "Token",
    "TokenClass",
    "Tokenization",
    "TopToken",
    "UnavailableError",
    "Usage",
]

LOADED_BY_IMPORT = """
import sys, manyhats.client
heavy = {"torch", "transformers", "numpy", "numba", "pydantic", "typer", "rich", "pandas", "polars"}
ours = {name.split(".")[1] for name in sys.modules if name.startswith("manyhats.")}
print(sorted(heavy & sys.modules.keys()), sorted(ours))
"""


def test_public_names() -> None:
    assert sorted(client.__all__) == sorted(PUBLIC)
    assert all(hasattr(client, name) for name in PUBLIC)


def test_error_tree_in_the_docstring_is_the_tree() -> None:
    drawn = client.errors.__doc__ or ""
    for name in client.__all__:
        value = getattr(client, name)
        if isinstance(value, type) and issubclass(value, client.ManyhatsError):
            assert f" {name} " in f" {drawn} ".replace("\n", " "), name


def test_client_imports_the_api_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOADED_BY_IMPORT], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[] ['client', 'v1']"
