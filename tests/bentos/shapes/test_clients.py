"""What clients of OpenAI's API send and read: the loop everybody writes, nulls, limits, scores of prompts, errors."""

import asyncio
import json
import math
import random

import openai
import pytest
import torch

from bentos.shapes.answers import JOINT, Text
from bentos.shapes.messages import Chat, Completion
from bentos.shapes.neutral import Only
from bentos.shapes.pieces import Pieces
from patches.mechanisms.sink import SinkEdit
from patches.subject import Subject
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from tests.bentos.conftest import CONFIGS, SYSTEM


def client(s):
    return openai.AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=s.http, max_retries=0)


async def completed(s, **how):
    return (
        await s.http.post("/v1/completions", json={"prompt": "abc", "model": "base", "temperature": 0, **how})
    ).json()


def test_the_loop_everybody_writes_goes_on(service):
    async def work():
        async with service() as s:
            messages = [{"role": "system", "content": "be brief"}]
            for turn in range(3):
                messages.append({"role": "user", "content": f"turn {turn}"})
                got = await client(s).chat.completions.create(
                    model="base", messages=messages, max_tokens=5, extra_body={"ignore_eos": True}
                )
                messages.append(got.choices[0].message)
            dumped = [m if isinstance(m, dict) else m.model_dump() for m in messages]  # with every null there is
            got = await client(s).chat.completions.create(model="base", messages=dumped, max_tokens=2)
            assert got.usage.prompt_tokens > 40

    asyncio.run(work())


NOTHING = {
    "tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "top_k": -1, "min_p": 0.0,
    "repetition_penalty": 1.0, "frequency_penalty": 0, "presence_penalty": 0.0, "reasoning_effort": "low",
    "functions": [], "parallel_tool_calls": True, "modalities": ["text"], "service_tier": "auto", "store": False,
    "metadata": {"a": "b"}, "seed": None, "stop": None, "n": None, "top_p": None, "logit_bias": None,
    "logprobs": None, "stream_options": None, "a_field_of_next_year": None, "user": "Ann Lee, Köln", "patchbay": None,
    "ignore_eos": None, "continue_final_message": None,
}  # fmt: skip
CHANGES = {
    "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "top_k": 5, "min_p": 0.1,
    "response_format": {"type": "json_object"}, "repetition_penalty": 1.2, "frequency_penalty": 0.5,
    "presence_penalty": -1, "use_beam_search": True, "min_tokens": 3, "a_field_of_next_year": 1, "top_k ": 1,
    "verbosity": "high", "skip_special_tokens": False, "echo": True,
}  # fmt: skip


def test_fields_that_change_nothing_are_accepted_and_others_refused_by_name(service):
    async def work():
        async with service() as s:
            want = (await s.chat(model="base")).json()["choices"]
            assert (await s.chat(model="base", **NOTHING)).json()["choices"] == want
            for name, value in CHANGES.items():
                got = await s.chat(model="base", **{name: value})
                error = got.json()["error"]
                assert (got.status_code, error["param"]) == (400, name), error
                assert "leave it out" in error["message"]
            for bad in ({"role": "tool", "content": "x"}, {"role": "user", "content": None}, {"role": "user"},
                        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
                        {"role": "assistant", "content": "", "refusal": "no"}):  # fmt: skip
                got = await s.chat(messages=[{"role": "user", "content": "hi"}, bad])
                assert (got.status_code, got.json()["error"]["param"][:10]) == (400, "messages.1"), bad

    asyncio.run(work())


@pytest.mark.parametrize("model", [Chat, Completion])
def test_every_neutral_field_takes_null_and_its_own_values_and_the_document_says_so(model):
    shown = model.model_json_schema()
    body = {"messages": [{"role": "user", "content": "x"}]} if model is Chat else {"prompt": "x"}
    neutral = {k: m for k, f in model.model_fields.items() for m in f.metadata if isinstance(m, Only)}
    assert len(neutral) >= 17
    for name, about in neutral.items():
        for value in (None, *about.values):
            model.model_validate({**body, name: value})
        enums = [b["enum"] for b in shown["properties"][name]["anyOf"] if "enum" in b]
        assert enums == [list(about.values)]
    assert shown["additionalProperties"] == {"type": "null"}


