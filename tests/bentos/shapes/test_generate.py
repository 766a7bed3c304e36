import asyncio
import json
import random
import re

import openai
import pytest

from bentos.shapes.generate import Text
from patches.families import llm
from patches.mechanisms.sink import SinkEdit
from patches.subject import Subject
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.experiment import CONTROL, TREATMENT
from tests.bentos.conftest import CONFIGS, SYSTEM, seal


def client(s):
    return openai.AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=s.http)


def test_the_openai_client_works_unchanged(service):
    async def work():
        async with service() as s:
            ask = [{"role": "user", "content": "hello"}]
            one = await client(s).chat.completions.create(
                model="base", messages=ask, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2, user="u1"
            )
            assert one.choices[0].message.role == "assistant"
            assert one.usage.completion_tokens == 6
            assert len(one.choices[0].logprobs.content) == 6
            assert len(one.choices[0].logprobs.content[0].top_logprobs) == 2
            parts = [
                p
                async for p in await client(s).chat.completions.create(
                    model="base", messages=ask, max_tokens=6, temperature=0, stream=True,
                    stream_options={"include_usage": True},
                )
            ]  # fmt: skip
            text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
            assert text == one.choices[0].message.content
            assert parts[-1].usage.completion_tokens == 6
            done = await client(s).completions.create(
                model="champion", prompt=["ab", "cd"], max_tokens=4, temperature=0, logprobs=1, n=1
            )
            assert [c.index for c in done.choices] == [0, 1]
            assert len(done.choices[0].logprobs.tokens) == 4
            names = [m.id for m in (await client(s).models.list()).data]
            assert {"base", "champion", "challenger"} <= set(names)

    asyncio.run(work())


