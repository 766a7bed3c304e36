"""Pictures against words: answers are the model's own, every row keeps its arm, a bad row costs nobody else."""

import asyncio
import base64
import io
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from bentos.shapes.pictures import MAX_IMAGES
from patches.evidence.label_set import LabelSet
from patches.families import clip
from patches.mechanisms.features import edit
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.errors import NotReady
from tests.bentos.conftest import PICTURES, dictionary, seal_features
from tests.bentos.shapes.test_pictures import REFUSED

LABELS = ["cat", "dog", "sun", "ink"]


def picture(seed=0, size=32):
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Pillow.fromarray(noise)


def coded(p):
    file = io.BytesIO()
    p.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(s, n=3, **more):
    body = {"images": [{"data": coded(picture(i))} for i in range(n)], "labels": LABELS, "top": 4, **more}
    return s.http.post("/v1/classify", json=body)


def expected(base, patch, n=3):
    """Probabilities (n, C) by the model itself."""
    weights = clip.logit_scale(base) * clip.zero_shot(base, LABELS)
    x = base.processor.image([picture(i) for i in range(n)])
    if patch is None:
        return (clip.embed_images(base, x) @ weights).softmax(1)
    with patch.apply(base.model, root=base.root):
        return (clip.embed_images(base, x) @ weights).softmax(1)


def given(answer):
    rows = [{x["label"]: x["probability"] for x in r["scores"]} for r in answer.json()["results"]]
    return torch.tensor([[row[name] for name in LABELS] for row in rows])


def champion():
    return edit(dictionary(0), clip.site("block", 1), range(0, 40, 2))


@pytest.mark.parametrize("arm", ["base", "champion"])
def test_answers_are_the_models_own(pictures, tiny_clip, arm):
    async def work():
        async with pictures() as s:
            got = await ask(s, model=arm)
            assert got.status_code == 200, got.text
            want = expected(tiny_clip, None if arm == "base" else champion())
            torch.testing.assert_close(given(got), want, atol=2e-5, rtol=1e-4)
            assert got.headers["x-patchbay-arm"] == arm
            best = [r["label"] for r in got.json()["results"]]
            assert best == [LABELS[i] for i in want.argmax(1).tolist()]

    asyncio.run(work())


@pytest.mark.parametrize("arm", ["base", "champion", "challenger"])
def test_without_labels_the_sealed_label_set_is_asked(pictures, tiny_clip, arm):
    """The challenger carries one; base and champion, which carry none, are asked by it too."""
    weights = torch.nn.functional.normalize(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), dim=0)
    one = LabelSet(("land", "water", "air"), weights)

    async def work():
        async with pictures(labels=one) as s:
            got = await ask(s, labels=None, model=arm, patchbay={"compare": True})
            assert got.status_code == 200, got.text
            assert got.json()["label_set"] == f"sha256:{s.digests[1][:16]}"
            patch = {"base": None, "champion": champion(), "challenger": edit(dictionary(1), site, range(5))}[arm]
            x = tiny_clip.processor.image([picture(i) for i in range(3)])
            with patch.apply(tiny_clip.model, root=tiny_clip.root) if patch else nullcontext():
                want = (clip.logit_scale(tiny_clip) * clip.embed_images(tiny_clip, x) @ weights).softmax(1)
            rows = [{v["label"]: v["probability"] for v in r["scores"]} for r in got.json()["results"]]
            torch.testing.assert_close(
                torch.tensor([[r[k] for k in one.labels] for r in rows]), want, atol=2e-5, rtol=1e-4
            )
            assert all(len(r["base"]["scores"]) == 3 for r in got.json()["results"])
            named = await ask(s, model=arm)  # labels that are given count
            assert "label_set" not in named.json()
            assert {v["label"] for v in named.json()["results"][0]["scores"]} == set(LABELS)

    site = clip.site("block", 1)
    asyncio.run(work())