def test_a_user_is_any_string_and_counts_as_one_unit(service):
    async def work():
        async with service() as s:
            x = experiments.begin(SYSTEM, control=s.digests[0], treatment=s.digests[1], share=0.5)
            ledgers.split(s.ledger, SYSTEM, experiments.plain(x))
            await s.until(lambda: s.runtime.table.experiment)
            for user in ("ann", "Ann Lee", "jürgen@köln.example", "x" * 5000, "漢字 \u0000"):
                units = {(await s.chat(user=user)).headers["x-patchbay-unit"] for _ in range(2)}
                assert len(units) == 1
                assert (user == "ann") == (units == {"ann"})
                got = await s.http.post("/v1/outcomes", json={"unit": user, "value": 1})
                assert (got.status_code, got.json()["status"]) == (200, "counted"), got.text
            nobody = {(await s.chat(user="")).headers["x-patchbay-unit"] for _ in range(2)}
            assert len(nobody) == 2

    asyncio.run(work())


def test_lengths_up_to_the_context_get_the_room_that_is_left(service):
    async def work():
        async with service() as s:  # the tiny model's context is 512
            whole = await completed(s, max_tokens=512, ignore_eos=True)
            assert (whole["usage"], whole["choices"][0]["finish_reason"]) == (
                {"prompt_tokens": 3, "completion_tokens": 509, "total_tokens": 512}, "length",
            )  # fmt: skip
            more = await completed(s, max_tokens=513)
            assert "512" in more["error"]["message"]
            for n, made in ((511, 1), (500, 12)):
                got = await completed(s, prompt="x" * n, ignore_eos=True)
                assert got["usage"]["completion_tokens"] == made
            for n in (512, 600, 100_000):
                chat = {"messages": [{"role": "user", "content": "x" * n}]}
                for path, body in (("completions", {"prompt": "x" * n}), ("chat/completions", chat)):
                    got = await s.http.post(f"/v1/{path}", json=body)
                    assert (got.status_code, got.json()["error"]["code"]) == (400, "context_length_exceeded")
            with pytest.raises(openai.BadRequestError) as e:
                await client(s).completions.create(model="base", prompt="y" * 513)
            assert e.value.code == "context_length_exceeded"

    asyncio.run(work())


@pytest.mark.parametrize("arm", ["base", "champion"])
def test_echo_with_logprobs_scores_the_prompt(service, tiny_llm, arm):
    async def work():
        async with service() as s:
            text = "again again again, it said"
            ids = tiny_llm.processor(text)["input_ids"]
            how = {"model": arm, "max_tokens": 0, "echo": True, "logprobs": 3}
            got = await completed(s, prompt=[text, text[:5]], **how)
            assert (await completed(s, prompt=ids, **how))["choices"] == got["choices"][:1]
            both = await completed(s, model=arm, prompt=text, max_tokens=2, echo=True, logprobs=3, ignore_eos=True)
            patched = Subject(tiny_llm, {"a": SinkEdit(CONFIGS[0], {})})
            with torch.inference_mode():
                logits = patched(rows=["a" if arm == "champion" else None], input_ids=torch.tensor([ids])).logits[0]
            patched.close()
            want = logits.log_softmax(-1)
            for choice, n in zip(got["choices"], (len(ids), 5), strict=True):
                scores = choice["logprobs"]
                assert choice["text"] == tiny_llm.processor.decode(ids[:n])
                assert "".join(scores["tokens"]) == text[:n]
                assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
                assert scores["text_offset"] == list(range(n))
                for t in range(1, n):
                    assert scores["token_logprobs"][t] == pytest.approx(float(want[t - 1, ids[t]]), abs=1e-4)
                    best = tiny_llm.processor.convert_ids_to_tokens(want[t - 1].topk(3).indices.tolist())
                    assert set(scores["top_logprobs"][t]) == {*best, scores["tokens"][t]}
            assert got["usage"]["completion_tokens"] == 0
            first, scores = (x["choices"][0]["logprobs"] for x in (got, both))
            assert scores["token_logprobs"][: len(ids)] == pytest.approx(first["token_logprobs"])
            assert len(scores["tokens"]) == len(ids) + 2
            parts = await s.http.post("/v1/completions", json={
                "model": arm, "prompt": text, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 3,
                "stream": True, "ignore_eos": True})  # fmt: skip
            said = [json.loads(x[6:])["choices"][0] for x in parts.text.split("\n\n") if x.startswith("data: {")]
            assert "".join(c["text"] for c in said) == both["choices"][0]["text"]
            kept = [c["logprobs"] for c in said if c["logprobs"]]
            assert [t for c in kept for t in c["tokens"]] == scores["tokens"]
            assert [t for c in kept for t in c["text_offset"]] == scores["text_offset"]

    asyncio.run(work())


