"""The page: it stays inside its service, asks only for what is there, and its chat can go on where an answer began."""

import asyncio
import base64
import hashlib
import json
import re

import pytest

from bentos.app import calls
from bentos.openapi import openapi
from bentos.playground import assembled, page, policy
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.systems import SYSTEMS, system
from tests.bentos.shapes.test_classify import coded, picture

from .conftest import HEADS, NEURONS, PICTURES, SYSTEM, seal_heads, serving

HTML = assembled()
SERVED = (SYSTEM, PICTURES, HEADS, NEURONS, "diffusion_cf", "videomae", "mils")
CALLS = [call for name in SERVED for call in calls(system(name))]
"""Routes of every shape there is"""


def inside(tag):
    return re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", HTML, re.DOTALL)


def test_it_is_served_with_headers_that_keep_it_at_home(service):
    async def work():
        async with service() as s:
            got = await s.http.get("/")
            assert got.status_code == 200
            assert got.text == HTML
            assert got.headers["content-type"] == "text/html; charset=utf-8"
            assert got.headers["x-content-type-options"] == "nosniff"
            assert got.headers["referrer-policy"] == "no-referrer"
            assert got.headers["content-security-policy"] == policy(HTML)

    asyncio.run(work())


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_admits_exactly_what_is_in_the_file(tag):
    rules = dict(rule.split(" ", 1) for rule in page().headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    (content,) = inside(tag)
    hashed = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert rules[f"{tag}-src"] == f"'sha256-{hashed}'"
    assert "unsafe" not in str(rules)


def test_nothing_in_it_needs_what_the_policy_forbids():
    markup = re.sub(r"<(script|style)>.*?</\1>", "", HTML, flags=re.DOTALL)
    assert not re.search(r"\s(style|on[a-z]+)=", markup)
    assert not re.search(r"\b(eval|Function|importScripts|WebSocket|EventSource|XMLHttpRequest|sendBeacon)\b", HTML)


def test_no_address_outside_the_service_is_in_it():
    # namespaces are names and are never fetched
    text = re.sub(r"(?<=[\"'])http://www\.w3\.org/2000/svg(?=[\"'])", "", HTML)
    text = re.sub(r"data:image/webp;base64,[\w+/=]+", "", text)  # the example: no address, though it may hold slashes
    assert "//" not in re.sub(r"(?m)(^|\s)// .*$", "", text), "a comment begins a line or follows a blank"
    assert not re.search(r"<(link|script|img|iframe|object|embed)\b[^>]*\b(src|href)=(?![\"']data:)", text)
    assert not re.search(r"@import|url\(", text)


def test_text_of_models_never_becomes_markup():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|srcdoc", HTML)


OPERATION = r'"((?:GET|POST|PUT|DELETE|PATCH) /[^"]*)"'


def offered(*names):
    """Operations that the services of these systems list."""
    paths = openapi([call for name in names for call in calls(system(name))], "some")["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


def test_every_operation_it_calls_is_offered():
    (script,) = inside("script")
    called = set(re.findall(OPERATION, script))
    assert called >= {"POST /v1/chat/completions", "GET /v1/experiments/live", "POST /v1/outcomes", "GET /v1/models"}
    assert called <= offered(*SERVED)
    assert script.count("fetch(") == 1, "all calls go through one function, which names its operation"


def test_every_field_it_sends_is_known():
    (body,) = re.findall(r"const ask = \{(.*?)\n      \};", panels()["GENERATE"], re.DOTALL)
    sent = set(re.findall(r"^        (\w+)", body, re.MULTILINE)) | {"model", "stream", "stream_options"}
    assert {"messages", "continue_final_message", "seed", "patchbay"} <= sent
    assert sent <= set(openapi(CALLS, "all")["components"]["schemas"]["Chat"]["properties"])


def panels():
    """Name of each panel -> its script."""
    (script,) = inside("script")
    (listed,) = re.findall(r"const PANELS = \[(.*?)\];", script)
    parts = {n: re.search(rf"const {n} = \{{\n(.*?)\n\}};", script, re.DOTALL) for n in listed.split(", ")}
    return {name: part[1] for name, part in parts.items()}


def test_a_panel_is_shown_where_its_shape_is_served_and_calls_only_what_is():
    shown = {name: set() for name in SERVED}
    for panel, script in panels().items():
        needs = set(re.findall(OPERATION, re.search(r"needs: \[(.*?)\]", script)[1]))
        assert needs
        for name in SERVED:
            if needs <= offered(name):
                shown[name].add(panel)
        if panel in ("HEADS", "NEURONS"):  # others ask first whether more is offered
            assert set(re.findall(OPERATION, script)) == needs
    assert shown == {
        SYSTEM: {"GENERATE", "SEE", "EXPERIMENT"}, PICTURES: {"CLASSIFY", "EXPERIMENT"},
        HEADS: {"CLASSIFY", "HEADS", "EXPERIMENT"}, NEURONS: {"CLASSIFY", "NEURONS", "EXPERIMENT"},
        "diffusion_cf": {"RENDER", "STRIP", "EXPERIMENT"}, "videomae": {"VIDEO", "EXPERIMENT"},
        "mils": {"CAPTION", "EXPERIMENT"},
    }  # fmt: skip


def sent(panel):
    """(path, fields) of every body that a panel writes where it is sent."""
    found = []
    for path, flat in re.findall(r'"POST (/[^"]*)", \{ body: \{(.*)', panels()[panel]):
        nested = 1
        while nested:  # what is in brackets goes, from the inside out
            flat, nested = re.subn(r"[\[({][^\[\](){}]*[\])}]", "", flat)
        found.append((path, set(re.findall(r"(?:^|,)\s*(\w+)", flat.partition("}")[0]))))
    return found


IMAGE = {"data": coded(picture(0))}
SAYS = {
    "image": IMAGE, "images": [IMAGE], "text": "cat", "against": "dog", "texts": ["cat", "dog"], "heads": ["2.1"],
    "true": "cat", "wrong": "ink", "compare": True, "patched": True, "format": ["png"], "top": 5, "model": "champion",
}  # fmt: skip
"""a value for every field that a panel sends about a picture"""


def asking(panel, more=None):
    """(path, body) as a panel asks; more: path -> fields that are named elsewhere."""
    found = [(path, fields | {*(more or {}).get(path, ())}) for path, fields in sent(panel)]
    return [(path, {k: SAYS[k] for k in fields}) for path, fields in found]


def test_the_panel_of_heads_reads_what_is_answered(home):
    async def work():
        digest = seal_heads()
        ledgers.promote(Ledger(), HEADS, digest)
        async with serving(HEADS, [digest], False, None, {}) as s:
            answers = {}
            for path, body in asking("HEADS", {"/v1/explain/neighbours": ["image"]}):
                got = await s.http.post(path, json=body)
                assert got.status_code == 200, (path, got.text)
                answers[path] = got.json()
            parts = answers["/v1/explain/decompose"]
            for one in (parts, parts["base"]):
                assert {len(v) for row in one["heads"] for v in row} == {len(one["cosine"])} == {2}
                assert len(one["bias"]) == len(one["mlps"][0]) == 2
            assert parts["texts"] == ["cat", "dog"]
            assert {"arm", "patch"} <= parts["patchbay"].keys()
            assert {"png", "covered"} <= answers["/v1/explain/segment"].keys()
            assert all({"png", "name", "score"} <= one.keys() for one in answers["/v1/explain/neighbours"]["data"])
            listed = (await s.http.get("/v1/explain/heads?model=champion")).json()["data"]
            assert all({"layer", "head", "label"} <= one.keys() for one in listed)
            card = (await s.http.get("/v1/explain/heads/2.1?model=champion")).json()
            assert {"label", "also", "source", "score", "p", "explained", "explained_random", "trail"} <= card.keys()
            assert all({"text", "share", "fits"} <= one.keys() for one in card["texts"])
            (await s.http.get("/v1/explain/gallery?model=champion")).json()["sealed"]["layers"]  # where examples are

    asyncio.run(work())


def test_the_panel_of_neurons_reads_what_is_answered(neurons):
    async def work():
        async with neurons() as s:
            answers = {}
            for path, body in asking("NEURONS"):
                got = await s.http.post(path, json=body)
                assert got.status_code == 200, (path, got.text)
                answers[path] = got.json()
            (row,) = answers["/v1/explain/attributes"]["results"]
            for side in ("base", "patched"):
                assert {"attributes", "neurons_that_count"} <= row[side].keys()
                assert {"png", "covered"} <= answers["/v1/explain/segment"][side].keys()
            mined = answers["/v1/explain/mine"]
            assert "left_out" in mined
            for word in (*mined["data"], *row["base"]["attributes"]):
                assert {"text", "weight"} <= word.keys()
                assert all({"layer", "neuron", "adds"} <= n.keys() for n in word["neurons"])
            first = (await s.http.get("/v1/explain/neurons?model=champion")).json()["data"][0]
            assert {"layer", "neuron", "texts"} <= first.keys()
            at = f"{first['layer']}/{first['neuron']}"
            card = (await s.http.get(f"/v1/explain/neurons/{at}?model=champion")).json()
            assert {"edited", "explained", "texts_explain"} <= card.keys()
            assert all({"text", "coefficient"} <= one.keys() for one in card["texts"])
            assert all({"layer", "head", "share"} <= one.keys() for one in card["carriers"])
            assert all({"png", "picture", "projection"} <= one.keys() for one in card["pictures"])

    asyncio.run(work())


def test_it_names_no_system():
    for name in SYSTEMS:
        assert not re.search(rf"\b{name}\b", HTML)


def test_an_answer_that_has_begun_is_continued(service):
    ask = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "ab ab"}]

    async def work():
        async with service() as s:
            raw = {"prompt": "u:say it;a:ab ab", "max_tokens": 8, "temperature": 0}
            whole = await s.http.post("/v1/completions", json=raw)
            got = await s.chat(messages=ask, continue_final_message=True)
            assert got.json()["choices"][0]["message"]["content"] == whole.json()["choices"][0]["text"]
            assert got.json()["usage"] == whole.json()["usage"]
            fresh = await s.chat(messages=ask)  # by default an assistant's turn is over, and a new one begins
            assert fresh.json()["usage"]["prompt_tokens"] == whole.json()["usage"]["prompt_tokens"] + len(";a:")
            refused = await s.chat(messages=ask[:1], continue_final_message=True)
            assert refused.status_code == 400
            assert "assistant" in refused.json()["error"]["message"]

    asyncio.run(work())