def test_the_openai_client_gets_choices_seeds_stops_and_logprobs(service):
    async def work():
        async with service() as s:
            ai, ask = client(s), [{"role": "user", "content": "hello"}]
            how = {"model": "base", "messages": ask, "max_tokens": 12, "temperature": 1.2, "seed": 7, "n": 3,
                   "extra_body": {"ignore_eos": True}}  # fmt: skip
            one, two = [await ai.chat.completions.create(**how) for _ in range(2)]
            texts = [c.message.content for c in one.choices]
            assert texts == [c.message.content for c in two.choices]
            assert len(set(texts)) == 3
            assert (
                one.usage.completion_tokens == sum(len(t) > 0 for t in texts) * 12 or one.usage.completion_tokens < 36
            )
            other = await ai.chat.completions.create(**{**how, "seed": 8})
            assert texts != [c.message.content for c in other.choices]

            greedy = {"model": "champion", "prompt": ["ab", "cd"], "max_tokens": 10, "temperature": 0}
            whole = await ai.completions.create(**greedy, n=2)
            assert [c.index for c in whole.choices] == [0, 1, 2, 3]
            streamed = dict.fromkeys(range(4), "")
            async for part in await ai.completions.create(**greedy, n=2, stream=True):
                for choice in part.choices:
                    streamed[choice.index] += choice.text
            assert list(streamed.values()) == [c.text for c in whole.choices]

            text = whole.choices[0].text
            stopped = await ai.completions.create(**{**greedy, "prompt": "ab"}, stop=[text[2:5]])
            assert stopped.choices[0].text == text[: text.index(text[2:5])]
            assert stopped.choices[0].finish_reason == "stop"

            scored = {"model": "base", "messages": ask, "max_tokens": 6, "temperature": 0}
            whole = await ai.chat.completions.create(**scored, logprobs=True, top_logprobs=3)
            parts = [p async for p in await ai.chat.completions.create(
                **scored, logprobs=True, top_logprobs=3, stream=True
            )]  # fmt: skip
            tokens = [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
            assert tokens == whole.choices[0].logprobs.content
            assert all(t.logprob == t.top_logprobs[0].logprob <= 0 for t in tokens)  # greedy: the likeliest

            raw = await ai.chat.completions.with_raw_response.create(
                **scored, extra_headers={"x-patchbay-arm": "champion"}
            )
            assert raw.headers["x-patchbay-patch"] == s.digests[0]

    asyncio.run(work())


def test_the_openai_client_raises_its_own_errors(service, tokens):
    known = tokens(good={"name": "good", "scopes": ["generate"]}, slow={"name": "slow", "per_minute": 6})

    async def work():
        async with service(tokens=known) as s:

            def call(key, **how):
                ai = openai.AsyncOpenAI(base_url="http://here/v1", api_key=key, http_client=s.http, max_retries=0)
                ask = [{"role": "user", "content": "x"}]
                return ai.chat.completions.create(**{"model": "base", "messages": ask, "max_tokens": 1, **how})

            async def raised(error, key="good", **how):
                with pytest.raises(error) as e:
                    await call(key, **how)
                return e.value

            assert "gpt-9" in (await raised(openai.NotFoundError, model="gpt-9")).message
            bad = await raised(openai.BadRequestError, temperature=9)
            assert (bad.param, bad.type) == ("temperature", "invalid_request_error")
            assert (await raised(openai.AuthenticationError, "strange")).status_code == 401
            compare = {"extra_body": {"patchbay": {"compare": True}}}
            assert "compare" in (await raised(openai.PermissionDeniedError, **compare)).message
            await call("slow")
            assert (await raised(openai.RateLimitError, "slow")).response.headers["retry-after"]
            assert "512" in (await raised(openai.BadRequestError, max_tokens=1000)).message

    asyncio.run(work())


def test_each_arm_answers_as_its_patch_does_alone(service, tiny_llm):
    async def work():
        async with service() as s:
            texts = [f"tell me {i} " + "again " * i for i in range(6)]
            arms = ["base", "champion", "challenger"]
            asks = [(t, a) for t in texts for a in arms]
            got = await asyncio.gather(*(s.chat(t, model=a, max_tokens=12) for t, a in asks))
            return asks, [(g.json()["choices"][0]["message"]["content"], dict(g.headers)) for g in got], s.digests

    asks, got, digests = asyncio.run(work())
    model = Subject(tiny_llm, {d: SinkEdit(c, {}) for d, c in zip(digests, CONFIGS, strict=True)})
    arm_of = {"base": None, "champion": digests[0], "challenger": digests[1]}
    try:
        for (text, arm), (answer, headers) in zip(asks, got, strict=True):
            want = llm.generate(model, [[{"role": "user", "content": text}]], max_tokens=12, arm=arm_of[arm])[0]
            assert answer == want
            assert headers["x-patchbay-patch"] == (arm_of[arm] or "base")
            assert headers["x-patchbay-arm"] == arm
        differ = {a for (_, a), (answer, _) in zip(asks, got, strict=True)}
        assert len({g[0] for g in got[:3]}) > 1
        assert differ == set(arms_seen(asks))
    finally:
        model.close()


def arms_seen(asks):
    return [a for _, a in asks]


def test_sixty_four_callers_with_random_arms_get_no_wrong_row(service, tiny_llm):
    async def work():
        async with service() as s:
            rng = random.Random(0)
            text = "repeat repeat repeat"
            alone = {}
            for arm in ("base", "champion", "challenger"):
                alone[arm] = (await s.chat(text, model=arm, max_tokens=10)).json()["choices"][0]["message"]["content"]
            arms = [rng.choice(list(alone)) for _ in range(64)]
            got = await asyncio.gather(*(s.chat(text, model=a, max_tokens=10) for a in arms))
            wrong = sum(
                g.json()["choices"][0]["message"]["content"] != alone[a] for g, a in zip(got, arms, strict=True)
            )
            assert wrong == 0
            assert len(set(alone.values())) == 3

    asyncio.run(work())


def test_strength_scales_and_compare_shows_both(service):
    async def work():
        async with service() as s:
            base = (await s.chat(model="base")).json()["choices"][0]["message"]["content"]
            zero = await s.chat(model="champion", patchbay={"strength": 0.0})
            assert zero.json()["choices"][0]["message"]["content"] == base
            both = (await s.chat(model="champion", patchbay={"compare": True})).json()["choices"]
            assert [c["arm"] for c in both] == ["base", "champion"]
            assert both[0]["message"]["content"] == base

    asyncio.run(work())


def test_a_stop_string_cuts_also_across_tokens_and_in_streams(service):
    async def work():
        async with service() as s:
            whole = (await s.chat(max_tokens=20, ignore_eos=True)).json()["choices"][0]["message"]["content"]
            stop = whole[5:8]
            want = whole[: whole.index(stop)]
            cut = (await s.chat(max_tokens=20, ignore_eos=True, stop=[stop])).json()["choices"][0]
            assert (cut["message"]["content"], cut["finish_reason"]) == (want, "stop")
            streamed = await s.chat(max_tokens=20, ignore_eos=True, stop=stop, stream=True)
            parts = [json.loads(x[6:]) for x in streamed.text.split("\n\n") if x.startswith("data: {")]
            assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == want
            assert parts[-1]["choices"][0]["finish_reason"] == "stop"

    asyncio.run(work())


class Bytes:
    """A tokenizer whose tokens are single bytes, so that characters span tokens."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


def test_text_gives_whole_characters_and_holds_back_half_a_stop():
    text = Text(Bytes(), ["END"])
    given = []
    for byte in "naïve 漢字 EN route, then the END of it".encode():
        if not text.stopped:
            text.push([byte])
            given.append(text.take())
    given.append(text.take(last=True))
    assert "".join(given) == "naïve 漢字 EN route, then the "
    assert not any("\ufffd" in piece for piece in given)


def test_a_promotion_is_followed_without_a_restart(service):
    async def work():
        async with service() as s:
            assert (await s.chat()).headers["x-patchbay-patch"] == s.digests[0]
            ledgers.promote(s.ledger, SYSTEM, s.digests[2])
            await s.until(lambda: s.runtime.table.champion == s.digests[2])
            assert (await s.chat()).headers["x-patchbay-patch"] == s.digests[2]
            ledgers.rollback(s.ledger, SYSTEM)
            await s.until(lambda: s.runtime.table.champion == s.digests[0])
            assert (await s.chat()).headers["x-patchbay-patch"] == s.digests[0]

    asyncio.run(work())


def test_a_patch_that_cannot_be_verified_is_not_followed(service, home, tiny_llm):
    async def work():
        async with service() as s:
            bad = seal(tiny_llm, CONFIGS[2].__class__(neurons=((0, 5),)))
            file = home / "artifacts" / bad / "manifest.json"
            file.write_text(file.read_text().replace("0,5", "0,6"))
            ledgers.promote(s.ledger, SYSTEM, bad)
            await s.until(lambda: s.runtime.warning)
            answer = await s.chat()
            assert answer.headers["x-patchbay-patch"] == s.digests[0]
            ready = (await s.http.get("/readyz")).json()
            assert ready["ready"]
            assert "cannot follow" in ready["warning"]

    asyncio.run(work())


def begin(s, **words):
    x = experiments.begin(
        SYSTEM, control=s.digests[0], treatment=s.digests[1], share=0.5, words=[f"{k}={v}" for k, v in words.items()]
    )
    ledgers.split(s.ledger, SYSTEM, experiments.plain(x))
    return x


def test_an_experiment_is_sticky_and_counts_exposures_and_outcomes(service):
    async def work():
        async with service() as s:
            x = begin(s)
            await s.until(lambda: s.runtime.table.experiment)
            units = [f"user-{i}" for i in range(20)]
            for _ in range(2):
                for unit in units:
                    got = await s.chat(headers={"x-patchbay-unit": unit})
                    side = experiments.assign(x, unit)
                    assert got.headers["x-patchbay-arm"] == side
                    assert got.headers["x-patchbay-patch"] == x.arm_digest(side)
                    assert got.headers["x-patchbay-experiment"] == x.name
            rows = [{"unit": u, "value": 1, "key": f"k{u}"} for u in units]
            bad = [{"unit": "ghost", "value": 1}, {"unit": units[0], "value": 7}, {"nope": 1}, 3]
            got = (await s.http.post("/v1/outcomes", json={"outcomes": rows + bad})).json()["outcomes"]
            assert [g["status"] for g in got] == ["counted"] * 20 + ["refused"] * 4
            assert [g["code"] for g in got[20:]] == [404, 400, 400, 400]
            again = await s.http.post("/v1/outcomes", json=rows[0])
            assert again.json()["status"] == "duplicate"
            live = (await s.http.get("/v1/experiments/live")).json()["summary"]
            assert live["control"]["units"] + live["treatment"]["units"] == 20
            assert live["control"]["calls"] + live["treatment"]["calls"] == 40
            assert live["control"]["n"] + live["treatment"]["n"] == 20
            asked = await s.chat(model="base")
            assert "x-patchbay-experiment" not in asked.headers

    asyncio.run(work())


def test_a_quality_drop_rolls_back_by_itself(service):
    async def work():
        async with service() as s:
            x = begin(s, min_n=30)
            await s.until(lambda: s.runtime.table.experiment)
            events = s.runtime.events
            rng = random.Random(0)
            futures = []
            for i in range(600):
                unit = str(i)
                side = experiments.assign(x, unit)
                events.expose(x, unit, side)
                futures.append(events.outcome(x, unit, float(rng.random() < (0.9 if side == CONTROL else 0.6))))
            futures[-1].result()
            await s.until(lambda: s.runtime.table.experiment is None, 15)
            head = s.ledger.head(SYSTEM)
            assert (head.action, head.who, head.champion) == ("rollback", "judge", s.digests[0])
            assert "worse" in json.dumps(head.evidence)
            assert (await s.chat()).headers["x-patchbay-patch"] == s.digests[0]

    asyncio.run(work())


def test_a_shadow_answers_with_the_control_and_keeps_both(service):
    async def work():
        async with service() as s:
            begin(s, mode="shadow")
            await s.until(lambda: s.runtime.table.experiment)
            got = await s.chat(headers={"x-patchbay-unit": "u"})
            assert got.headers["x-patchbay-arm"] == CONTROL
            await s.until(lambda: s.app.state.desk.shadows)
            shadow = (await s.http.get("/v1/shadows")).json()["shadows"][0]
            assert shadow[CONTROL] == [got.json()["choices"][0]["message"]["content"]]
            want = (await s.chat(model="challenger")).json()["choices"][0]["message"]["content"]
            assert shadow[TREATMENT] == [want]
            for arm, value in ((CONTROL, 0), (TREATMENT, 1)):
                r = await s.http.post("/v1/outcomes", json={"unit": "u", "value": value, "arm": arm})
                assert r.json()["status"] == "counted"
            live = (await s.http.get("/v1/experiments/live")).json()
            assert (live["summary"]["pairs"], live["summary"]["wins"]) == (1, 1)

    asyncio.run(work())


@pytest.mark.parametrize("context", [32, 64, 512, 4096])
def test_what_the_page_begins_with_fits_the_context(service, context):
    async def work():
        async with service(context=context) as s:
            about = (await s.http.get("/v1/generate")).json()
            start = about["start"]
            assert about["context"] <= context
            messages = [
                {"role": "user", "content": start["user"].format(start["word"])},
                {"role": "assistant", "content": " ".join([start["word"]] * start["copies"])},
            ]
            body = {"messages": messages, "continue_final_message": True, "max_tokens": start["max_tokens"]}
            assert (await s.http.post("/v1/chat/completions", json=body)).status_code == 200

    asyncio.run(work())


def test_an_answer_whose_length_nobody_named_takes_what_the_context_leaves(service):
    async def work():
        async with service(context=48) as s:
            body = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}
            usage = (await s.http.post("/v1/chat/completions", json=body)).json()["usage"]
            assert usage["total_tokens"] == 48

    asyncio.run(work())


def test_a_caller_who_leaves_frees_the_row(service):
    async def work():
        async with service() as s:
            async with s.http.stream(
                "POST", "/v1/completions",
                json={"prompt": "abc", "max_tokens": 400, "stream": True, "ignore_eos": True, "model": "base"},
            ):  # fmt: skip
                pass
            await s.until(lambda: s.runtime.queued == 0)
            assert (await s.chat()).status_code == 200

    asyncio.run(work())


def test_a_fresh_system_serves_the_base(service):
    async def work():
        async with service(champion=False) as s:
            got = await s.chat()
            assert got.headers["x-patchbay-patch"] == "base"
            refused = await s.chat(model="challenger")
            assert refused.status_code == 404
            assert "base, champion" in refused.json()["error"]["message"]

    asyncio.run(work())


def test_a_pinned_patch_needs_no_ledger(service, home, tiny_llm):
    async def work():
        digest = seal(tiny_llm, CONFIGS[1])
        async with service(champion=False, pinned=home / "artifacts" / digest) as s:
            got = await s.chat()
            assert got.headers["x-patchbay-patch"] == digest
            assert (await s.http.get("/readyz")).json()["champion"] == digest

    asyncio.run(work())


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/livez", "/readyz", "/metrics", "/v1/models"])
def test_what_can_be_looked_at_answers(service, path):
    async def work():
        async with service() as s:
            await s.chat()
            got = await s.http.get(path)
            assert got.status_code == 200
            if path == "/metrics":
                assert re.search(r'answers_total{arm="champion",digest="\w{16}",status="200"} 1', got.text)

    asyncio.run(work())