def test_an_end_token_is_scored_with_a_completion(service):
    """lm-eval leaves out the last score as that of the one token it had to ask for, whatever that is."""

    async def work():
        async with service() as s:
            for stream in (False, True):
                got = await s.http.post("/v1/completions", json={
                    "prompt": "abc", "model": "base", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0,
                    "logit_bias": {"2": 100}, "stream": stream,
                })  # fmt: skip
                lines = [x.removeprefix("data: ") for x in got.text.split("\n\n")]
                said = [json.loads(x) for x in lines if x.startswith("{")]
                scores = [p["choices"][0]["logprobs"] for p in said if p["choices"][0]["logprobs"]]
                assert [t for c in scores for t in c["tokens"]] == ["a", "b", "c", "<eos>"]
                assert said[-1]["choices"][0]["finish_reason"] == "stop"
                assert "".join(p["choices"][0]["text"] for p in said) == "a b c"

    asyncio.run(work())


def tokenizer(kind):
    """Small tokenizers of the two kinds that language models have, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["the cat sat on the mat, naïve 漢字 and more words again", "hello hello there, the dog"] * 20
    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        inner.train_from_iterator(texts, trainer)
    else:  # as Llama 2's
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
            show_progress=False,
        )  # fmt: skip
        inner.train_from_iterator(["▁" + t.replace(" ", " ▁") for t in texts], trainer)
        said = json.loads(inner.to_str())
        said["added_tokens"] = said["added_tokens"][:3]  # bytes are words like others
        inner = Tokenizer.from_str(json.dumps(said))
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_text_in_stream_is_what_decoding_all_of_it_gives(kind):
    t, rng = tokenizer(kind), random.Random(0)
    words = ["the", "cat", "naïve", "漢字", "\U0001f600", " ", "again", "\n", ",", "é", "  hello"]
    for _ in range(100):
        ids = t(" ".join(rng.choices(words, k=12)))["input_ids"]
        at = rng.randrange(2, len(ids) - 1)  # within a character, too
        whole, start = (t.decode(some, skip_special_tokens=True) for some in (ids, ids[:at]))
        text = Text(t, [], before=ids[max(0, at - 2 * JOINT) : at])
        given = ""
        for i in ids[at:]:
            text.push([i])
            given += text.take()
        text.end()
        given += text.take(last=True)
        assert start.rstrip("\ufffd") + given == whole
    ids = t(" and more words again", add_special_tokens=False)["input_ids"]
    text = Text(t, [], before=t("hello there")["input_ids"])
    text.push(ids)
    text.end()
    assert text.text.startswith(" ")


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_tokens_have_their_own_bytes_and_different_names(kind):
    t = tokenizer(kind)
    pieces = Pieces(t)
    for text in ("the cat sat", " naïve 漢字 \U0001f600 again", "a\nb"):
        ids = t(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(pieces.bytes, ids)).decode().lstrip() == text.lstrip()
    whole = [i for i in range(len(t)) if not pieces.name(i).startswith("bytes:")]
    assert len({pieces.name(i) for i in whole}) > 0.6 * len(whole)
    assert pieces.name(t.convert_tokens_to_ids("æ" if kind == "bytes" else "<0xE6>")) == "bytes:\\xe6"


def test_alternatives_that_read_alike_are_all_there():
    from bentos.shapes.answers import _named

    pieces = Pieces(tokenizer("pieces"))
    a, byte = pieces.tokenizer.convert_tokens_to_ids(["a", "<0x61>"])
    got = _named(byte, (math.log(0.25), [(a, math.log(0.5)), (byte, math.log(0.25))]), pieces)
    assert got == {"a": math.log(0.5), f"token_id:{byte}": math.log(0.25)}
    assert _named(a, (-9.0, [(byte, -1.0)]), pieces) == {"a": -1.0, f"token_id:{a}": -9.0}


def test_models_embeddings_and_health_answer_and_every_refusal_is_an_object(service, tiny_llm):
    async def work():
        async with service() as s:
            ai = client(s)
            said = (await s.chat(model="champion")).json()["model"]
            for name in (
                "base",
                "champion",
                "auto",
                f"sha256:{s.digests[0]}",
                tiny_llm.name,
                said,
                f"{tiny_llm.name}/base",
            ):
                one = await ai.models.retrieve(name)
                assert (one.id, one.object) == (name, "model")
                got = await ai.completions.create(model=name, prompt="a", max_tokens=1)
                assert got.usage.completion_tokens == 1
            with pytest.raises(openai.NotFoundError) as e:
                await ai.models.retrieve("gpt-9")
            assert e.value.code == "model_not_found"

            texts = ["one two", "again again again again"]
            for arm in ("base", "champion"):
                many = (await ai.embeddings.create(model=arm, input=texts)).data
                alone = (await ai.embeddings.create(model=arm, input=texts[1], encoding_format="float")).data[0]
                assert many[1].embedding == pytest.approx(alone.embedding, abs=1e-5)
                assert math.hypot(*alone.embedding) == pytest.approx(1, abs=1e-5)
                short = (await ai.embeddings.create(model=arm, input=texts[1], dimensions=4)).data[0].embedding
                assert math.hypot(*short) == pytest.approx(1, abs=1e-5)
                if arm == "base":
                    ids = torch.tensor([tiny_llm.processor(texts[1])["input_ids"]])
                    with torch.inference_mode():
                        want = tiny_llm.model.model(input_ids=ids).last_hidden_state[0].mean(0)
                    assert alone.embedding == pytest.approx((want / want.norm()).tolist(), abs=1e-4)
                    plain = alone.embedding
            assert alone.embedding != pytest.approx(plain, abs=1e-3)

            assert (await s.http.get("/health")).json() == {"status": "ok"}
            for method, path, status in (
                ("GET", "/v1/nothing", 404), ("POST", "/v2/chat/completions", 404), ("PATCH", "/x", 404),
                ("DELETE", "/v1/models", 405), ("PUT", "/", 405), ("POST", "/v1/embeddings", 415),
                ("GET", "/v1/chat/completions", 405),
            ):  # fmt: skip
                got = await s.http.request(method, path)
                assert got.status_code == status, (method, path)
                assert {"message", "type", "param", "code"} == got.json()["error"].keys()
                if status == 405:
                    assert method not in got.headers["allow"]
            for path in ("/", "/health", "/v1/models", "/v1/models/base", "/openapi.json", "/readyz"):
                got = await s.http.head(path)
                assert got.status_code == 200
            assert (await s.http.head("/v1/chat/completions")).status_code == 405
            options = await s.http.options("/v1/chat/completions")
            assert (options.status_code, options.headers["allow"]) == (204, "POST, OPTIONS")
            assert (await s.http.options("/v1/models")).headers["allow"] == "GET, HEAD, OPTIONS"
            assert (await s.http.options("/nowhere")).status_code == 404

    asyncio.run(work())
