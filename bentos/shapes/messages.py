"""What may be sent to `generate`: OpenAI's chats and completions, pictures as data URLs, and our own fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bentos.desk import Extra
from bentos.shapes.neutral import Body, Neutral, NeutralChat, NeutralMessage, Only
from registry.errors import BadRequest

MAX_TOKENS = 1 << 20
"""an answer's length may be named up to the model's context, and no model's is longer than this"""
MAX_ROWS = 64
"""prompts x n of one request"""
MAX_STOPS, MAX_STOP_CHARS = 4, 64


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Ask(Neutral):
    """Fields that chats and completions share."""

    model: Annotated[str, Field(max_length=200)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """up to the context; what does not fit beside the prompt is not used. 0, of a completion: only its prompt is
    scored"""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(max_length=MAX_STOP_CHARS)] | Annotated[
        list[Annotated[str, Field(max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)
    ] | None = None  # fmt: skip
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,7}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=300),
    ] | None = None  # fmt: skip
    """token id -> added to its logit"""
    user: str | None = None
    """the unit of an experiment, whatever it is"""
    patchbay: Extra = Field(default_factory=Extra)  # a default value would be copied deeply, every time
    ignore_eos: bool = False
    """decode on past the end token; for measurements"""


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str
    """a data URL; nothing is fetched"""
    detail: Literal["auto", "low", "high"] | None = None
    """accepted, and without effect here"""


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(NeutralMessage):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=256)]
    ) = ""
    """left out or null where the assistant said nothing"""
    name: str | None = None

    @model_validator(mode="after")
    def _says(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"a {self.role} message without content; only the assistant may have said nothing")
        return self

    @property
    def pictures(self) -> list[str]:
        """Data URLs of its pictures, in order."""
        parts = [] if isinstance(self.content, str) else self.content
        return [p.image_url.url for p in parts if isinstance(p, ImagePart)]

    def plain(self) -> dict[str, Any]:
        """What chat templates take: a text, or parts where there are pictures. Raises BadRequest for a picture in a
        message that is not the user's."""
        role = "system" if self.role == "developer" else self.role
        if far := next((url for url in self.pictures if not url.startswith("data:image/")), None):
            raise BadRequest(
                f"messages: image_url.url begins with {far[:24]!r}; nothing is fetched, send a data:image/ URL."
            )
        if self.pictures and role != "user":
            raise BadRequest(f"messages: a picture stands in a {self.role} message; only the user shows pictures.")
        if isinstance(self.content, str) or not self.pictures:
            text = self.content if isinstance(self.content, str) else "".join(_text(p) for p in self.content)
            return {"role": role, "content": text}
        parts = [
            {"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in self.content
        ]
        return {"role": role, "content": parts}


def _text(part: TextPart | ImagePart) -> str:
    return part.text if isinstance(part, TextPart) else ""


class Chat(Ask, NeutralChat):
    """POST /v1/chat/completions"""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    continue_final_message: bool = False
    """the last message is what the assistant has said so far: go on from there (as vLLM names it)"""


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Completion(Ask):
    """POST /v1/completions"""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_ROWS)] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=MAX_ROWS)
    ]  # fmt: skip
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    """begin the text with the prompt; with logprobs its tokens are scored, too"""
    suffix: Annotated[None, Only("")] = None


class TextEmbeddings(Body):
    """POST /v1/embeddings of a language model"""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_ROWS)] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=MAX_ROWS)
    ]  # fmt: skip
    model: Annotated[str, Field(max_length=200)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=65536)] | None = None
    """the first so many numbers, normalised again"""
    user: str | None = None
    patchbay: Extra = Field(default_factory=Extra)

    @property
    def inputs(self) -> list[Any]:
        """Texts and lists of token ids, one for each answer."""
        one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if one else list(self.input)