def test_without_labels_and_without_a_label_set_the_way_out_is_told(pictures):
    async def work():
        async with pictures() as s:
            got = await ask(s, labels=None)
            assert got.status_code == 400
            assert "Name some" in got.json()["error"]["message"]

    asyncio.run(work())


def test_base_and_patched_stand_side_by_side(pictures, tiny_clip):
    async def work():
        async with pictures() as s:
            got = (await ask(s, patchbay={"compare": True})).json()
            base = [{x["label"]: x["probability"] for x in r["base"]["scores"]} for r in got["results"]]
            want = expected(tiny_clip, None)
            torch.testing.assert_close(
                torch.tensor([[row[k] for k in LABELS] for row in base]), want, atol=2e-5, rtol=1e-4
            )
            off = (await ask(s, patchbay={"compare": True, "strength": 0.0})).json()
            for r in off["results"]:  # strength 0 is the base; a row's place in a batch may round another way
                base = {x["label"]: x["probability"] for x in r["base"]["scores"]}
                assert {x["label"]: x["probability"] for x in r["scores"]} == pytest.approx(base, abs=1e-5)

    asyncio.run(work())


def test_every_picture_may_name_its_own_arm(pictures, tiny_clip):
    async def work():
        async with pictures() as s:
            items = [{"data": coded(picture(0)), "model": m} for m in ("base", "champion", "challenger")]
            got = (await s.http.post("/v1/classify", json={"images": items, "labels": LABELS, "top": 4})).json()
            assert [r["arm"] for r in got["results"]] == ["base", "champion", "challenger"]
            assert [r["patch"] for r in got["results"]] == ["base", *s.digests]
            seen = {str(r["scores"]) for r in got["results"]}
            assert len(seen) == 3

    asyncio.run(work())


