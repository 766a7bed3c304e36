"""What OpenAI's clients send that changes nothing: nulls, and fields at the value that does nothing.

A field that would change the answer is refused by its name, with the values that would do.
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema


class Body(BaseModel):
    """A body in OpenAI's manner: a field that is null is a field left out, whether it is known here or not."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict) and None in values.values():
            return {k: v for k, v in values.items() if v is not None}
        return values

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        made = handler.resolve_ref_schema(schema)
        needed = set(made.get("required", ()))
        for name, about in made.get("properties", {}).items():
            if name not in needed:
                made["properties"][name] = {"anyOf": [about, {"type": "null"}]}
        made["additionalProperties"] = {"type": "null"}
        return schema


class Only:
    """Marks a field (Annotated[None, Only(...)]) that is accepted at these values alone: they change nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.shown = " or ".join(orjson.dumps(v).decode() for v in values)

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def _check(self, value: Any) -> None:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values):
            raise ValueError(f"this would change the answer and is not done here; leave it out, or send {self.shown}")


class Neutral(Body):
    """Fields of chats and completions that have no effect here, at the values that have none elsewhere."""

    # how a token is drawn
    frequency_penalty: Annotated[None, Only(0)] = None
    presence_penalty: Annotated[None, Only(0)] = None
    repetition_penalty: Annotated[None, Only(1)] = None
    length_penalty: Annotated[None, Only(1)] = None
    top_k: Annotated[None, Only(-1, 0)] = None
    min_p: Annotated[None, Only(0)] = None
    typical_p: Annotated[None, Only(1)] = None
    top_a: Annotated[None, Only(0)] = None
    min_tokens: Annotated[None, Only(0)] = None
    best_of: Annotated[None, Only(1)] = None
    use_beam_search: Annotated[None, Only(False)] = None
    # what ends an answer, and how it is written
    stop_token_ids: Annotated[None, Only([])] = None
    bad_words: Annotated[None, Only([])] = None
    include_stop_str_in_output: Annotated[None, Only(False)] = None
    skip_special_tokens: Annotated[None, Only(True)] = None
    spaces_between_special_tokens: Annotated[None, Only(True)] = None
    add_special_tokens: Annotated[None, Only(True)] = None
    return_tokens_as_token_ids: Annotated[None, Only(False)] = None
    # who pays, who asks, where it is kept: nothing of that is here
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    priority: int | None = None


class NeutralChat(Neutral):
    """The same of chats: no tools are called, nothing is heard, and no model here reasons before it speaks."""

    tools: Annotated[None, Only([])] = None
    tool_choice: Annotated[None, Only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[None, Only([])] = None
    function_call: Annotated[None, Only("none", "auto")] = None
    response_format: Annotated[None, Only({"type": "text"})] = None
    modalities: Annotated[None, Only(["text"])] = None
    reasoning_effort: str | None = None
    verbosity: Annotated[None, Only("medium")] = None
    prediction: dict[str, Any] | None = None
    """makes some services faster, and changes no answer"""
    add_generation_prompt: Annotated[None, Only(True)] = None
    chat_template_kwargs: Annotated[None, Only({})] = None
    documents: Annotated[None, Only([])] = None
    echo: Annotated[None, Only(False)] = None


class NeutralMessage(Body):
    """What an assistant's message holds besides its words, as clients send it back."""

    annotations: Annotated[None, Only([])] = None
    tool_calls: Annotated[None, Only([])] = None
