import pytest
import torch

from patches.families.vlm import Picture, PictureDecoder, base, lens
from patches.families.vlm.layouts import image_tokens, layout
from registry.errors import Invalid, PatchError
from tests.patches.families.vlm.test_layouts import pictures, prompt


@pytest.fixture(scope="module")
def tiny():
    return base.tiny()


def row(tiny, images=1, text="hi", **more):
    made = prompt(tiny, text, pictures(images))
    return Picture(made.ids, pixels=made.pixels, **more)


def test_a_picture_is_encoded_once_for_all_who_show_it(tiny, monkeypatch):
    calls = []
    decoder = PictureDecoder(tiny)
    features = decoder._features
    monkeypatch.setattr(decoder, "_features", lambda pixels: calls.append(1) or features(pixels))
    decoder.run([row(tiny, max_tokens=2, text=t) for t in ("a", "b", "c")])
    decoder.run([row(tiny, max_tokens=2)])
    assert len(calls) == 1


def test_image_tokens_without_a_picture_and_pictures_without_tokens_are_refused(tiny):
    decoder, mark = PictureDecoder(tiny), tiny.processor.image_token
    with pytest.raises(Invalid, match="holds 2 image tokens and no picture"):
        decoder.add([Picture([5, mark, mark, 6])])
    with pytest.raises(Invalid, match="holds 0 image tokens and a picture"):
        decoder.add([Picture([5, 6], pixels=row(tiny).pixels)])
    with pytest.raises(Invalid, match="for 4 features"):
        decoder.add([Picture([5, mark, 6], features=torch.zeros(4, 32))])
    assert decoder.idle


def test_too_many_pictures_and_parts_without_pictures_are_refused(tiny):
    with pytest.raises(Invalid, match="20 pictures"):
        prompt(tiny, "x", pictures(20))
    with pytest.raises(Invalid, match="names 1 pictures and 0 came"):
        tiny.processor.prompt([{"role": "user", "content": [{"type": "image"}]}], [])


def test_logprobs_of_a_row_with_a_picture_are_the_models_own(tiny):
    one = row(tiny, max_tokens=4, logprobs=2, ignore_eos=True)
    PictureDecoder(tiny).run([one])
    with torch.inference_mode():
        logits = tiny.model(input_ids=torch.tensor([one.prompt + one.out]), **one.pixels).logits[0]
    scores = logits[len(one.prompt) - 1 : -1].log_softmax(-1)
    for t, (score, best) in enumerate(one.scores):
        assert score == pytest.approx(float(scores[t, one.out[t]]), abs=1e-4)
        assert [i for i, _ in best] == scores[t].topk(2).indices.tolist()


def test_states_are_those_of_the_model(tiny):
    one = row(tiny, max_tokens=1, watch=(0, 2, 3))
    PictureDecoder(tiny).run([one])
    with torch.inference_mode():
        out = tiny.model(input_ids=torch.tensor([one.prompt]), **one.pixels, output_hidden_states=True).hidden_states
    at = torch.tensor(one.prompt) == tiny.processor.image_token
    torch.testing.assert_close(one.seen[1], out[2][0, at], atol=1e-5, rtol=1e-4)
    norm = tiny.model.get_submodule(layout(tiny.model).norm)
    torch.testing.assert_close(norm(one.seen[2]), out[3][0, at], atol=1e-5, rtol=1e-4)


def test_the_last_depth_of_the_lens_is_the_models_own_output(tiny):
    one = row(tiny, max_tokens=1, watch=(3,))
    PictureDecoder(tiny).run([one])
    with torch.inference_mode():
        want = tiny.model(input_ids=torch.tensor([one.prompt]), **one.pixels).logits[0].softmax(-1)
    at = torch.tensor(one.prompt) == tiny.processor.image_token
    torch.testing.assert_close(lens.probabilities(tiny, one.seen)[0], want[at], atol=1e-5, rtol=1e-4)
    ids = [[7], [8, 9]]
    sure = lens.confidence(tiny, one.seen, ids)
    assert sure.tolist() == pytest.approx([float(want[at][:, 7].max()), float(want[at][:, 8:10].max())], abs=1e-5)


def test_the_lens_reads_the_whole_vocabulary_at_every_depth(tiny):
    one = row(tiny, max_tokens=1, watch=(0, 1, 2, 3))
    PictureDecoder(tiny).run([one])
    p = lens.probabilities(tiny, one.seen)
    assert p.shape == (4, 16, tiny.model.config.get_text_config().vocab_size)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 16), atol=1e-4, rtol=0)
    said = lens.top(tiny, one.seen, k=2)
    best = p.max(-1)
    for depth in range(4):
        for token in range(16):
            (word, sure), (_, less) = said[depth][token]
            assert word == tiny.processor.decode([int(best.indices[depth, token])]).strip()
            assert sure == pytest.approx(float(best.values[depth, token]), abs=1e-5)
            assert sure >= less


def test_a_heat_map_is_hot_where_its_token_is(tiny):
    heat = torch.zeros(16)
    heat[6] = 0.9  # row 1, column 2 of 4 x 4
    field = lens.spread(heat, (4, 4), (64, 64))
    assert divmod(int(field.argmax()), 64)[0] // 16 == 1
    assert divmod(int(field.argmax()), 64)[1] // 16 == 2
    mask = lens.segment(field)
    assert mask[20:28, 36:44].all()
    assert not mask[:8].any()
    with pytest.raises(Invalid, match="no place"):
        lens.spread(heat, None, (64, 64))


def test_the_proof_is_equal_bit_for_bit(tiny):
    from patches.mechanisms import erase
    from patches.subject import Subject

    subject = Subject(tiny, {"a": erase.make(tiny, (0, 1))})
    worker = PictureDecoder(tiny, subject.applied)
    assert torch.equal(worker.proof(None), worker.proof("a", 0.0))
    worker.run([worker.probe("a")])
    assert subject.applied.unreached() == []
    subject.close()


def test_image_tokens_are_unknown_from_embeddings_alone():
    with pytest.raises(PatchError, match="embeddings alone"):
        image_tokens({"inputs_embeds": torch.zeros(1, 3, 2)}, 5)
    assert image_tokens({"input_ids": torch.tensor([[1, 5, 5]])}, 5).tolist() == [[False, True, True]]
