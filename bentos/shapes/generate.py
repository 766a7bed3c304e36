"""The shape `generate`: a language model and its patches behind OpenAI's API; every row of a batch has its own arm.

`/v1/chat/completions` and `/v1/completions`: streaming, stop, logprobs, usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field
from safetensors.torch import load_file
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from bentos.desk import DEADLINE_S, Desk, Extra, Strict, facts, headers
from bentos.http import ANY, Call, answer, refuse
from bentos.runtime.arms import UNIT, Choice
from patches.engine.patch import Patch
from patches.families import pictures
from patches.families.llm.worker import Row
from registry.errors import BadRequest, NotReady, PatchbayError, TooLarge

MAX_TOKENS = 1024
"""an answer's length if the request names none is DEFAULT_TOKENS; it may name up to this"""
DEFAULT_TOKENS = 128
MAX_ROWS = 64
"""prompts x n of one request"""
MAX_STOPS, MAX_STOP_CHARS = 4, 64
MAX_PICTURES = 8
"""of one chat"""
MAX_CHAT_BYTES = 24 << 20
"""of a chat's body, with its pictures"""
Make = Callable[..., Row]
"""makes a row of one prompt (`Family.prompt`)"""
CHARS_PER_TOKEN = 16
"""of a prompt, on the whole: text has three to five; what has more is refused before it is looked at"""
SHORT = 4096
"""characters that become tokens in the time another thread would take to begin"""


# ---- what may be sent --------------------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    model_config = Strict
    include_usage: bool = False
    include_obfuscation: bool = False


class Ask(BaseModel):
    """Fields that chats and completions share; what clients send and we need not act on is accepted by name."""

    model_config = Strict
    model: Annotated[str, Field(max_length=200)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
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
    user: Annotated[str, Field(pattern=rf"^{UNIT.pattern}$")] | None = None
    """the unit of an experiment: printable, without spaces"""
    patchbay: Extra = Field(default_factory=Extra)  # a default value would be copied deeply, every time
    # accepted, and without effect here
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    ignore_eos: bool = False
    """decode on past the end token; for measurements"""


class TextPart(BaseModel):
    model_config = Strict
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = Strict
    url: str
    """a data URL; nothing is fetched"""
    detail: Literal["auto", "low", "high"] | None = None
    """accepted, and without effect here"""


class ImagePart(BaseModel):
    model_config = Strict
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    model_config = Strict
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=256)]
    name: str | None = None

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


class Chat(Ask):
    """POST /v1/chat/completions"""

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
    suffix: None = None
    best_of: Literal[1] | None = None


# ---- from tokens to text -----------------------------------------------------------------------------------------


