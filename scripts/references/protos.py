"""The gRPC API's services and messages, from the .proto files and their comments."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from google.protobuf import descriptor_pb2

import protoc
from references.markdown import plain, table

ROOT = Path(__file__).resolve().parents[2] / "proto"
# Those that callers begin with come first.
ORDER = ("generation", "encoding", "adapter", "server")
PACKAGE = "manyhats.v1"

File = descriptor_pb2.FileDescriptorProto
Message = descriptor_pb2.DescriptorProto
Field = descriptor_pb2.FieldDescriptorProto
Comments = Mapping[tuple[int, ...], str]


def markdown() -> str:
    """Services, then messages and enumerations, file by file."""
    parts: list[str] = []
    for file in _files():
        comments = _comments(file)
        for index, service in enumerate(file.service):
            parts += _service(service, (6, index), comments)
        parts.append(f"## Messages of {' and '.join(service.name for service in file.service)}\n")
        for index, message in enumerate(file.message_type):
            parts += _message(message, "", (4, index), comments)
        for index, enum in enumerate(file.enum_type):
            parts += _enum(enum, "", (5, index), comments)
    return "\n".join(parts)


def _files() -> list[File]:
    names = [f"manyhats/v1/{name}.proto" for name in ORDER]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "files"
        protoc.run(ROOT, "--include_source_info", f"--descriptor_set_out={out}", sources=names)
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return sorted(found.file, key=lambda file: names.index(file.name))


def _comments(file: File) -> Comments:
    """What stands before each declaration, by its path in the descriptor; not what is for the linter."""
    found = {}
    for location in file.source_code_info.location:
        kept = [line for line in location.leading_comments.splitlines() if "buf:lint" not in line]
        paragraphs = re.split(r"\n\s*\n", "\n".join(line.strip() for line in kept).strip())
        found[tuple(location.path)] = "\n\n".join(
            plain(_with_code(" ".join(each.split()))) for each in paragraphs
        )
    return found


def _with_code(text: str) -> str:
    """Text in which the names of statuses and reasons are code."""
    return re.sub(r"(?<![`\w])([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?![`\w])", r"`\1`", text)


def _service(
    service: descriptor_pb2.ServiceDescriptorProto, path: tuple[int, ...], comments: Comments
) -> Iterator[str]:
    yield f"## {service.name}\n\n{comments.get(path, '')}\n"
    for index, method in enumerate(service.method):
        takes, gives = _link(method.input_type), _link(method.output_type)
        takes = f"stream of {takes}" if method.client_streaming else takes
        gives = f"stream of {gives}" if method.server_streaming else gives
        yield f"### {method.name}\n\n{takes} → {gives}\n\n{comments.get((*path, 2, index), '')}\n"


def _message(message: Message, outer: str, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    yield f"(grpc-{name})=\n### {name}\n\n{comments.get(path, '')}\n"
    entries = {
        f".{PACKAGE}.{name}.{each.name}": each for each in message.nested_type if each.options.map_entry
    }
    rows = []
    for index, field in enumerate(message.field):
        told = comments.get((*path, 2, index), "")
        if field.HasField("oneof_index") and not field.proto3_optional:
            told = f"One of `{message.oneof_decl[field.oneof_index].name}`. {told}"
        rows.append((f"`{field.name}`", str(field.number), _type(field, entries), told))
    yield table("field", "number", "type", "", rows=rows)
    for index, inner in enumerate(message.nested_type):
        yield from _message(inner, f"{name}.", (*path, 3, index), comments)
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, f"{name}.", (*path, 4, index), comments)


def _enum(
    enum: descriptor_pb2.EnumDescriptorProto, outer: str, path: tuple[int, ...], comments: Comments
) -> Iterator[str]:
    yield f"(grpc-{outer}{enum.name})=\n### {outer}{enum.name}\n\n{comments.get(path, '')}\n"
    rows = [
        (f"`{each.name}`", str(each.number), comments.get((*path, 2, index), ""))
        for index, each in enumerate(enum.value)
    ]
    yield table("value", "number", "", rows=rows)


def _type(field: Field, entries: Mapping[str, Message]) -> str:
    """A field's type, with links to messages."""
    if field.type_name in entries:
        key, value = entries[field.type_name].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    scalar = Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name) if field.type_name else scalar
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    """A message of ours as a link, any other by its name."""
    name = type_name.removeprefix(".")
    short = name.removeprefix(f"{PACKAGE}.")
    return f"[{short}](#grpc-{short})" if short != name else f"`{name}`"
