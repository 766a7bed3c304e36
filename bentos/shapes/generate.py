"""The shape `generate`: a language model and its patches behind OpenAI's API; every row of a batch has its own arm.

`/v1/chat/completions` and `/v1/completions`: streaming, stop, logprobs (of the prompt, too), usage; `/v1/embeddings` of
texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from bentos import traces
from bentos.desk import DEADLINE_S, Desk, facts, headers
from bentos.http import MAX_BODY_BYTES, Call, answer, error, refuse
from bentos.runtime.arms import Choice
from bentos.shapes.answers import JOINT, About, Line, Text
from bentos.shapes.messages import MAX_ROWS, Ask, Chat, Completion, TextEmbeddings
from bentos.shapes.pieces import Pieces
from bentos.shapes.vectors import entries
from bentos.tokens import ANY
from patches.engine.patch import Patch
from patches.evidence import read_evidence, tensors
from patches.families import pictures
from patches.families.llm.worker import Row
from registry.errors import BadRequest, NotReady, PatchbayError, TooLarge, TooLong

DEFAULT_TOKENS = 128
"""an answer's length if the request names none"""
STARTS = (
    ("Repeat the word {} over and over, separated by spaces.", "window", 600, 48),
    ("Repeat {}.", "window", 64, 16),
    ("{}", "a", 8, 4),
)
"""what the page begins with, the first that fits: what the user says, a word, copies of it at most, tokens asked for"""
MAX_PICTURES = 8
"""Pictures that one chat may hold"""
MAX_CHAT_BYTES = 24 << 20
"""Bytes that a chat's body may have, its pictures included"""
Make = Callable[..., Row]
"""makes a row of one prompt (`Family.prompt`)"""
CHARS_PER_TOKEN = 16
"""Characters that a prompt may have for each token of the context: text has three to five; a prompt with more is
refused before it is tokenised"""
SHORT = 4096
"""characters that become tokens in the time another thread would take to begin"""


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

    def times(self, start: float, lines: Sequence[Line]) -> tuple[float | None, float | None]:
        """Return `latency_ms`, and the seconds to the first token."""
        return self.latency_ms(start, lines), None if self.first is None else self.first - start


