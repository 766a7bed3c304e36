"""What a text is searched for: how requests to `caption` say it, how it is decoded, and how a job keeps it.

    image                    a picture                     clip, frames    a clip
    sound                    a RIFF/WAVE file              goal            a prompt that is to be rewritten
    plus, minus              pictures added, words taken away
    image and sound          both at once                  image and style a picture and the look it should get

Which of them an arm takes, its task decides (`SearchWorker.check`); here is what can be read at all.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from bentos.desk import Strict
from bentos.shapes.films import stacked, unpacked
from patches.families.pictures import MAX_BYTES, read
from patches.families.search import wav
from patches.families.video.decode import Limits
from patches.families.video.decode import read as read_film
from registry.errors import BadRequest

FRAMES = 8
"""Frames of a clip that the scorer looks at, spread evenly over it"""
MAX_FRAMES = 64
MAX_PARTS = 8
"""pictures that are added, words that are taken away"""
MAX_TEXT = 500
FILM = Limits()
KINDS = ("image", "clip", "frames", "sound", "goal", "style", "plus", "minus")
TOGETHER = ({"image", "sound"}, {"image", "style"}, {"image", "minus"}, {"plus", "minus"})
"""what may be sent together; everything else comes alone"""

Base64 = Annotated[str, Field(min_length=1, max_length=MAX_BYTES * 4 // 3 + 128)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=r"\S")]


class Media(BaseModel):
    """What is described, base64 (the prefix of a `data:` URI is left out): one of them, or what goes together."""

    model_config = Strict
    image: Base64 | None = None
    clip: Annotated[str, Field(min_length=1, max_length=FILM.max_bytes * 4 // 3 + 128)] | None = None
    """a video, an animated GIF or WebP, or a zip file of pictures"""
    frames: Annotated[list[Base64], Field(min_length=2, max_length=MAX_FRAMES)] | None = None
    """a clip as pictures of one size"""
    sound: Annotated[str, Field(min_length=1, max_length=wav.MAX_BYTES * 4 // 3 + 128)] | None = None
    """a RIFF/WAVE file"""
    goal: Text | None = None
    """for arms that rewrite prompts: the prompt"""
    style: Base64 | None = None
    """for arms that transfer a style: the picture that has it"""
    plus: Annotated[list[Base64], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    """for sums: pictures that are added"""
    minus: Annotated[list[Text], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    """for sums: texts that are taken away"""


def decoded(media: Media, process: Any) -> dict[str, Any]:
    """The inputs of a scorer. process: the processor of its base. Raises Invalid for what cannot be read, BadRequest
    unless something is sent that can be one item."""
    given = [k for k in KINDS if getattr(media, k) is not None]
    if not (len(given) == 1 and given[0] not in ("style", "minus")) and set(given) not in TOGETHER:
        what = "nothing was sent" if not given else f"{' and '.join(given)} {'was' if len(given) == 1 else 'were'} sent"
        raise BadRequest(
            "Send one of image, clip, frames, sound, goal or plus; beside an image also sound, style or minus, beside "
            f"plus also minus; {what}."
        )
    one = {k: _decoded(k, getattr(media, k), process) for k in given}
    if "goal" in one:
        return {"goal": one["goal"]}
    if set(one) == {"image", "sound"}:
        return {"both": ({"pixels": one["image"]}, {"sound": one["sound"]})}
    if set(one) == {"image", "style"}:
        return {"content": _square(media.image, process), "style": one["style"]}
    if "minus" in one:
        return {"plus": one.get("plus") or [one["image"]], "minus": one["minus"]}
    return {{"sound": "sound", "plus": "plus"}.get(k, "pixels"): v for k, v in one.items()}


def _decoded(kind: str, value: Any, process: Any) -> Any:
    if kind in ("goal", "minus"):
        return value
    if kind == "sound":
        return wav.decode(unpacked(value, "sound"))
    if kind == "image":
        return process.image(read(value))
    if kind == "style":
        return _square(value, process)
    if kind == "plus":
        return [process.image(read(x)) for x in value]
    film = stacked(value, FILM) if kind == "frames" else read_film(unpacked(value), FILM)
    frames: Tensor = film.frames
    at = torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().long()
    return process.image(frames[at])


def _square(value: Any, process: Any) -> Tensor:
    """(3, H, W) uint8 at the scorer's size."""
    x: Tensor = process.shown(process.image(read(value)))[0]
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)


def packed(x: Any) -> Any:
    """Inputs as JSON has them, so that a resumed job sees what the first run saw."""
    if isinstance(x, Tensor):
        kind, x = ("uint8", x) if x.dtype == torch.uint8 else ("float32", x.float())
        data = base64.b64encode(x.contiguous().numpy().tobytes()).decode()
        return {"shape": list(x.shape), "dtype": kind, "data": data}
    if isinstance(x, Mapping):
        return {k: packed(v) for k, v in x.items()}
    return [packed(v) for v in x] if isinstance(x, list | tuple) else x


def restored(x: Any) -> Any:
    """What `packed` was given; tuples have become lists."""
    if isinstance(x, Mapping) and "data" in x:
        kind = getattr(torch, x["dtype"])
        return torch.frombuffer(bytearray(base64.b64decode(x["data"])), dtype=kind).reshape(x["shape"])
    if isinstance(x, Mapping):
        return {k: restored(v) for k, v in x.items()}
    return [restored(v) for v in x] if isinstance(x, list) else x