def test_the_page_reads_an_arm_and_its_experiment_from_headers(service):
    """What the page shows beside an answer, and sends back as the unit it judges."""
    from registry.ab import experiment as experiments

    async def work():
        async with service() as s:
            x = experiments.begin("attention_sink", control=s.digests[0], treatment=s.digests[1], share=0.5)
            ledgers.split(s.ledger, x.system, experiments.plain(x))
            await s.until(lambda: s.runtime.table.experiment is not None)
            got = await s.chat(model="auto", stream=True, stream_options={"include_usage": True})
            assert got.headers["x-patchbay-arm"] in ("control", "treatment")
            assert got.headers["x-patchbay-patch"] in s.digests
            last = [json.loads(part[6:]) for part in got.text.strip().split("\n\n")[:-1]][-1]
            assert last["usage"]["completion_tokens"] > 0
            outcome = {
                "unit": got.headers["x-patchbay-unit"], "value": 1.0, "key": got.headers["x-patchbay-request"],
                "experiment": got.headers["x-patchbay-experiment"],
            }  # fmt: skip
            said = [(await s.http.post("/v1/outcomes", json=outcome)).json()["status"] for _ in range(2)]
            assert said == ["counted", "duplicate"]
            live = (await s.http.get("/v1/experiments/live")).json()
            assert live["experiment"]["name"] == x.name
            assert {"effect", "low", "high", "verdict", "e_value"} <= live["result"].keys()
            assert live["guardrails"].keys() == {g.metric for g in x.guardrails}

    asyncio.run(work())
