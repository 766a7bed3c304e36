"""Bad input gets a 4xx that names the value, for its own row only; strangers get nothing."""

import asyncio
import contextvars
import json

import pytest

from bentos.launch import serve
from bentos.shapes.generate import MAX_CHAT_BYTES
from bentos.shapes.messages import MAX_TOKENS
from bentos.tokens import CALLER, SHADOWED, Bucket, Token, Tokens, charge_rows
from patches.families.worker import Job
from registry.errors import ConfigError, TooMany

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
BAD = {
    "an unknown key": ({**ASK, "colour": "red"}, 400, "colour"),
    "a wrong type": ({**ASK, "max_tokens": "four"}, 400, "four"),
    "a boolean for a number": ({**ASK, "max_tokens": True}, 400, "max_tokens"),
    "no messages": ({"messages": []}, 400, "messages"),
    "an empty message": ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
    "a message that is none": ({"messages": ["hello"]}, 400, "hello"),
    "too many tokens": ({**ASK, "max_tokens": MAX_TOKENS + 1}, 400, str(MAX_TOKENS)),
    "no tokens": ({**ASK, "max_tokens": 0}, 400, "max_tokens"),
    "a prompt beyond the context": ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "512 tokens"),
    "an unknown model": ({**ASK, "model": "gpt-9"}, 404, "gpt-9"),
    "an unknown digest": ({**ASK, "model": "sha256:" + "0" * 64}, 404, "000000"),
    "a strength beyond its range": ({**ASK, "patchbay": {"strength": 9}}, 400, "strength"),
    "a hot temperature": ({**ASK, "temperature": 5}, 400, "temperature"),
    "a token that is none in logit_bias": ({**ASK, "logit_bias": {"999999": 1}}, 400, "999999"),
    "a word in logit_bias": ({**ASK, "logit_bias": {"cat": 1}}, 400, "cat"),
    "an empty stop": ({**ASK, "stop": ""}, 400, "stop"),
    "too many stops": ({**ASK, "stop": ["a"] * 9}, 400, "stop"),
    "tools": ({**ASK, "tools": [{"type": "function"}]}, 400, "tools"),
    "more tokens than the context": ({**ASK, "max_tokens": 600}, 400, "512 tokens"),
    "too many choices": ({**ASK, "n": 100}, 400, "n"),
    "top_logprobs alone": ({**ASK, "top_logprobs": 3}, 400, "logprobs"),
    "a stream to compare": ({**ASK, "stream": True, "patchbay": {"compare": True}}, 400, "stream"),
}
RAW = {
    "not JSON": (b"{", 400, "not JSON"),
    "NaN": (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, "not JSON"),
    "a number too large": (b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}', 400, ""),
    "a list": (b"[]", 400, "object"),
    "deep nesting": (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400, ""),
    "not UTF-8": (b'{"model":"\xff\xfe"}', 400, "not JSON"),
    "a huge body": (b'{"model":"' + b"x" * (MAX_CHAT_BYTES + 1) + b'"}', 413, str(MAX_CHAT_BYTES)),
}
COMPLETIONS = {
    "an empty prompt": ({"prompt": ""}, 400, "empty"),
    "an empty list": ({"prompt": []}, 400, "prompt"),
    "an empty prompt among others": ({"prompt": ["a", ""]}, 400, "prompt 1"),
    "a token beyond the vocabulary": ({"prompt": [5, 99999]}, 400, "99999"),
    "a negative token": ({"prompt": [-1]}, 400, "prompt"),
    "too many rows": ({"prompt": ["a"] * 60, "n": 8}, 413, "rows"),
    "mixed prompts": ({"prompt": ["a", 1]}, 400, "prompt"),
}


def test_every_bad_request_is_refused_by_name_and_neighbours_do_not_notice(service):
    async def work():
        async with service() as s:
            want = (await s.chat("calm")).json()["choices"][0]["message"]["content"]
            calm = [asyncio.create_task(s.chat("calm")) for _ in range(8)]
            problems = []
            for path, table in (("/v1/chat/completions", BAD), ("/v1/completions", COMPLETIONS)):
                for name, (body, status, says) in table.items():
                    got = await s.http.post(path, json=body)
                    message = got.json()["error"]["message"]
                    if got.status_code != status or says not in message or "Traceback" in got.text:
                        problems.append((name, got.status_code, message))
            for name, (raw, status, says) in RAW.items():
                got = await s.http.post(
                    "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
                )
                message = got.json()["error"]["message"]
                if got.status_code != status or says not in message:
                    problems.append((name, got.status_code, message))
            assert problems == []
            for task in calm:
                assert (await task).json()["choices"][0]["message"]["content"] == want
            assert s.runtime.queued == 0

    asyncio.run(work())