def test_a_bad_picture_is_refused_for_its_own_row_only(pictures):
    async def work():
        async with pictures() as s:
            good = {"data": coded(picture(1))}
            alone = (await s.http.post("/v1/classify", json={"images": [good], "labels": LABELS})).json()["results"][0]
            bad = [{"data": data} for data, _, _ in REFUSED.values()]
            bad += [{"data": good["data"], "model": "no such arm"}, {"file": "/etc/passwd"}, "http://x/y.png", None]
            got = await s.http.post("/v1/classify", json={"images": [*bad, good], "labels": LABELS})
            assert got.status_code == 200
            *refused, fine = got.json()["results"]
            assert {s["label"]: s["probability"] for s in fine["scores"]} == pytest.approx(
                {s["label"]: s["probability"] for s in alone["scores"]}, abs=1e-5
            )
            assert [400 <= r["error"]["code"] < 500 and bool(r["error"]["message"]) for r in refused] == [True] * len(
                bad
            )
            for (_, _, says), r in zip(REFUSED.values(), refused, strict=False):
                assert says in r["error"]["message"]
            for one in bad:  # alone, it is the answer's own status
                assert (
                    400
                    <= (await s.http.post("/v1/classify", json={"images": [one], "labels": LABELS})).status_code
                    < 500
                )

    asyncio.run(work())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": []}, "labels"), ({"labels": ["one"]}, "labels"), ({"labels": ["a", "a"]}, "occurs twice"),
        ({"labels": ["a", " "]}, "labels"), ({"labels": [str(i) for i in range(1001)]}, "labels"),
        ({"templates": ["no place"]}, "templates"), ({"images": []}, "images"), ({"top": 0}, "top"),
        ({"labels": [str(i) for i in range(1000)], "templates": ["{}"] * 9}, "9000|texts"),
        ({"model": "nobody"}, "nobody"), ({"patchbay": {"strength": 3}}, "strength"), ({"more": 1}, "more"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_why(pictures, change, says):
    async def work():
        async with pictures() as s:
            got = await ask(s, 1, **change)
            assert 400 <= got.status_code < 500, got.text
            assert any(word in got.json()["error"]["message"] for word in says.split("|")), got.text

    asyncio.run(work())


def test_too_many_pictures_and_nan_are_refused(pictures):
    async def work():
        async with pictures() as s:
            many = {"images": [{"data": "x"}] * (MAX_IMAGES + 1), "labels": LABELS}
            assert (await s.http.post("/v1/classify", json=many)).status_code == 400
            raw = b'{"images": [{"data": "x"}], "labels": ["a", "b"], "patchbay": {"strength": NaN}}'
            got = await s.http.post("/v1/classify", content=raw, headers={"content-type": "application/json"})
            assert got.status_code == 400

    asyncio.run(work())


def test_files_of_a_form_are_pictures_too(pictures):
    async def work():
        async with pictures() as s:
            raw = [base64.b64decode(coded(picture(i))) for i in range(2)]
            files = [("image", (f"{i}.png", r, "image/png")) for i, r in enumerate(raw)]
            got = await s.http.post(
                "/v1/classify", files=files, data={"request": '{"labels": ["cat","dog","sun","ink"], "top": 4}'}
            )
            assert got.status_code == 200, got.text
            torch.testing.assert_close(given(got), given(await ask(s, 2)), atol=1e-6, rtol=0)
            odd = await s.http.post("/v1/classify", files=files, data={"path": "/etc/passwd"})
            assert odd.status_code == 400
            assert "path" in odd.json()["error"]["message"]
            text = await s.http.post("/v1/classify", files=files, data={"request": "[1]"})
            assert text.status_code == 400

    asyncio.run(work())


def test_an_experiment_splits_pictures_by_unit_and_counts_outcomes(pictures):
    async def work():
        async with pictures() as s:
            x = experiments.begin(PICTURES, control=s.digests[0], treatment=s.digests[1], share=0.5)
            ledgers.split(s.ledger, x.system, experiments.plain(x))
            await s.until(lambda: s.runtime.table.experiment is not None)
            arms = {}
            for i in range(24):
                got = await ask(s, 1, user=f"u{i}")
                arms[f"u{i}"] = got.headers["x-patchbay-arm"]
                assert arms[f"u{i}"] == experiments.assign(x, f"u{i}")
            assert set(arms.values()) == {"control", "treatment"}
            said = await s.http.post("/v1/outcomes", json={"outcomes": [{"unit": u, "value": 1.0} for u in arms]})
            assert {o["status"] for o in said.json()["outcomes"]} == {"counted"}
            live = (await s.http.get("/v1/experiments/live")).json()["result"]
            assert live["n_control"] + live["n_treatment"] == 24

    asyncio.run(work())


def test_a_shadow_labels_the_picture_too_and_nobody_waits(pictures):
    async def work():
        async with pictures() as s:
            x = experiments.begin(
                PICTURES, control=s.digests[0], treatment=s.digests[1], share=0.5, words=["mode=shadow"]
            )
            ledgers.split(s.ledger, x.system, experiments.plain(x))
            await s.until(lambda: s.runtime.table.experiment is not None)
            got = await ask(s, 2, user="u")
            assert got.headers["x-patchbay-arm"] == "control"
            await s.until(lambda: s.app.state.desk.shadows)
            (kept,) = (await s.http.get("/v1/shadows")).json()["shadows"]
            assert kept["control"] == [r["label"] for r in got.json()["results"]]
            assert len(kept["treatment"]) == 2
            assert kept["agree"] == (kept["control"] == kept["treatment"])

    asyncio.run(work())


def test_a_step_that_fails_loses_its_own_pictures_only(pictures, monkeypatch):
    async def work():
        async with pictures() as s:
            worker, forward = s.runtime.worker, s.runtime.base.model.forward

            def broken(**inputs):
                monkeypatch.setattr(s.runtime.base.model, "forward", forward)
                raise RuntimeError("no memory")

            await ask(s, 1)  # the classifier is kept from here on
            monkeypatch.setattr(s.runtime.base.model, "forward", broken)
            failed = await ask(s, 1)
            assert failed.status_code == 500  # it may well fail again: not "try again later"
            assert (await ask(s, 1)).status_code == 200
            assert s.runtime.worker is worker
            assert s.runtime.queued == 0

    asyncio.run(work())


def test_many_callers_get_their_own_rows(pictures, tiny_clip):
    """Concurrent requests share batches; each row's answer is that of its picture and its arm."""

    async def work():
        async with pictures() as s:
            want = {"base": expected(tiny_clip, None, 8), "champion": expected(tiny_clip, champion(), 8)}

            async def one(i):
                arm = ("base", "champion")[i % 2]
                body = {"images": [{"data": coded(picture(i % 8))}], "labels": LABELS, "top": 4, "model": arm}
                got = await s.http.post("/v1/classify", json=body)
                torch.testing.assert_close(given(got)[0], want[arm][i % 8], atol=2e-5, rtol=1e-4)

            await asyncio.gather(*(one(i) for i in range(48)))

    asyncio.run(work())


@pytest.mark.parametrize("provider", ["", "cpu"])
def test_a_pinned_service_and_one_on_onnx_answer_as_the_model_does(pictures, home, tiny_clip, provider):
    """What a Bento does: no ledger, one sealed folder; with torch, or with the towers in ONNX Runtime."""
    home.mkdir(parents=True, exist_ok=True)
    folder = home / "artifacts" / seal_features(tiny_clip, range(0, 40, 2))

    async def work():
        async with pictures(champion=False, pinned=folder, provider=provider) as s:
            for arm in ("base", "champion"):
                got = await ask(s, model=arm)
                want = expected(tiny_clip, None if arm == "base" else champion())
                torch.testing.assert_close(given(got), want, atol=2e-3 if provider else 2e-5, rtol=1e-3)
            assert (s.runtime.worker.engines == {}) == (not provider)
            read = await s.http.post("/v1/explain/encode", json={"image": {"data": coded(picture(0))}})
            assert read.status_code == 200, read.text

    asyncio.run(work())


def test_a_provider_that_is_missing_is_an_honest_refusal(pictures):
    async def work():
        with pytest.raises(NotReady, match="CUDAExecutionProvider|CUDA devices"):
            async with pictures(provider="cuda"):
                pass

    if not torch.cuda.is_available():
        asyncio.run(work())


# ---- labels, and who is compared when nobody is named ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["cat", "Cat"], "'cat' and 'Cat' cannot be told apart"),
        (["\N{SNOWMAN}", "cat", "\N{UMBRELLA}"], "does not know"),
        (["cat", "cat"], "occurs twice"),
    ],
)
def test_labels_that_are_one_to_the_tokenizer_are_refused_with_both(pictures, labels, says):
    async def work():
        async with pictures() as s:
            got = await ask(s, labels=labels)
            assert got.status_code == 400
            assert says in got.json()["error"]["message"]
            assert labels[0] in got.json()["error"]["message"]

    asyncio.run(work())


def test_unknown_words_are_a_warning_of_the_answer(pictures):
    async def work():
        async with pictures() as s:
            got = (await ask(s, labels=["cat", "a \N{SNOWMAN} man"])).json()
            assert len(got["warnings"]) == 1
            assert "\N{SNOWMAN}" in got["warnings"][0]
            assert "warnings" not in (await ask(s)).json()

    asyncio.run(work())


def test_side_by_side_without_a_model_is_base_beside_the_challenger_else_beside_the_champion(pictures):
    async def work():
        async with pictures() as s:
            got = await ask(s, patchbay={"compare": True})
            assert got.headers["x-patchbay-arm"] == "challenger"
            assert all({"base", "label"} <= set(row) for row in got.json()["results"])
            assert (await ask(s, patchbay={"compare": True}, model="champion")).headers["x-patchbay-arm"] == "champion"
            assert (await ask(s)).headers["x-patchbay-arm"] == "champion"
            head = s.ledger.head("clip_sae")
            ledgers.promote(s.ledger, "clip_sae", head.challenger)
            await s.until(lambda: s.runtime.table.challenger is None)
            got = await ask(s, patchbay={"compare": True})
            assert got.headers["x-patchbay-arm"] == "champion"

    asyncio.run(work())
