"""What one token makes is not another's: units, keys, shadows, galleries, and who is told which arm it had."""

import asyncio

from sqlalchemy import text

from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers

from .conftest import SYSTEM

TOKENS = {
    "a": {"name": "a", "scopes": ["generate", "outcomes"]},
    "b": {"name": "b", "scopes": ["generate", "outcomes", "compare"]},
    "score": {"name": "score", "scopes": ["outcomes"], "tenant": "a"},
}


def bearer(token, **more):
    return {"authorization": f"Bearer {token}", **more}


def split(s, **words):
    x = experiments.begin(SYSTEM, control=s.digests[0], treatment=s.digests[1], share=0.5,
                          words=[f"{k}={v}" for k, v in words.items()])  # fmt: skip
    ledgers.split(s.ledger, SYSTEM, experiments.plain(x))
    return x


def test_units_and_keys_belong_to_the_tenant(service, tokens):
    async def work():
        async with service(tokens=tokens(**TOKENS)) as s:
            x = split(s)
            await s.until(lambda: s.runtime.table.experiment)
            for token in ("a", "b"):
                got = await s.chat(headers=bearer(token, **{"x-patchbay-unit": "u"}))
                assert got.headers["x-patchbay-unit"] == "u"

            async def outcome(token, unit, key):
                body = {"unit": unit, "value": 1, "key": key}
                return (await s.http.post("/v1/outcomes", json=body, headers=bearer(token))).json()

            assert (await outcome("a", "u", "k"))["status"] == "counted"
            assert (await outcome("b", "u", "k"))["status"] == "counted"  # not swallowed by a's key
            assert (await outcome("a", "u", "k"))["status"] == "duplicate"
            assert (await outcome("score", "u", "k2"))["status"] == "counted"  # of the same tenant
            await s.chat(headers=bearer("a", **{"x-patchbay-unit": "mine"}))
            assert "never answered" in (await outcome("b", "mine", "k3"))["error"]["message"]
            totals = s.runtime.events.summary(x)
            assert totals.control.units + totals.treatment.units == 3
            assert totals.tokens == 2

    asyncio.run(work())


def test_only_those_who_may_compare_are_told_their_arm(service, tokens):
    async def work():
        async with service(tokens=tokens(**TOKENS)) as s:
            split(s)
            await s.until(lambda: s.runtime.table.experiment)
            got = await s.chat(headers=bearer("a", **{"x-patchbay-unit": "u"}))
            assert (got.headers["x-patchbay-arm"], got.headers["x-patchbay-patch"]) == ("auto", "")
            assert not any(d[:16] in got.text for d in s.digests)
            told = await s.chat(headers=bearer("b", **{"x-patchbay-unit": "u"}))
            assert told.headers["x-patchbay-arm"] in ("control", "treatment")
            assert told.headers["x-patchbay-patch"] in s.digests
            named = await s.chat(headers=bearer("a"), model="champion")  # who names an arm knows it
            assert named.headers["x-patchbay-patch"] == s.digests[0]
            live = await s.http.get("/v1/experiments/live", headers=bearer("a"))
            assert "salt" not in live.json()["experiment"]
            assert s.runtime.table.experiment.salt not in live.text

    asyncio.run(work())


def test_shadow_answers_are_the_tenants_own(service, tokens):
    known = {k: {**v, "scopes": ["generate", "outcomes", "compare"]} for k, v in TOKENS.items()}

    async def work():
        async with service(tokens=tokens(**known)) as s:
            split(s, mode='"shadow"')
            await s.until(lambda: s.runtime.table.experiment)
            await s.chat(headers=bearer("a", **{"x-patchbay-unit": "secret"}))
            await s.until(lambda: s.app.state.desk.shadows)
            mine = (await s.http.get("/v1/shadows", headers=bearer("a"))).json()["shadows"]
            theirs = (await s.http.get("/v1/shadows", headers=bearer("b"))).json()["shadows"]
            assert [k["unit"] for k in mine] == ["secret"]
            assert theirs == []

    asyncio.run(work())


def test_latency_does_not_grow_with_the_answer(service):
    """What a p99 guardrail sees of a long answer is its first token and its pace."""

    async def work():
        async with service() as s:
            x = split(s)
            await s.until(lambda: s.runtime.table.experiment)
            await s.chat()
            for tokens in (4, 100):
                await s.chat(max_tokens=tokens, headers={"x-patchbay-unit": str(tokens)}, ignore_eos=True)
            with s.runtime.events._reading() as db:
                found = text("SELECT unit, latency_ms FROM events WHERE experiment = :x")
                rows = dict(db.execute(found, {"x": x.name}).tuples().all())
            assert rows["100"] < 8 * rows["4"]  # 25 times the tokens

    asyncio.run(work())
