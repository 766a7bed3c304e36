"""The same work as the service does for a chat, in the least Starlette that can: what no server can be cheaper than."""

import orjson
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from patches.families import llm
from patches.families.llm.worker import Decoder, Row
from patches.subject import Subject


class InProcess:
    """A chat without HTTP: JSON in, template and tokens, decoding, text, JSON out. Bodies in one batch if several."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = Subject(llm.tiny())
        self.decoder = Decoder(self.model.base, self.model.applied)

    def __call__(self, *bodies: bytes) -> list[bytes]:
        asks = [orjson.loads(body) for body in bodies]
        rows = [Row(self.model.encode(a["messages"]), max_tokens=a["max_tokens"], ignore_eos=True) for a in asks]
        self.decoder.run(rows)
        return [self._answer(row) for row in rows]

    def _answer(self, row: Row) -> bytes:
        text = self.model.base.processor.decode(row.out, skip_special_tokens=True)
        usage = {"completion_tokens": len(row.out)}
        return orjson.dumps({"choices": [{"message": {"content": text}}], "usage": usage})


def application() -> Starlette:
    chat = InProcess()

    async def answer(request: Request) -> Response:
        return Response(chat(await request.body())[0], media_type="application/json")

    async def ready(_: Request) -> Response:
        return Response("ok")

    return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"]), Route("/readyz", ready)])
