"""The playground in a real browser: opened, clicked, base and patched answer. Skipped where no Chromium is."""

import asyncio

import pytest

from bentos.app import application
from bentos.runtime import Settings
from bentos.tokens import Tokens
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from tests import browser
from tests.bentos.shapes.test_embed import BASES, MASKED, TOKENS, seal

pytestmark = [
    pytest.mark.skipif(browser.found() is None, reason="no Chromium on this machine (PATCHBAY_CHROMIUM names one)"),
    pytest.mark.timeout(120),
]
SIDES = "[...document.querySelectorAll('article.side')].filter((s) => s.offsetParent)"
"""the two columns of the panel that is seen"""


def test_the_first_click_shows_base_and_patched(service, tmp_path):
    async def work():
        async with service() as s, browser.opened(s.app, tmp_path / "profile") as page:
            await page.until("document.getElementById('ready')?.dataset.state === 'ready'")
            assert await page.value("document.getElementById('facts').innerText") > s.digests[0][:10]
            await page.until(f"{SIDES}.length === 2")
            await page.click("Run both")
            done = f"{SIDES}.every((s) => /Finish\\s+(length|stop)/.test(s.innerText))"
            await page.until(done)
            arms = await page.value(f"{SIDES}.map((s) => s.querySelector('.who').innerText)")
            answers = await page.value(f"{SIDES}.map((s) => s.querySelector('.answer').innerText)")
            return s.digests, arms, answers, page.faults

    digests, arms, answers, faults = asyncio.run(work())
    assert not faults
    assert "no patch" in arms[0]
    assert digests[1][:10] in arms[1]  # the challenger
    assert len(set(answers) - {""}) == 2  # both said something, and not the same


def test_a_picture_with_a_typed_word_is_asked_of_both(pictures, tmp_path):
    async def work():
        async with pictures() as s, browser.opened(s.app, tmp_path / "profile") as page:
            await page.until("document.getElementById('ready')?.dataset.state === 'ready'")
            await page.until(f"{SIDES}.length === 2")
            before = await page.value("document.querySelector('canvas').toDataURL()")
            await page.value("document.querySelector('input[placeholder=nothing]').focus()")
            await page.send("Input.insertText", text="ink")
            assert await page.value("document.querySelector('canvas').toDataURL()") != before
            await page.click("Ask both")
            await page.until(f"{SIDES}.every((s) => s.querySelectorAll('progress').length > 1)")
            sides = await page.value(f"{SIDES}.map((s) => s.innerText)")
            return s.digests, sides, await page.value("document.querySelector('.run output').innerText"), page.faults

    digests, sides, says, faults = asyncio.run(work())
    assert all("/v1/explain/" in fault and "404" in fault for fault in faults)  # this patch carries no examples
    assert all("%" in side for side in sides)
    assert "no patch" in sides[0]
    assert digests[1][:10] in sides[1]
    assert says.startswith(("Both say", "The base says"))


@pytest.mark.parametrize(
    ("system", "sees", "not_this"),
    [(MASKED, "what it made of it", "Left what happened"), (TOKENS, "Left what happened", "what it made of it")],
)
def test_a_drawn_clip_is_asked_for_what_each_arm_can_answer(system, sees, not_this, home, tmp_path):
    async def work():
        ledgers.promote(Ledger(), system, seal(system, 1))
        app = application(Settings(system, base=BASES[system]), Tokens(None))
        async with app.router.lifespan_context(app), browser.opened(app, tmp_path / "profile") as page:
            await page.until("document.getElementById('ready')?.dataset.state === 'ready'")
            await page.until(f"{SIDES}.length === 2")
            await page.click("Ask both")
            await page.until(f"{SIDES}.every((s) => s.querySelector('img'))")
            return await page.value(f"{SIDES}.map((s) => s.innerText)"), page.faults

    sides, faults = asyncio.run(work())
    assert not faults  # nothing was asked to find out whether it may be asked
    assert all(sees in side and "Surprise by frame" in side for side in sides)
    assert not any(not_this in side for side in sides)
