"""The names of the API, which clients outside the project are written against, and the generated code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import EnumDescriptor, FileDescriptor

import generate_proto
from manyhats.v1 import adapter_pb2, encoding_pb2, generation_pb2, server_pb2

ROOT = Path(__file__).resolve().parents[2]
FILES: tuple[FileDescriptor, ...] = (
    generation_pb2.DESCRIPTOR,
    encoding_pb2.DESCRIPTOR,
    adapter_pb2.DESCRIPTOR,
    server_pb2.DESCRIPTOR,
)

SERVICES = {
    "GenerationService": "Generate GenerateStream Score Tokenize",
    "EncodingService": "Embed Classify ClassifyTokens Rerank",
    "AdapterService": "RegisterAdapter UploadAdapter GetAdapter ListAdapters ActivateAdapter PinAdapter UnpinAdapter"
    " DeleteAdapter",
    "ServerService": "GetServerInfo",
}
FIELDS = {
    "GenerateRequest": "request_id task_id text token_ids chat sampling stopping response cache_salt priority"
    " add_special_tokens speculation",
    "Speculation": "num_tokens",
    "SamplingParams": "temperature top_k top_p min_p typical_p repetition_penalty presence_penalty"
    " frequency_penalty seed logit_bias",
    "StoppingParams": "max_new_tokens min_new_tokens stop_sequences include_stop_sequence ignore_eos"
    " time_limit_ms stop_token_ids",
    "ResponseOptions": "logprobs top_logprobs prompt_logprobs",
    "GenerateResponse": "request_id text tokens prompt_tokens finish_reason usage adapter",
    "TokenInfo": "id text logprob rank top",
    "TopToken": "id text logprob",
    "Usage": "prompt_tokens cached_prompt_tokens generated_tokens queue_ms prefill_ms decode_ms"
    " adapter_load_ms draft_tokens accepted_draft_tokens",
    "AdapterRef": "task_id version digest",
    "ScoreRequest": "request_id task_id text token_ids chat continuations",
    "ScoreResponse": "scores usage adapter",
    "ScoredContinuation": "logprob num_tokens tokens",
    "TokenizeRequest": "task_id text token_ids chat",
    "TokenizeResponse": "ids pieces",
    "TextInput": "text token_ids chat text_pair",
    "EmbedRequest": "request_id task_id inputs pooling normalize dimensions truncation add_special_tokens cache_salt"
    " priority",
    "Embedding": "values num_tokens",
    "EmbedResponse": "request_id embeddings usage adapter base_digest",
    "ClassifyRequest": "request_id task_ids inputs raw_scores top_k truncation priority",
    "ClassScore": "label index score logit",
    "Classification": "classes num_tokens adapter",
    "ClassifyResponse": "request_id results usage",
    "ClassifyTokensRequest": "request_id task_id inputs aggregation top_k truncation priority",
    "TokenClass": "token_index start end classes",
    "Entity": "label start end text score",
    "TaggedText": "tokens entities num_tokens",
    "ClassifyTokensResponse": "request_id results usage adapter",
    "RerankRequest": "request_id task_id query texts raw_scores return_texts top_n truncation",
    "RankedText": "index score text",
    "RerankResponse": "request_id results usage adapter",
    "Adapter": "task_id version digest method state state_reason size_bytes num_parameters source create_time"
    " base_model labels effect residency parts kind class_labels pooling pinned",
    "ArtifactPart": "digest weight source",
    "RegisterAdapterRequest": "task_id uri validate_only activate expected_digest request_id labels parts",
    "AdapterPart": "uri weight",
    "UploadAdapterRequest": "header chunk",
    "UploadHeader": "task_id files validate_only activate expected_digest request_id labels",
    "FileInfo": "name size_bytes sha256",
    "FileChunk": "file_index offset data",
    "GetAdapterRequest": "task_id",
    "ActivateAdapterRequest": "task_id",
    "PinAdapterRequest": "task_id",
    "UnpinAdapterRequest": "task_id",
    "DeleteAdapterRequest": "task_id force",
    "ListAdaptersRequest": "task_id page_size page_token",
    "ListAdaptersResponse": "adapters next_page_token",
    "GetServerInfoResponse": "version base_model base_digest quantization dtype device max_context_length"
    " vocab_size limits attention embedding_size default_pooling services",
    "ServerLimits": "max_request_bytes max_sequences max_waiting max_adapters max_continuations max_artifact_bytes"
    " max_adapter_rank max_virtual_tokens max_parts max_transfers max_tasks max_versions_per_task max_bytes_per_task"
    " max_bytes",
}
ENUMS = {
    "FinishReason": "EOS STOP_SEQUENCE LENGTH TIME_LIMIT",
    "AdapterMethod": "LORA DORA ADALORA VERA IA3 BOTTLENECK PREFIX_TUNING PROMPT_TUNING P_TUNING"
    " MULTITASK_PROMPT_TUNING COMPOSED TRAINABLE_TOKENS UNION REFT",
    "AdapterState": "CREATING ACTIVE INACTIVE FAILED DELETING",
    "AdapterResidency": "DEVICE HOST DISK",
    "TaskKind": "GENERATE EMBED CLASSIFY CLASSIFY_TOKENS SPAN",
    "Pooling": "FIRST LAST MEAN MAX",
    "Truncation": "END",
    "Aggregation": "SIMPLE FIRST MAX",
}


@pytest.mark.parametrize(("name", "methods"), SERVICES.items())
def test_services_have_their_methods_with_standard_messages(name: str, methods: str) -> None:
    (service,) = [file.services_by_name[name] for file in FILES if name in file.services_by_name]
    assert [method.name for method in service.methods] == methods.split()
    for method in service.methods:
        wanted = "GenerateRequest" if method.name == "GenerateStream" else f"{method.name}Request"
        assert (method.input_type.name, method.output_type.name) == (wanted, f"{method.name}Response")


@pytest.mark.parametrize(("name", "fields"), FIELDS.items())
def test_messages_have_their_fields(name: str, fields: str) -> None:
    (message,) = [file.message_types_by_name[name] for file in FILES if name in file.message_types_by_name]
    assert set(message.fields_by_name) >= set(fields.split())


def test_stream_and_unary_answers_have_the_same_fields_but_for_the_answers_after_the_first() -> None:
    unary, stream = (
        generation_pb2.GenerateResponse.DESCRIPTOR,
        generation_pb2.GenerateStreamResponse.DESCRIPTOR,
    )
    whole, pieces = ({(field.name, field.number) for field in message.fields} for message in (unary, stream))
    assert (whole - pieces, pieces - whole) == ({("more_sequences", 8)}, {("sequence_index", 8)})


@pytest.mark.parametrize(("name", "values"), ENUMS.items())
def test_enums_have_prefixed_values_and_begin_unspecified(name: str, values: str) -> None:
    (enum,) = [file.enum_types_by_name[name] for file in FILES if name in file.enum_types_by_name]
    prefix = _prefix(enum)
    wanted = [f"{prefix}UNSPECIFIED", *(f"{prefix}{value}" for value in values.split())]
    assert [value.name for value in enum.values] == wanted
    assert enum.values[0].number == 0


def _prefix(enum: EnumDescriptor) -> str:
    words = "".join(f"_{char}" if char.isupper() else char for char in enum.name)
    return f"{words.removeprefix('_').upper()}_"


def test_generated_code_is_what_the_proto_files_give() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate_proto.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_check_of_generated_code_finds_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "manyhats" / "v1"
    package.mkdir(parents=True)
    (package / "adapter.proto").write_text((ROOT / "proto/manyhats/v1/adapter.proto").read_text())
    (package / "adapter_pb2.py").write_text("stale\n")
    monkeypatch.setattr(generate_proto, "ROOT", tmp_path)
    assert generate_proto.main(["--check"]) == 1
    assert "-stale" in capsys.readouterr().out
    assert (package / "adapter_pb2.py").read_text() == "stale\n"


def test_proto_files_pass_the_linter() -> None:
    buf = Path(sys.executable).parent / "buf"
    result = subprocess.run(
        [str(buf), "lint", str(ROOT / "proto")], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")