@dataclass
class Text:
    """One row's text as it grows: whole characters only, cut before a stop string."""

    tokenizer: Any
    stops: Sequence[str]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """everything decoded"""
    given: int = 0
    """characters handed out"""
    stopped: bool = False
    _from: int = 0
    _to: int = 0

    def push(self, ids: Sequence[int]) -> None:
        """Decode new tokens, with the few before them as context (a token's text may depend on its neighbour)."""
        self.ids.extend(ids)
        before, now = self._decode(self._to), self._decode(len(self.ids))
        if len(now) > len(before) and not now.endswith("\ufffd"):  # else: half a character, wait for the rest
            self.text += now[len(before) :]
            self._from, self._to = self._to, len(self.ids)
            self._cut()

    def end(self) -> None:
        """No more tokens: what was held back is text now."""
        if not self.stopped and self._to < len(self.ids):
            self.text += self._decode(len(self.ids))[len(self._decode(self._to)) :]
            self._cut()

    def take(self, last: bool = False) -> str:
        """Text not handed out yet, less what may still become a stop string."""
        upto = len(self.text)
        if not last and not self.stopped:
            upto -= max((n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        piece = self.text[self.given : upto]
        self.given = max(self.given, upto)
        return piece

    def _decode(self, to: int) -> str:
        ids = self.ids[self._from : to]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _cut(self) -> None:
        found = [at for s in self.stops if (at := self.text.find(s)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True


class News(asyncio.Event):
    """Set when there is something to do for a request."""

    first: float | None = None
    """when its first token came"""

    def latency_ms(self, start: float, lines: Sequence[Line]) -> float | None:
        """To the first token, and per token after it: what does not grow with the answer that was asked for."""
        if self.first is None:
            return None
        tokens = max(len(line.row.out) for line in lines)
        return 1e3 * ((self.first - start) + (time.perf_counter() - self.first) / max(1, tokens - 1))


@dataclass
class Line:
    """One choice of one answer: a row being decoded, and its text."""

    index: int
    prompt: int
    row: Row
    text: Text
    arm: str
    seen: int = 0
    """tokens already turned into text"""

    @property
    def finish(self) -> str | None:
        if self.text.stopped:
            return "stop"
        return "length" if self.row.finished == "length" else "stop" if self.row.finished else None


class Service:
    """The routes, for one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime
        self.encoding = asyncio.Lock()

    # ---- asking --------------------------------------------------------------------------------------------------

    async def chat(self, request: Request, ask: Chat) -> Response:
        messages = [m.plain() for m in ask.messages]
        urls = [url for m in ask.messages for url in m.pictures]
        if not urls and not any(m["content"].strip() for m in messages):
            raise BadRequest("messages: all of them are empty; say something.")
        if ask.continue_final_message and messages[-1]["role"] != "assistant":
            raise BadRequest("continue_final_message: the last message must be the assistant's.")
        try:
            make = await self._read(messages, urls, ask.continue_final_message)
        except PatchbayError:
            raise
        except Exception as e:  # a model's own template may refuse an order of roles
            raise BadRequest(f"messages: this model's chat template refuses them ({str(e)[:120]}).") from None
        tokens = ask.max_completion_tokens or ask.max_tokens
        if ask.top_logprobs is not None and not ask.logprobs:
            raise BadRequest("top_logprobs: set logprobs to true as well.")
        scores = (ask.top_logprobs or 0) if ask.logprobs else None
        return await self._answer(request, ask, [make], tokens, scores, "chat")

    async def _read(self, prompt: Any, urls: Sequence[str] = (), begun: bool = False) -> Make:
        """What makes the rows of a prompt. Pictures are decoded beside the event loop. Raises Invalid, TooLarge."""
        base, read = self.runtime.base, self.runtime.subject.family.prompt
        if read is None:
            raise BadRequest(f"{base.name} answers no prompts.")
        size = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt if isinstance(m, dict))
        if size > (most := CHARS_PER_TOKEN * self.runtime.settings.context):
            raise TooLarge(f"The prompt has {size} characters; {most} are allowed. Shorten it.")
        if not urls and size <= SHORT and not self.encoding.locked():
            return read(base, prompt, (), begun)
        if not urls:
            async with self.encoding:  # long prompts one at a time, beside the event loop
                return await asyncio.to_thread(read, base, prompt, (), begun)
        if len(urls) > MAX_PICTURES:
            raise BadRequest(f"messages: {len(urls)} pictures; {MAX_PICTURES} at most.")
        budget = pictures.Budget()
        return await asyncio.to_thread(lambda: read(base, prompt, [pictures.read(url, budget) for url in urls], begun))

    async def complete(self, request: Request, ask: Completion) -> Response:
        prompts: list[Any]
        if isinstance(ask.prompt, str):
            prompts = [ask.prompt]
        else:
            prompts = [ask.prompt] if isinstance(ask.prompt[0], int) else list(ask.prompt)
        size = self.runtime.base.model.config.get_text_config().vocab_size
        rows = []
        for i, prompt in enumerate(prompts):
            make = await self._read(prompt)
            ids = make().prompt
            if not ids:
                raise BadRequest(f"prompt {i} is empty; give at least one token.")
            if max(ids) >= size:
                raise BadRequest(f"prompt {i}: token {max(ids)} is beyond the vocabulary of {size}.")
            rows.append(make)
        return await self._answer(request, ask, rows, ask.max_tokens or 16, ask.logprobs, "text")

    async def about(self, request: Request, _: None) -> Response:
        """What may be sent: whether the model sees pictures, what the arm's mechanism takes as `patchbay.ask` (JSON
        schema), and pictures sealed with the arm that is named (`?model=`), to begin with."""
        table, choice = self.desk.choice(request, request.query_params.get("model") or "champion")
        arm = self.runtime.subject.arms.get(choice.arm) if choice.arm is not None else None
        schema = arm.Ask.model_json_schema() if isinstance(arm, Patch) and arm.Ask is not None else None
        shown = await asyncio.to_thread(self._examples, choice.digest) if choice.arm is not None else []
        out = {"object": "generate", "pictures": self.runtime.subject.family.sees, "ask": schema, "examples": shown}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    def _examples(self, digest: str) -> list[dict[str, str]]:
        """Pictures in an artifact as PNG, with what is known of each."""
        folder = self.runtime.folder(digest)
        if not (folder / "examples.safetensors").is_file():
            return []
        said = json.loads((folder / "evidence.json").read_text()).get("examples", [])
        images = load_file(folder / "examples.safetensors")["image"]
        return [{**one, "png": pictures.png(image)} for one, image in zip(said, images, strict=True)]

    async def _answer(
        self, request: Request, ask: Ask, prompts: list[Make], tokens: int | None, scores: int | None, kind: str
    ) -> Response:
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user)
        self.desk.check_compare(request, ask.patchbay.compare)
        if ask.patchbay.compare and ask.stream:
            raise BadRequest("patchbay.compare: not with stream; send two requests.")
        lines, news = self._lines(ask, prompts, tokens, scores, choice)
        named = headers(table, choice)
        shadow = None
        try:
            await self._say(lines, ask)
            self.runtime.submit([line.row for line in lines])
            if (twin := self.desk.twin(choice)) is not None:
                shadow = self._shadow(request, ask, prompts, tokens, twin, lines)
        except PatchbayError as e:
            await self.desk.expose(request, choice, e.status, start)
            raise
        about = _About(
            kind, f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{request.state.number}", self.desk.model(choice)
        )
        if ask.stream:
            body = self._stream(request, ask, lines, news, about, choice, start)
            return StreamingResponse(body, headers=named, media_type="text/event-stream")
        try:
            while any(line.finish is None for line in lines):
                await self._receive(request, lines, news, start)
        except (TimeoutError, asyncio.CancelledError, PatchbayError) as e:
            self._cancel(lines)
            status = getattr(e, "status", 504)
            await self.desk.expose(request, choice, status, start, news.latency_ms(start, lines))
            if isinstance(e, TimeoutError):
                raise NotReady(f"No answer within {DEADLINE_S:g} s; it was given up.") from None
            raise
        await self.desk.expose(request, choice, 200, start, news.latency_ms(start, lines))
        del shadow
        out = about.whole(lines, scores, getattr(ask, "echo", False), self.runtime.base.processor)
        out["patchbay"] = facts(table, choice)
        return answer(out, headers=named)

    async def _say(self, lines: list[Line], ask: Ask) -> None:
        """Let patched rows say what the request asks of their mechanism; rows of one prompt and arm say the same."""
        first: dict[tuple[int, str | None], Line] = {}
        for line in lines:
            first.setdefault((line.prompt, line.row.arm), line)
        await self.desk.prepare([line.row for line in first.values()], ask.patchbay.ask)
        for line in lines:
            said = first[line.prompt, line.row.arm].row
            line.row.params, line.row.told = said.params, said.told

    def _lines(
        self, ask: Ask, prompts: list[Make], tokens: int | None, scores: int | None, choice: Choice
    ) -> tuple[list[Line], News]:
        """The rows of a request, and the event their decoding sets when there is something to do here."""
        n = ask.n or 1
        arms = [(choice.arm, choice.label)]
        if ask.patchbay.compare:
            arms.insert(0, (None, "base"))
        if len(prompts) * n * len(arms) > MAX_ROWS:
            raise TooLarge(f"{len(prompts)} prompts x n={n} are more than {MAX_ROWS} rows.")
        stops = [ask.stop] if isinstance(ask.stop, str) else ask.stop or []
        if "" in stops:
            raise BadRequest("stop: an empty string would stop everything; leave it out.")
        size = self.runtime.base.model.config.get_text_config().vocab_size
        bias = {}
        for token, add in (ask.logit_bias or {}).items():
            if int(token) >= size:
                raise BadRequest(f"logit_bias: {token[:20]!r} is no token id below {size}.")
            bias[int(token)] = float(add)
        news = News()
        loop = asyncio.get_running_loop()
        lines: list[Line] = []
        each = bool(ask.stream or stops)
        """whether every token is of interest; if not, waking up for each would cost more than a small model does"""

        def ring(row: Row) -> None:
            if news.first is None:
                news.first = time.perf_counter()
            if each or row.finished:
                # after a disconnect the loop may be gone; then nobody waits
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(news.set)

        for p, prompt in enumerate(prompts):
            for arm, label in arms:
                for i in range(n):
                    seed = None if ask.seed is None else (ask.seed + i) % 2**63
                    row = prompt(
                        arm=arm, strength=ask.patchbay.strength, max_tokens=tokens or DEFAULT_TOKENS,
                        temperature=1.0 if ask.temperature is None else ask.temperature,
                        top_p=1.0 if ask.top_p is None else ask.top_p, seed=seed, logprobs=scores, bias=bias,
                        ignore_eos=ask.ignore_eos,
                    )  # fmt: skip
                    row.on_step = ring
                    lines.append(Line(len(lines), p, row, Text(self.runtime.base.processor, stops), label))
        return lines, news

    async def _receive(self, request: Request, lines: list[Line], news: News, start: float) -> None:
        """Wait for news, and turn new tokens into text. Raises if the caller has gone, or the deadline has passed."""
        try:
            if not news.is_set():
                async with asyncio.timeout(1.0):
                    await news.wait()
            news.clear()
        except TimeoutError:
            if time.perf_counter() - start > DEADLINE_S:
                raise
            if await request.is_disconnected():
                raise asyncio.CancelledError from None
        for line in lines:
            if line.text.stopped:
                continue
            end = line.row.finished
            if end == "failed":
                raise line.row.error or NotReady("Decoding failed for this request; it is in the log. Try again.")
            upto = len(line.row.out) - (end == "stop")  # the end token itself is no text
            if upto > line.seen:
                line.text.push(line.row.out[line.seen : upto])
                line.seen = upto
            if end:
                line.text.end()
            elif line.text.stopped:
                self.runtime.cancel(line.row)

    async def _stream(
        self, request: Request, ask: Ask, lines: list[Line], news: News, about: _About, choice: Choice,
        start: float,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        open_lines, status, scored = list(lines), 499, {line.index: 0 for line in lines}
        try:
            if about.kind == "chat":
                for line in lines:
                    yield about.part(line, "", role=True)
            while open_lines:
                await self._receive(request, open_lines, news, start)
                for line in list(open_lines):
                    done = line.finish is not None
                    piece = line.text.take(last=done)
                    if piece or done:
                        upto = max(line.seen, scored[line.index])
                        scores = line.row.scores[scored[line.index] : upto]
                        ids = line.row.out[scored[line.index] : upto]
                        scored[line.index] = upto
                        logprobs = about.logprobs(ids, scores, self.runtime.base.processor) if scores else None
                        yield about.part(line, piece, logprobs=logprobs)
                    if done:
                        yield about.part(line, "", finish=line.finish)
                        open_lines.remove(line)
            status = 200
            await self.desk.expose(request, choice, status, start, news.latency_ms(start, lines))
            choice = Choice(choice.label, choice.digest)  # exposed once
            if ask.stream_options and ask.stream_options.include_usage:
                yield about.usage_part(lines)
            yield b"data: [DONE]\n\n"
        except PatchbayError as e:
            status = e.status
            yield b"data: " + bytes(refuse(e).body) + b"\n\n"
        except TimeoutError:
            status = 504
            yield b'data: {"error":{"message":"No answer in time; it was given up.","type":"timeout_error"}}\n\n'
        finally:
            self._cancel(lines)
            if choice.experiment is not None:
                # the caller left or it failed: an exposure all the same, or slow answers would look better
                self.desk.later(self.desk.expose(request, choice, status, start, news.latency_ms(start, lines)))

    def _shadow(
        self, request: Request, ask: Ask, prompts: list[Make], tokens: int | None, twin: Choice, lines: list[Line]
    ) -> asyncio.Task[None]:
        """Decode the treatment beside the control, without anybody waiting for it."""
        shadows, news = self._lines(ask, prompts, tokens, None, twin)
        if not ask.patchbay.ask:
            self.runtime.submit([line.row for line in shadows])
        number, start = request.state.number, time.perf_counter()

        async def follow() -> None:
            async with asyncio.timeout(DEADLINE_S):
                if ask.patchbay.ask:
                    await self._say(shadows, ask)
                    self.runtime.submit([line.row for line in shadows])
                while any(line.finish is None for line in (*shadows, *lines)):
                    with contextlib.suppress(TimeoutError):  # the control may end last, and rings elsewhere
                        await asyncio.wait_for(news.wait(), 0.2)
                    news.clear()
                    for line in shadows:
                        upto = len(line.row.out) - (line.row.finished == "stop")
                        line.text.push(line.row.out[line.seen : upto])
                        line.seen = max(line.seen, upto)
                        if line.row.finished:
                            line.text.end()
            control, treatment = ([line.text.text for line in side] for side in (lines, shadows))
            self.desk.keep(number, twin, control, treatment)
            status = max([line.row.error.status for line in shadows if line.row.error], default=200)
            await self.desk.expose(request, twin, status, start, news.latency_ms(start, shadows))

        return self.desk.later(follow())

    def _cancel(self, lines: list[Line]) -> None:
        for line in lines:
            if not line.row.finished:
                self.runtime.cancel(line.row)


@dataclass(frozen=True)
class _About:
    """What every part of one answer repeats."""

    kind: str
    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def whole(self, lines: list[Line], scores: int | None, echo: bool, tokenizer: Any) -> dict[str, Any]:
        choices = []
        for line in lines:
            text = line.text.text
            logprobs = self.logprobs(line.row.out[: line.seen], line.row.scores[: line.seen], tokenizer)
            one: dict[str, Any] = {"index": line.index, "finish_reason": line.finish}
            one["logprobs"] = logprobs if scores is not None else None
            if self.kind == "chat":
                one["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                echoed = tokenizer.decode(line.row.prompt, skip_special_tokens=True) if echo else ""
                one["text"] = echoed + text
            if len({entry.arm for entry in lines}) > 1:
                one["arm"] = line.arm
            if line.row.told:
                one["patchbay"] = line.row.told
            choices.append(one)
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self.head(name), "choices": choices, "usage": self.usage(lines)}

    def part(
        self, line: Line, text: str, *, role: bool = False, finish: str | None = None, logprobs: Any = None
    ) -> bytes:
        one: dict[str, Any] = {"index": line.index, "finish_reason": finish, "logprobs": logprobs}
        if self.kind == "chat":
            one["delta"] = (
                {"role": "assistant", "content": ""} if role else {"content": text} if text or not finish else {}
            )
        else:
            one["text"] = text
        if line.row.told and (role or (finish and self.kind != "chat")):
            one["patchbay"] = line.row.told
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return b"data: " + orjson.dumps({**self.head(name), "choices": [one]}) + b"\n\n"

    def usage_part(self, lines: list[Line]) -> bytes:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return b"data: " + orjson.dumps({**self.head(name), "choices": [], "usage": self.usage(lines)}) + b"\n\n"

    @staticmethod
    def usage(lines: list[Line]) -> dict[str, int]:
        asked = sum(len(line.row.prompt) for line in {line.prompt: line for line in lines}.values())
        made = sum(len(line.row.out) for line in lines)
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}

    def logprobs(self, ids: Sequence[int], scores: Sequence[Any], tokenizer: Any) -> dict[str, Any]:
        def token(i: int, score: float) -> dict[str, Any]:
            text = tokenizer.decode([i])
            return {"token": text, "logprob": score, "bytes": list(text.encode())}

        parts = [
            {**token(i, score), "top_logprobs": [token(j, s) for j, s in best]}
            for i, (score, best) in zip(ids, scores, strict=False)
        ]
        if self.kind == "chat":
            return {"content": parts, "refusal": None}
        offsets, at = [], 0
        for p in parts:
            offsets.append(at)
            at += len(p["token"])
        return {
            "tokens": [p["token"] for p in parts],
            "token_logprobs": [p["logprob"] for p in parts],
            "top_logprobs": [{t["token"]: t["logprob"] for t in p["top_logprobs"]} for p in parts],
            "text_offset": offsets,
        }


ROUTES: tuple[Call, ...] = (
    Call("POST", "/v1/chat/completions", "chat", "generate", Chat, MAX_CHAT_BYTES),
    Call("POST", "/v1/completions", "complete", "generate", Completion),
    Call("GET", "/v1/generate", "about", ANY),
)
