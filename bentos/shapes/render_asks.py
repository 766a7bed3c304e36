"""What may be sent to the shape `render`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bentos.desk import Extra, Strict
from bentos.shapes.drawing import MAX_LEVELS, MAX_ROWS, MAX_STEPS
from bentos.shapes.neutral import Body
from patches.families import diffusion
from patches.families.pictures import MAX_BYTES

Prompt = Annotated[str, Field(max_length=4000)]
Data = Annotated[str, Field(min_length=1, max_length=MAX_BYTES * 4 // 3 + 128)]
"""a picture's file in base64"""
Model = Annotated[str, Field(max_length=200)] | None
User = str | None
Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None
Solver = Literal["", "ddim", "dpm++", "unipc"]
Method = Literal["fixed_point", "ddim", "edit_friendly", "edict", "o_belm"]
Lenient = ConfigDict(extra="forbid", allow_inf_nan=False)
"""forms hold text alone, so numbers are read from it"""


class Drawing(Extra):
    """How a picture is drawn, beside who draws it."""

    model_config = Lenient
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 10
    guidance: Annotated[float, Field(ge=-20.0, le=20.0)] | None = None
    """default 3 for prompts, 2 for changes of a picture"""
    solver: Solver = "ddim"
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    levels: Annotated[int, Field(ge=1, le=MAX_LEVELS)] = diffusion.LEVELS
    """a picture is inverted along"""


class Generations(Body):
    """POST /v1/images/generations"""

    prompt: Prompt
    model: Model = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Size = None
    response_format: Literal["b64_json"] | None = None
    stream: bool | None = None
    user: User = None
    patchbay: Drawing = Field(default_factory=Drawing)
    # accepted, and without effect here
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_compression: Literal[100] | None = None
    output_format: Literal["png"] | None = None
    partial_images: Literal[0] | None = None
    quality: str | None = None
    style: str | None = None


class Edits(Generations):
    """POST /v1/images/edits: each picture is inverted and drawn again under the arm; the prompt may be blank."""

    model_config = Lenient
    images: Annotated[list[Any], Field(min_length=1, max_length=16)]
    input_fidelity: Literal["high", "low"] | None = None


class Row(BaseModel):
    """One row of a sample: everything is its own."""

    model_config = Strict
    prompt: Prompt = ""
    image: Data | None = None
    """asks for pictures like this one, if the model reads pictures"""
    model: Model = None
    """this row's arm; by default the request's"""
    strength: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    ask: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 10
    guidance: Annotated[float, Field(ge=-20.0, le=20.0)] = 3.0
    solver: Solver = "ddim"


class Sample(BaseModel):
    """POST /v1/render/sample"""

    model_config = Strict
    rows: Annotated[
        list[Any], Field(min_length=1, max_length=MAX_ROWS, json_schema_extra={"items": Row.model_json_schema()})
    ]
    """each is judged for itself"""
    model: Model = None
    user: User = None
    stream: bool = False


class Sweep(BaseModel):
    """What a counterfactual's pictures differ in."""

    model_config = Strict
    name: Annotated[str, Field(max_length=64)] = "strength"
    """`strength`, or a field of the mechanism's `ask` (dots reach into objects)"""
    values: Annotated[list[Annotated[float, Field(ge=-100, le=100)]], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0, 1.5]
    )


class Counterfactual(BaseModel):
    """POST /v1/render/counterfactual and /v1/render/edit"""

    model_config = Strict
    image: Data | None = None
    inverted: Annotated[str, Field(max_length=64)] | None = None
    """id of a finished inversion of this token, instead of a picture"""
    model: Model = None
    user: User = None
    ask: dict[str, Any] | None = None
    strength: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    sweep: Sweep = Field(default_factory=Sweep)
    guidance: Annotated[float, Field(ge=-20.0, le=20.0)] = 2.0
    against: Literal["source", "null"] = "source"
    method: Method = "fixed_point"
    levels: Annotated[int, Field(ge=1, le=MAX_LEVELS)] = diffusion.LEVELS
    iterations: Annotated[int, Field(ge=1, le=10)] = 3
    skip: Annotated[int, Field(ge=0, lt=MAX_LEVELS)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Inversion(BaseModel):
    """POST /v1/render/invert"""

    model_config = Strict
    image: Data
    model: Model = None
    user: User = None
    method: Method = "fixed_point"
    levels: Annotated[int, Field(ge=1, le=MAX_LEVELS)] = diffusion.LEVELS
    iterations: Annotated[int, Field(ge=1, le=10)] = 3
    steps: Annotated[int, Field(ge=1, le=2000)] = 100
    """Optimiser steps, for a mechanism that fits coefficients to the picture"""
    prompt: Prompt = "a person"
    """what the picture shows beside who it is, for a mechanism that fits coefficients"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Point(BaseModel):
    """POST /v1/render/point"""

    model_config = Strict
    ask: dict[str, Any] = Field(default_factory=dict)
    model: Model = None
