"""Half-sent requests are closed in time, and there are only so many connections."""

import asyncio

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from bentos import connections


async def answer(request):
    await request.body()
    await asyncio.sleep(float(request.query_params.get("s", "0")))
    return PlainTextResponse("ok")


async def talk(port, *said, wait=5.0):
    """What comes back, and after how long the server hung up (None: it did not)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    loop = asyncio.get_running_loop()
    start, got = loop.time(), b""
    try:
        for part in said:
            writer.write(part)
            await asyncio.sleep(0.3)
        async with asyncio.timeout(wait):
            while more := await reader.read(1000):
                got += more
        return got, loop.time() - start
    except TimeoutError:
        return got, None
    except ConnectionError:
        return got, loop.time() - start
    finally:
        writer.close()


def serving(work, **limits):
    async def run(monkeypatch):
        for k, v in limits.items():
            monkeypatch.setattr(connections, k, v)
        app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
        protocol = connections.limit(AutoHTTPProtocol)
        server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, log_level="error", timeout_keep_alive=20))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.02)
        try:
            return await work(server.servers[0].sockets[0].getsockname()[1])
        finally:
            server.should_exit = True
            await task

    return run


@pytest.mark.parametrize(
    "said",
    [(), (b"GET / HT",), (b"GET / HTTP/1.1\r\nhost: x\r\n",), (b"G", b"E", b"T")],
    ids=["nothing", "a word", "a head", "slowly"],
)
def test_a_head_that_does_not_end_is_given_up(monkeypatch, said):
    _, after = asyncio.run(serving(lambda port: talk(port, *said), HEAD_S=1.2)(monkeypatch))
    assert after is not None
    assert after < 3


def test_a_slow_answer_and_a_later_request_are_no_half_sent_heads(monkeypatch):
    head = b"GET /?s=1.5 HTTP/1.1\r\nhost: x\r\n\r\n"
    got, after = asyncio.run(serving(lambda port: talk(port, head, wait=3), HEAD_S=0.8)(monkeypatch))
    assert got.endswith(b"ok")
    assert after is None  # kept alive
    later = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    got, after = asyncio.run(serving(lambda port: talk(port, later, b"GET / HT", wait=3), HEAD_S=0.8)(monkeypatch))
    assert got.endswith(b"ok")
    assert after is not None


def test_the_connection_after_the_last_is_closed(monkeypatch):
    async def work(port):
        open_ = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await asyncio.sleep(0.2)
        one_more = await talk(port, wait=2)
        for _, writer in open_:
            writer.close()
        return one_more

    got, after = asyncio.run(serving(work, MAX_CONNECTIONS=3)(monkeypatch))
    assert (got, after is not None) == (b"", True)
