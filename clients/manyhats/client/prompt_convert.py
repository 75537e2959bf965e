"""Prompts to the fields of requests that hold them: text, token ids, or a conversation with its options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from manyhats.client.fields import assign, invalid
from manyhats.client.requests import ChatMessage, Prompt
from manyhats.v1 import encoding_pb2, generation_pb2

PromptRequest: TypeAlias = (
    generation_pb2.GenerateRequest | generation_pb2.ScoreRequest | generation_pb2.TokenizeRequest
)

CHAT_OPTIONS = ("tools", "template_arguments", "continue_final_message", "add_generation_prompt")
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})


def set_prompt(request: PromptRequest | encoding_pb2.TextInput, prompt: Prompt, path: str = "") -> None:
    """Set what a request is about, or one of its texts, which errors name by ``path``.

    Raises:
        InvalidRequestError: it is no prompt; names the field.
    """
    if isinstance(prompt, str):
        request.text = prompt
        return
    within = f"{path}." if path else ""
    if not isinstance(prompt, Iterable):
        raise invalid(
            path or "prompt", f"must be text, token ids or chat messages, not {type(prompt).__name__}"
        )
    items = list(prompt)
    if items and isinstance(items[0], ChatMessage | Mapping):
        request.chat.SetInParent()
        for index, message in enumerate(items):
            _add_message(request.chat, message, f"{within}chat.messages[{index}]")
    else:
        request.token_ids.SetInParent()
        assign(request.token_ids, "ids", items, f"{within}token_ids")


def set_chat_option(request: PromptRequest, name: str, value: Any) -> None:
    """Set one of ``CHAT_OPTIONS``; None leaves it as it is.

    Raises:
        InvalidRequestError: the prompt is no conversation, or the value does not fit; names the field.
    """
    if value is None:
        return
    path = f"chat.{name}"
    if not request.HasField("chat"):
        raise invalid(path, "is for conversations only")
    try:
        if name == "tools":
            request.chat.tools.extend(json.dumps(tool, ensure_ascii=False) for tool in value)
        elif name == "template_arguments":
            request.chat.template_arguments.update(value)
        else:
            setattr(request.chat, name, value)
    except (TypeError, ValueError) as error:
        raise invalid(path, str(error)) from error


def _add_message(chat: generation_pb2.ChatMessages, message: object, path: str) -> None:
    if isinstance(message, ChatMessage):
        message = {each.name: getattr(message, each.name) for each in fields(message)}
    if not isinstance(message, Mapping) or "role" not in message or not _MESSAGE_FIELDS.issuperset(message):
        raise invalid(path, f"must have a role, and may have {', '.join(sorted(_MESSAGE_FIELDS - {'role'}))}")
    if message.get("content") is None and not message.get("tool_calls"):
        raise invalid(f"{path}.content", "must be given where there are no tool_calls")
    added = chat.messages.add()
    for index, call in enumerate(message.get("tool_calls") or ()):
        _add_call(added, call, f"{path}.tool_calls[{index}]")
    for key in _MESSAGE_FIELDS - {"tool_calls"}:
        if message.get(key) is not None:
            assign(added, key, message[key], f"{path}.{key}")


def _add_call(message: generation_pb2.ChatMessage, call: Any, path: str) -> None:
    """A call in OpenAI's form."""
    added = message.tool_calls.add()
    try:
        function = call["function"]
        arguments = function.get("arguments") or {}
        added.id, added.name = call.get("id") or "", function["name"]
        added.arguments = (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise invalid(path, 'must be {"id": …, "function": {"name": …, "arguments": …}}') from error