class Service:
    """The routes, for one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime
        self.encoding = asyncio.Lock()
        self.start: dict[str, Any] | None = None

    @functools.cached_property
    def pieces(self) -> Pieces:
        """Tokens as answers show them."""
        return Pieces(self.runtime.base.processor)

    # ---- asking --------------------------------------------------------------------------------------------------

    async def chat(self, request: Request, ask: Chat) -> Response:
        messages = [m.plain() for m in ask.messages]
        urls = [url for m in ask.messages for url in m.pictures]
        length = request.headers.get("content-length", "0")
        if not self.runtime.subject.family.sees and length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise TooLarge(f"The body has {length} bytes; {MAX_BODY_BYTES} are allowed where no pictures are seen.")
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
        tokens = ask.max_completion_tokens or ask.max_tokens or min(DEFAULT_TOKENS, self.runtime.worker.context)
        if ask.top_logprobs is not None and not ask.logprobs:
            raise BadRequest("top_logprobs: set logprobs to true as well.")
        scores = (ask.top_logprobs or 0) if ask.logprobs else None
        return await self._answer(request, ask, [make], tokens, scores, "chat")

    async def _read(self, prompt: Any, urls: Sequence[str] = (), begun: bool = False) -> Make:
        """What makes the rows of a prompt. Pictures are decoded beside the event loop. Raises Invalid, TooLarge."""
        base, read = self.runtime.base, self.runtime.subject.family.prompt
        if read is None:
            raise BadRequest(f"{base.name} answers no prompts.")
        size = len(prompt) if isinstance(prompt, str) else sum(_letters(m) for m in prompt if isinstance(m, dict))
        if size > (most := CHARS_PER_TOKEN * self.runtime.settings.context):
            raise TooLong(f"The prompt has {size} characters; {most} are allowed. Shorten it.")
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
        rows = []
        for i, prompt in enumerate(prompts):
            make = await self._read(prompt)
            self._check_ids(i, make().prompt)
            rows.append(make)
        tokens = 16 if ask.max_tokens is None else ask.max_tokens
        return await self._answer(request, ask, rows, tokens, ask.logprobs, "text")

    async def embed_texts(self, request: Request, ask: TextEmbeddings) -> Response:
        """Unit vectors: the mean of each text's last hidden states, under one arm."""
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user)
        prompts = ask.inputs
        rows, news = [], asyncio.Event()
        loop, context = asyncio.get_running_loop(), self.runtime.worker.context

        def ring(row: Row) -> None:
            if row.finished:
                with contextlib.suppress(RuntimeError):  # after a disconnect the loop may be gone
                    loop.call_soon_threadsafe(news.set)

        for i, prompt in enumerate(prompts):
            row = (await self._read(prompt))(arm=choice.arm, strength=ask.patchbay.strength, max_tokens=0, pool=True)
            self._check_ids(i, row.prompt)
            if len(row.prompt) > context:
                raise TooLong(f"input {i} has {len(row.prompt)} tokens; {context} are allowed. Shorten it.")
            row.on_step = ring
            rows.append(row)
        await self.desk.prepare(rows, ask.patchbay.ask)
        self.runtime.submit(rows)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not all(row.finished for row in rows):
                    await news.wait()
                    news.clear()
        finally:
            for row in rows:
                if not row.finished:
                    self.runtime.cancel(row)
        if (failed := next((r.error for r in rows if r.error is not None), None)) is not None:
            await self.desk.expose(request, choice, failed.status, start)
            raise failed
        data = entries([r.pooled for r in rows if r.pooled is not None], ask.dimensions, ask.encoding_format)
        await self.desk.expose(request, choice, 200, start)
        used = sum(len(r.prompt) for r in rows)
        out = {"object": "list", "data": data, "model": self.desk.model(choice),
               "usage": {"prompt_tokens": used, "total_tokens": used}}  # fmt: skip
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    def _check_ids(self, index: int, ids: Sequence[int]) -> None:
        """Raises BadRequest for a prompt without tokens, or with one that the model has no row for."""
        size = self.runtime.base.model.config.get_text_config().vocab_size
        if not ids:
            raise BadRequest(f"prompt {index} is empty; give at least one token.")
        if max(ids) >= size:
            raise BadRequest(f"prompt {index}: token {max(ids)} is beyond the vocabulary of {size}.")

    async def about(self, request: Request, _: None) -> Response:
        """What may be sent: whether the model sees pictures, what the arm's mechanism takes as `patchbay.ask` (JSON
        schema), pictures sealed with the arm that is named (`?model=`), to begin with; how many tokens a prompt and its
        answer may have together (`context`), and a chat that fits into them (`start`)."""
        table, choice = self.desk.choice(request, request.query_params.get("model") or "champion")
        arm = self.runtime.subject.arms.get(choice.arm) if choice.arm is not None else None
        schema = arm.Ask.model_json_schema() if isinstance(arm, Patch) and arm.Ask is not None else None
        shown = await asyncio.to_thread(self._examples, choice.digest) if choice.arm is not None else []
        out = {"object": "generate", "pictures": self.runtime.subject.family.sees, "ask": schema, "examples": shown}
        out |= {"context": self.runtime.worker.context, "start": await self._start()}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def _start(self) -> dict[str, Any] | None:
        """A repeated word that this base's context holds, with its answer begun: the page's first question. None if
        no text fits."""
        if self.start is None:
            for user, word, most, tokens in STARTS:
                copies = most
                while copies:
                    chat = [{"role": "user", "content": user.format(word)}]
                    chat.append({"role": "assistant", "content": " ".join([word] * copies)})
                    with contextlib.suppress(PatchbayError):  # more text than is read at all
                        make = await self._read(chat, (), True)
                        if len(make().prompt) + tokens <= self.runtime.worker.context:
                            self.start = {"user": user, "word": word, "copies": copies, "max_tokens": tokens}
                            return self.start
                    copies = copies * 3 // 4
        return self.start

    def _examples(self, digest: str) -> list[dict[str, str]]:
        """Pictures in an artifact as PNG, with what is known of each."""
        folder = self.runtime.folder(digest)
        if not (folder / "examples.safetensors").is_file():
            return []
        said = read_evidence(folder).get("examples", [])
        images = tensors(folder, "examples.safetensors", digest)["image"]
        return [{**one, "png": pictures.png(image)} for one, image in zip(said, images, strict=True)]

    async def _answer(
        self, request: Request, ask: Ask, prompts: list[Make], tokens: int, scores: int | None, kind: str
    ) -> Response:
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user, ask.patchbay.compare)
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
        about = About(
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
            await self.desk.expose(request, choice, status, start, *news.times(start, lines))
            if isinstance(e, TimeoutError):
                raise NotReady(f"No answer within {DEADLINE_S:g} s; it was given up.") from None
            raise
        traces.used(request, about.usage(lines))
        await self.desk.expose(request, choice, 200, start, *news.times(start, lines))
        del shadow
        out = about.whole(lines, scores, _echoes(ask), self.pieces)
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
        self, ask: Ask, prompts: list[Make], tokens: int, scores: int | None, choice: Choice
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
        context = self.runtime.worker.context
        if tokens > context:
            raise BadRequest(f"max_tokens is {tokens}; this model's context has {context} tokens. Ask for fewer.")
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
                        arm=arm, strength=ask.patchbay.strength, max_tokens=tokens,
                        temperature=1.0 if ask.temperature is None else ask.temperature,
                        top_p=1.0 if ask.top_p is None else ask.top_p, seed=seed, logprobs=scores, bias=bias,
                        ignore_eos=ask.ignore_eos, score_prompt=_echoes(ask) and scores is not None,
                    )  # fmt: skip
                    row.max_tokens = min(tokens, room := context - len(row.prompt))
                    if room < min(1, tokens):
                        raise TooLong(
                            f"This model's context has {context} tokens, and {_which(p, prompts)} has "
                            f"{len(row.prompt)}. Shorten it."
                        )
                    row.on_step = ring
                    before = row.prompt[-2 * JOINT :] if _continues(ask) else ()  # a message begins anew
                    text = Text(self.runtime.base.processor, stops, before=before)
                    lines.append(Line(len(lines), p, row, text, label))
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
        self, request: Request, ask: Ask, lines: list[Line], news: News, about: About, choice: Choice,
        start: float,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        open_lines, status, scored = list(lines), 499, {line.index: 0 for line in lines}
        offsets: dict[int, int] = {}
        """line -> characters that were answered"""
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
                        upto = max(about.scores_of(line), scored[line.index])
                        first = _echoes(ask) and line.index not in offsets
                        ids, scores = about.scored(line, scored[line.index], upto, first)
                        scored[line.index], at = upto, offsets.get(line.index, 0)
                        offsets[line.index] = at + self.pieces.letters_of(ids)
                        piece = (about.echoed(line, self.pieces) if first else "") + piece
                        logprobs = about.logprobs(ids, scores, self.pieces, at) if scores else None
                        yield about.part(line, piece, logprobs=logprobs)
                    if done:
                        yield about.part(line, "", finish=line.finish)
                        open_lines.remove(line)
            status = 200  # exposed here, and nowhere else
            traces.used(request, about.usage(lines))
            await self.desk.expose(request, choice, status, start, *news.times(start, lines))
            if ask.stream_options and ask.stream_options.include_usage:
                yield about.usage_part(lines)
            yield b"data: [DONE]\n\n"
        except PatchbayError as e:
            status = e.status
            yield b"data: " + bytes(refuse(e).body) + b"\n\n"
        except TimeoutError:
            status = 504
            late = error(504, "No answer in time; it was given up.", "timeout_error")
            yield b"data: " + bytes(late.body) + b"\n\n"
        finally:
            self._cancel(lines)
            if status != 200:
                # the caller left or it failed: an exposure all the same, or slow answers would look better
                self.desk.later(self.desk.expose(request, choice, status, start, *news.times(start, lines)))

    def _shadow(
        self, request: Request, ask: Ask, prompts: list[Make], tokens: int, twin: Choice, lines: list[Line]
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
            await self.desk.expose(request, twin, status, start, *news.times(start, shadows))

        return self.desk.later(follow())

    def _cancel(self, lines: list[Line]) -> None:
        for line in lines:
            if not line.row.finished:
                self.runtime.cancel(line.row)


def _echoes(ask: Ask) -> bool:
    return isinstance(ask, Completion) and ask.echo


def _continues(ask: Ask) -> bool:
    """Whether the answer goes on where the prompt ended, in the middle of a text."""
    return not isinstance(ask, Chat) or ask.continue_final_message


def _which(index: int, prompts: Sequence[Make]) -> str:
    return f"prompt {index}" if len(prompts) > 1 else "the prompt"


def _letters(message: dict[str, Any]) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(p.get("text", "")) for p in content)


ROUTES: tuple[Call, ...] = (
    Call("POST", "/v1/chat/completions", Service.chat, "generate", Chat, MAX_CHAT_BYTES),
    Call("POST", "/v1/completions", Service.complete, "generate", Completion),
    Call("POST", "/v1/embeddings", Service.embed_texts, "generate", TextEmbeddings),
    Call("GET", "/v1/generate", Service.about, ANY),
)