def test_what_is_not_json_by_its_header_is_415(service):
    async def work():
        async with service() as s:
            got = await s.http.post(
                "/v1/chat/completions", content=json.dumps(ASK), headers={"content-type": "text/plain"}
            )
            assert got.status_code == 415
            assert (await s.http.get("/v1/chat/completions")).status_code == 405
            assert (await s.http.get("/../../etc/passwd")).status_code == 404

    asyncio.run(work())


@pytest.mark.parametrize("unit", ["", "a b", "x" * 200])
def test_a_unit_that_cannot_be_one_is_refused(service, unit):
    async def work():
        async with service() as s:
            got = await s.chat(headers={"x-patchbay-unit": unit})
            assert got.status_code in ((200,) if not unit.strip() else (400,))

    asyncio.run(work())


def test_tokens_scopes_and_rates(service, tokens):
    known = tokens(
        all={"name": "all", "scopes": ["generate", "compare", "outcomes", "metrics"]},
        some={"name": "some", "scopes": ["generate"]},
        slow={"name": "slow", "scopes": ["generate"], "per_minute": 6},
    )

    async def work():
        async with service(tokens=known) as s:

            async def status(token, **more):
                return (
                    await s.chat(headers={"authorization": f"Bearer {token}"} if token else None, **more)
                ).status_code

            assert await status(None) == 401
            assert await status("wrong") == 401
            assert await status("some") == 200
            assert await status("some", patchbay={"compare": True}) == 403
            assert await status("all", patchbay={"compare": True}) == 200
            assert (await s.http.get("/metrics")).status_code == 401
            assert (await s.http.get("/livez")).status_code == 200
            assert [await status("slow") for _ in range(3)][-1] == 429

    asyncio.run(work())


def test_quotas_of_rows_and_calls_say_when_to_come_back(service, tokens):
    known = tokens(
        rows={"name": "rows", "scopes": ["generate", "compare"], "rows_per_minute": 4},
        day={"name": "day", "scopes": ["generate"], "per_day": 2},
        free={"name": "free", "scopes": ["generate"]},
    )

    async def work():
        async with service(tokens=known) as s:

            async def ask(token, **more):
                return await s.chat(headers={"authorization": f"Bearer {token}"}, **more)

            assert (await ask("rows", n=3)).status_code == 200
            over = await ask("rows", n=2)
            assert over.status_code == 429
            assert "4 rows a minute" in over.json()["error"]["message"]
            assert 1 <= int(over.headers["retry-after"]) <= 15
            assert (await ask("rows")).status_code == 200  # what was refused was not charged
            assert (await ask("free", n=8)).status_code == 200
            assert [(await ask("day")).status_code for _ in range(3)] == [200, 200, 429]
            assert int((await ask("day")).headers["retry-after"]) > 3600

    asyncio.run(work())


def test_a_bucket_refills_and_what_is_larger_than_it_is_made_up_for():
    bucket = Bucket(1.0, 10.0, 10.0)
    assert bucket.take(25) == 0.0
    assert 15.9 < bucket.take(1) <= 16.0
    bucket.at -= 16.5
    assert bucket.take(1) == 0.0


def test_the_treatment_of_a_shadow_is_not_charged():
    token = Token("t", frozenset(), {"rows_per_minute": Bucket(1.0, 2.0, 2.0)})

    def work():
        CALLER.set(token)
        SHADOWED.set("b" * 64)
        charge_rows([Job(arm="b" * 64)] * 50)
        charge_rows([Job(arm="a" * 64), Job(arm=None)])
        with pytest.raises(TooMany):
            charge_rows([Job(arm=None)])

    contextvars.copy_context().run(work)


@pytest.mark.parametrize("rate", [-1, float("inf"), "many"])
def test_a_quota_that_is_none_is_refused(tokens, rate):
    with pytest.raises(ConfigError, match="cannot be read"):
        tokens(a={"name": "a", "scopes": ["generate"], "rows_per_day": rate})


def test_serving_to_the_network_without_tokens_is_refused(monkeypatch):
    monkeypatch.delenv("PATCHBAY_TOKENS", raising=False)
    with pytest.raises(ConfigError, match="open to everybody"):
        serve("clip_sae", host="0.0.0.0")


def test_a_token_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "t.json").write_text('{"short": {"name": "x"}}')
    with pytest.raises(ConfigError, match=r"t\.json cannot be read"):
        Tokens(tmp_path / "t.json")


def test_a_full_queue_says_come_back(service, monkeypatch):
    monkeypatch.setattr("bentos.runtime.worker.QUEUE", 0)

    async def work():
        async with service() as s:
            got = await s.chat()
            assert got.status_code == 429
            assert got.headers["retry-after"]

    asyncio.run(work())
