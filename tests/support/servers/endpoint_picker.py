"""A double of the endpoint picker of Kubernetes' inference gateway: Envoy asks it where a request is to go.

It speaks Envoy's external processing (``envoy/service/ext_proc/v3/external_processor.proto``): the messages here
are the part of it that this needs. It chooses by the model in the body and what replicas have at ``/metrics``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from support.harnesses.picker import Endpoint, read_endpoint

METHOD = ("envoy.service.ext_proc.v3.ExternalProcessor", "Process")
DESTINATION = "x-gateway-destination-endpoint"
_BYTES, _TEXT, _BOOL, _NUMBER, _MESSAGE = 12, 9, 8, 5, 11  # of descriptor_pb2.FieldDescriptorProto.Type

# Each message's fields: a number, and a type or another message's name.
_MESSAGES: Mapping[str, Mapping[str, tuple[int, int | str]]] = {
    "Body": {"body": (1, _BYTES)},
    "Nothing": {},
    "Request": {"request_headers": (2, "Nothing"), "request_body": (4, "Body")},
    "Header": {"key": (1, _TEXT), "raw_value": (3, _BYTES)},
    "HeaderOption": {"header": (1, "Header")},
    "HeaderMutation": {"set_headers": (1, "HeaderOption")},
    "Common": {"header_mutation": (2, "HeaderMutation"), "clear_route_cache": (5, _BOOL)},
    "Answer": {"response": (1, "Common")},
    "Status": {"code": (1, _NUMBER)},
    "Immediate": {"status": (1, "Status")},
    "Response": {
        "request_headers": (1, "Answer"),
        "request_body": (3, "Answer"),
        "immediate_response": (7, "Immediate"),
    },
}


def _classes() -> dict[str, Any]:
    """The messages' classes. What they do not know of a message, they skip."""
    file = descriptor_pb2.FileDescriptorProto(name="endpoint_picker.proto", package="picker", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=1)
            added.type = _MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                added.type_name = f".picker.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"picker.{name}"))
        for name in _MESSAGES
    }


_CLASS = _classes()


class EndpointPicker:
    """Reads every replica anew for each request, and takes the one with the best score.

    Args:
        replicas: addresses of their HTTP ports.
    """

    def __init__(self, replicas: Sequence[str]) -> None:
        self._replicas = replicas
        self.picked: list[tuple[str, str]] = []

    async def pick(self, model: str) -> str | None:
        """Where a request for a model is to go; None if nothing takes it."""
        found = await asyncio.gather(*map(self._read, self._replicas))
        best, _, replica = max(
            (endpoint.affinity(model), -endpoint.kv_usage, replica)
            for endpoint, replica in zip(found, self._replicas, strict=True)
        )
        if best <= 0:
            return None
        self.picked.append((model, replica))
        return replica

    async def _read(self, replica: str) -> Endpoint:
        async with httpx2.AsyncClient() as http:
            return read_endpoint((await http.get(f"http://{replica}/metrics")).text)

    async def process(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """One request of Envoy's: its head, then its body."""
        async for request in requests:
            if request.HasField("request_headers"):
                yield _CLASS["Response"](request_headers=_CLASS["Answer"]())
            elif (replica := await self.pick(json.loads(request.request_body.body)["model"])) is None:
                yield _CLASS["Response"](immediate_response={"status": {"code": 503}})
            else:
                header = {"header": {"key": DESTINATION, "raw_value": replica.encode()}}
                changed = {"header_mutation": {"set_headers": header}, "clear_route_cache": True}
                yield _CLASS["Response"](request_body={"response": changed})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Within the block it answers at a port."""
        service, method = METHOD
        handler = grpc.stream_stream_rpc_method_handler(
            self.process, _CLASS["Request"].FromString, _CLASS["Response"].SerializeToString
        )
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(0)


def envoy_config(port: int, admin_port: int, picker_port: int) -> dict[str, Any]:
    """An Envoy that asks the picker, as a gateway does, and sends a request where it says."""
    types = "type.googleapis.com/envoy.extensions"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "replicas", "timeout": "0s"}}
    asks = {
        "@type": f"{types}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "10s"},
        "message_timeout": "10s",
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SKIP",
            "request_body_mode": "BUFFERED",
        },
    }
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "calls",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": asks},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{types}.filters.http.router.v3.Router"},
            },
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    http2 = {
        "@type": f"{types}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    picker = {
        "name": "picker",
        "type": "STATIC",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2},
        "load_assignment": {
            "cluster_name": "picker",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(picker_port)}}]}],
        },
    }
    replicas = {
        "name": "replicas",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
    }
    return {
        "admin": {"address": _address(admin_port)},
        "static_resources": {
            "listeners": [
                {"name": "calls", "address": _address(port), "filter_chains": [{"filters": filters}]}
            ],
            "clusters": [picker, replicas],
        },
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
