import pytest
import torch

from patches.families import llm
from patches.families.base import load_base
from patches.families.llm.worker import Decoder, Row
from patches.subject import Subject
from registry.errors import ConfigError, NotFound, NotReady, TooLong


def test_greedy_decoding_equals_generate(tiny_llm):
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    rows = Decoder(tiny_llm).run([Row(p, max_tokens=15) for p in ids])
    for row in rows:
        prompt = torch.tensor([row.prompt])
        want = tiny_llm.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False
        )[0, len(row.prompt) :]
        assert row.out == want.tolist()


def test_a_seed_gives_the_same_text_in_any_company(tiny_llm):
    def row():
        return Row([5, 6, 7], max_tokens=12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)

    alone = Decoder(tiny_llm).run([row()])[0]
    crowd = Decoder(tiny_llm).run([Row([8] * 9, max_tokens=20), row(), Row([4], max_tokens=3)])[1]
    assert alone.out == crowd.out


def test_logprobs_are_those_of_the_model(tiny_llm):
    row = Decoder(tiny_llm).run([Row([5, 6, 7], max_tokens=6, logprobs=3, ignore_eos=True)])[0]
    with torch.inference_mode():
        logits = tiny_llm.model(input_ids=torch.tensor([row.prompt + row.out])).logits[0, 2:-1].log_softmax(-1)
    for t, (score, best) in enumerate(row.scores):
        assert score == pytest.approx(float(logits[t, row.out[t]]), abs=1e-4)
        assert [i for i, _ in best] == logits[t].topk(3).indices.tolist()


def test_cancelling_a_row_leaves_its_neighbours_alone(tiny_llm):
    def rows():
        return [Row([5 + i, 6, 7], max_tokens=12, ignore_eos=True) for i in range(4)]

    want = [r.out for r in Decoder(tiny_llm).run(rows())]
    decoder, some = Decoder(tiny_llm), rows()
    decoder.add(some)
    for _ in range(5):
        decoder.step()
    decoder.cancel(some[1])
    while not decoder.idle:
        decoder.step()
    assert some[1].finished == "cancelled"
    assert [r.out for r in some if r is not some[1]] == [w for i, w in enumerate(want) if i != 1]


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(tiny_llm):
    decoder = Decoder(tiny_llm)
    with pytest.raises(TooLong, match="600 tokens"):
        decoder.add([Row([5], max_tokens=2), Row([5] * 600)])
    assert decoder.idle


def test_eos_ends_a_row_and_is_counted_as_stop(tiny_llm):
    free = Decoder(tiny_llm).run([Row([5, 6], max_tokens=1, bias={2: 1e4})])[0]
    assert (free.out, free.finished) == ([2], "stop")


def test_generate_takes_texts_and_chats(tiny_llm):
    model = Subject(tiny_llm)
    out = llm.generate(model, ["abc", [{"role": "user", "content": "hi"}]], max_tokens=4)
    model.close()
    assert [type(t) for t in out] == [str, str]


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("pypi:unknown", "pypi:smollm2"),
        ("smollm2", "names no base"),
        ("local-dir:/nowhere", "no folder"),
        ("gguf:/nowhere.gguf", "no file"),
    ],
)
def test_a_base_that_is_not_there_says_what_to_do(ref, says):
    with pytest.raises(NotFound, match=says):
        llm.load(ref)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA; the refusal needs one without")
def test_cuda_declared_and_missing_is_refused():
    with pytest.raises(NotReady, match="has 0 CUDA devices"):
        llm.load("pypi:smollm2", "cuda")
    with pytest.raises(NotReady, match="has 0 CUDA devices"):
        load_base("tiny", "clip", "cuda:1")


def test_what_is_no_device_is_refused():
    for ref, family in (("tiny", "llm"), ("lab:clip", "clip")):
        with pytest.raises(ConfigError, match="'gpu0' names no device"):
            load_base(ref, family, "gpu0")


