"""What the runtime does beside answering: what it decided is shown in MLflow, and MLflow is never in the way."""

import asyncio
import threading

import pytest
import torch

from bentos.runtime import Runtime, Settings
from registry import store
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.errors import NotReady
from registry.store import ab_display, mlflow_client

SYSTEM = "attention_sink"


def begun(s):
    x = experiments.begin(SYSTEM, control=s.digests[0], treatment=s.digests[1], share=0.5, words=["min_n=30"])
    ledgers.split(s.ledger, SYSTEM, experiments.plain(x))
    return x


async def decided(s, unit_is_good, x=None):
    """Run an experiment of 200 units to its decision."""
    x = x or begun(s)
    await s.until(lambda: s.runtime.table.experiment)
    for i in range(200):
        side = experiments.assign(x, str(i))
        s.runtime.events.expose(x, str(i), side)
        s.runtime.events.outcome(x, str(i), float(unit_is_good(side))).result()
    await s.until(lambda: s.runtime.table.experiment is None, 30)
    return x


def test_a_decision_is_shown_on_the_experiments_run(service):
    async def work():
        async with service() as s:
            x = await decided(s, lambda side: side == experiments.CONTROL)

            def run():
                with (
                    mlflow_client.connected() as client,
                    mlflow_client.locked(),
                ):  # find-or-create, as the judge does it
                    return ab_display.ab_run(client, x.name)

            await s.until(lambda: run().data.tags.get("ab.decision") == "rollback", 60)
            assert run().data.metrics["ab/effect"] < -0.9
            assert run().data.metrics["ab/e_value"] > 20

    asyncio.run(work())


def test_an_mlflow_that_hangs_delays_no_decision(service, monkeypatch):
    hangs, tried = threading.Event(), threading.Event()

    def hang(*_):
        tried.set()
        hangs.wait(60)

    monkeypatch.setattr(store, "log_window", hang)
    monkeypatch.setattr(store, "log_decision", hang)

    async def work():
        async with service() as s:
            try:
                x = begun(s)
                assert await asyncio.to_thread(tried.wait, 60)  # the first look is being shown, and will not end
                await decided(s, lambda side: side == experiments.CONTROL, x)
                assert s.ledger.head(SYSTEM).action == "rollback"
                assert not hangs.is_set()
            finally:
                hangs.set()

    asyncio.run(work())


def test_a_dead_mlflow_delays_no_decision(service, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")

    async def work():
        async with service() as s:
            await decided(s, lambda side: side == experiments.CONTROL)
            head = s.ledger.head(SYSTEM)
            assert (head.action, head.who) == ("rollback", "judge")
            assert (await s.chat()).status_code == 200

    asyncio.run(work())


def test_a_provider_for_a_family_that_has_none_is_an_honest_refusal(home):
    runtime = Runtime(Settings(SYSTEM, base="tiny", provider="cpu"))
    with pytest.raises(NotReady, match="PATCHBAY_PROVIDER"):
        runtime.start()
    runtime.stop()


def test_starting_changes_nothing_for_the_thread_that_starts_it(home):
    runtime = Runtime(Settings(SYSTEM, base="tiny"))
    runtime.start()
    try:
        assert torch.is_grad_enabled()
    finally:
        runtime.stop()
