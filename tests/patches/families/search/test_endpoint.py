"""An endpoint as the generator: a good answer, nonsense, HTML, nothing, an error, a hang, and nobody there."""

from __future__ import annotations

import json
import random
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from patches.families.search.config import SearchConfig
from patches.families.search.endpoint import Endpoint, Where
from patches.families.search.generators import Asked
from patches.families.search.track import Candidate
from registry.errors import ConfigError

from .world import BANK, Hidden, items, searcher


@contextmanager
def serving(status=200, body=b"", hang=0.0):
    """A server on this machine that answers every call so; its calls are kept."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            calls.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            time.sleep(hang)
            self.send_response(status)
            self.send_header("location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Where(f"http://127.0.0.1:{server.server_port}/v1", "some-model", "secret"), calls
    finally:
        server.shutdown()
        server.server_close()


def chat(text):
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 17}}).encode()


def ask(where, wait=5.0):
    config = SearchConfig(generator="endpoint", wait=wait)
    asked = Asked([Candidate("a cat", 0.4, 0, "")], 3, random.Random(0), {})
    proposing = Endpoint(where).propose([asked], config)
    while not proposing.advance():
        pass
    return proposing.results()[0]


def test_a_numbered_list_becomes_candidates():
    with serving(body=chat("1. a dog on sand\n2. a cat")) as (where, calls):
        got = ask(where)
    assert got.texts == ("a dog on sand", "a cat")
    assert got.tokens == 17
    assert calls[0]["model"] == "some-model"
    assert "0.400: a cat" in calls[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, chat("???"), "no candidate"),
        (200, chat("<html>oops</html>"), "no candidate"),
        (200, b"<html>oops</html>", "no chat completion"),
        (200, b"", "no chat completion"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, chat(None), "no candidate"),
        (500, b"", "answered 500"),
        (302, b"", "answered 302"),
        (200, b"x" * (2 << 20), "too long"),
    ],
)
def test_what_is_no_answer_is_said_and_nothing_is_raised(status, body, says):
    with serving(status, body) as (where, _):
        got = ask(where)
    assert got.texts == ()
    assert says in got.problem
    assert not got.down


def test_a_hang_ends_after_its_time_and_the_round_goes_on():
    with serving(body=chat("1. a dog"), hang=3.0) as (where, _):
        began = time.monotonic()
        got = ask(where, wait=0.3)
        assert time.monotonic() - began < 2.0
    assert "no answer within 0.3 s" in got.problem
    with serving(body=chat("1. a dog"), hang=3.0) as (where, _):
        s = searcher(Hidden(), Endpoint(where), steps=2, wait=0.2)
        made = items(s)
        s.run(made)
        assert {i.ended for i in made} == {"steps"}
        assert all(i.track.calls == len(BANK.lines) for i in made)


def test_nobody_there_is_down():
    got = ask(Where("http://127.0.0.1:9/v1"))
    assert got.down
    s = searcher(Hidden(), Endpoint(Where("http://127.0.0.1:9/v1")), steps=2)
    made = items(s)
    s.run(made)
    assert all(i.ended == "failed" and "cannot be reached" in str(i.error) and len(i.track.trace) == 1 for i in made)


def test_the_endpoint_is_named_by_the_deployment():
    assert Where.from_environment({"PATCHBAY_GENERATOR_URL": "http://a/v1/"}).url == "http://a/v1"
    for env in ({}, {"PATCHBAY_GENERATOR_URL": "file:///etc/passwd"}):
        with pytest.raises(ConfigError, match="PATCHBAY_GENERATOR_URL"):
            Where.from_environment(env)
