"""The page of an experiment: whole in itself, both arms shown, nothing from outside taken as markup."""

import re

import pytest

from registry import cli
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.events import Events
from registry.ab.experiment import Metric
from registry.ab.ledger import Ledger
from registry.ab.page import page
from registry.ab.picture import picture
from registry.ab.several import compared, derived

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(name="tried")
def _tried():
    """An experiment in the ledger with 120 units."""
    ledger = Ledger()
    made = experiments.begin("clip_heads", control="base", treatment="b" * 64, share=0.5)
    x = experiments.replace(made, also=(Metric("liked", "lower"),))
    ledgers.split(ledger, "clip_heads", experiments.plain(x), who=HOSTILE, evidence={"forced": HOSTILE})
    with Events() as log:
        for i in range(120):
            arm = experiments.assign(x, str(i))
            log.expose(x, str(i), arm)
            log.outcome(x, str(i), float(arm == "treatment" or i % 2)).result(10)
        yield x, log, ledger


def test_a_page_needs_nothing_else_and_takes_nothing_as_markup(tried, tmp_path):
    x, log, ledger = tried
    drawn = tmp_path / "drawn.png"
    drawn.write_bytes(b"\x89PNG")
    odd = tmp_path / "odd.svg"
    odd.write_text(HOSTILE)
    decision = experiments.judge(x, log.summary(x))
    known = {x.metric: log.summary(x), "liked": log.summary(derived(x, x.also[0]))}
    examples = [(HOSTILE, "a base's answer", HOSTILE), ("a picture", drawn, odd)]
    text = page(x, decision, picture(x, log.trajectory(x)), ledger.history("clip_heads"), examples=examples,
                metrics=compared(x, known))  # fmt: skip
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert text.count(HOSTILE.replace("<", "&lt;").replace(">", "&gt;")) == 4
    for said in (
        "a base&#x27;s answer",
        "data:image/png;base64,",
        "no picture",
        "liked",
        "less is better",
        "e-BH",
        "better",
        x.name,
    ):
        assert said in text


def test_report_writes_the_page(tried, tmp_path, capsys):
    file = tmp_path / "report.html"
    assert cli.main(["report", "clip_heads", "--html", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    assert "Ledger" in file.read_text()
    assert cli.main(["report", "clip_heads", "--html", str(file), "--ask", "hello", "--url", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err