def test_any_llama_folder_loads_and_keeps_its_digest(tiny_llm, tmp_path):
    tiny_llm.model.save_pretrained(tmp_path / "m")
    tiny_llm.processor.save_pretrained(tmp_path / "m")
    one, two = (llm.load(f"local-dir:{tmp_path / 'm'}") for _ in range(2))
    assert one.digest == two.digest
    assert one.label.startswith("local:m@")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(one.model(input_ids=ids).logits, tiny_llm.model(input_ids=ids).logits)


@pytest.mark.parametrize("arm", [None, "a"])
def test_a_long_prompt_comes_in_parts_while_others_go_on(tiny_llm, monkeypatch, arm):
    """Parts, in any company, give what the whole gives, for a patch that looks at all of the row, too."""
    from patches.families.llm import worker
    from patches.mechanisms.sink import SinkConfig, SinkEdit

    patched = Subject(tiny_llm, {"a": SinkEdit(SinkConfig(neurons=((1, 3), (2, 9)), damp_limit=2.0), {})})
    long = [[5 + i % 7 for i in range(61)], [9] * 50]

    def rows():
        kept = {"logprobs": 2, "score_prompt": True, "pool": True, "ignore_eos": True, "arm": arm}
        short = [Row([5 + i, 6, 7], max_tokens=12, ignore_eos=True, arm=arm) for i in range(3)]
        return [*short, *(Row(p, max_tokens=9, **kept) for p in long)]

    want = Decoder(tiny_llm, patched.applied, slots=5).run(rows())
    monkeypatch.setattr(worker, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(worker, "SCORED_TOKENS", 5)
    decoder = Decoder(tiny_llm, patched.applied, slots=5)
    got = rows()
    decoder.add(got)
    between = 0
    while not decoder.idle:
        waiting = decoder.filling
        between += any(row is not waiting for row in decoder.step()) and waiting is not None
    assert between >= 4
    for a, b in zip(got, want, strict=True):
        assert (a.out, a.finished) == (b.out, b.finished)
        for x, y in zip(a.prompt_scores, b.prompt_scores, strict=True):
            assert (x is None) == (y is None)
            assert x is None or x[0] == pytest.approx(y[0], abs=1e-4)
        assert b.pooled is None or torch.allclose(a.pooled, b.pooled, atol=1e-3)
    decoder, got = Decoder(tiny_llm, patched.applied, slots=5), rows()
    decoder.add(got)
    for _ in range(4):
        decoder.step()
    decoder.cancel(next(row for row in got if row is decoder.filling))
    while not decoder.idle:
        decoder.step()
    assert [r.finished for r in got].count("cancelled") == 1
    assert all(a.out == b.out for a, b in zip(got, want, strict=True) if a.finished != "cancelled")
    patched.close()


def test_rows_wait_for_room_in_the_memory_of_keys_and_values(tiny_llm):
    lengths = (2, 3, 20, 1, 4, 8, 2, 9)

    def rows():
        return [Row([5 + i % 9, 6, 7] * n, max_tokens=6, ignore_eos=True) for i, n in enumerate(lengths)]

    want = [r.out for r in Decoder(tiny_llm).run(rows())]
    token = Decoder(tiny_llm).cache.token_bytes
    assert token == 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, width, float32
    decoder, got, most = Decoder(tiny_llm, kv_bytes=100 * token), rows(), 0
    assert decoder.context == 100
    decoder.add(got)
    while not decoder.idle:
        decoder.step()
        held = sum(t.nbytes for t in (*decoder.cache.keys, *decoder.cache.values))
        most = max(most, held)
        assert held <= 100 * token
    assert most > 50 * token
    assert [r.out for r in got] == want
    with pytest.raises(TooLong, match="between 1 and 100"):
        decoder.add([Row([5] * 99, max_tokens=2)])


def test_a_small_base_made_for_a_purpose_has_a_name_of_its_own():
    base = load_base("tiny:planted", "llm")
    assert base.label == f"tiny:planted@{llm.planted().digest}"
    with pytest.raises(NotFound, match="tiny:planted"):
        load_base("tiny:nonsense", "llm")
