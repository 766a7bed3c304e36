"""lab:clip, the checkpoint that ships."""

import json

import pytest
import torch

from patches.families import clip

CAPTIONS = [
    "a picture of a cat on snow",
    "a photo of a abacus and a blowfish",
    "a drawing of a cartwheeling, with the word pizza",
    "a sign that says exclamation",
    "A Photo of a  Fire extinguisher on plain paper",
]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def lab():
    return clip.load("lab:clip")


def test_the_lab_tokenizer_splits_known_words_as_clips_own_does(lab):
    from open_clip.tokenizer import SimpleTokenizer

    full, ours = SimpleTokenizer(context_length=32), lab.processor.tokenizer.tokenizer
    for text in CAPTIONS:
        got = ours.convert_ids_to_tokens([i for i in lab.processor.text([text])[0].tolist() if i])
        assert got == [full.decoder[i] for i in full([text])[0].tolist() if i]


def test_a_word_the_lab_never_wrote_is_unknown(lab):
    tokenizer = lab.processor.tokenizer.tokenizer
    ids = tokenizer("a photo of a zyzzyva")["input_ids"]
    assert [i for i in ids if i == tokenizer.unk_token_id] == [ids[-2]]


def test_lab_clip_is_a_folder_of_open_clip(lab):
    import open_clip

    folder = clip.SHIPPED / "clip"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    with torch.no_grad():
        close(model.encode_text(tokens, normalize=True), clip.embed_texts(lab, CAPTIONS))


def test_lab_clip_is_what_its_card_says(lab):
    card = json.loads((clip.SHIPPED / "clip" / "card.json").read_text())
    assert card["digest"] == lab.digest
    assert lab.label == f"lab:clip@{lab.digest}"
    assert sum(p.numel() for p in lab.model.parameters()) == card["parameters"]


def test_lab_clip_knows_which_words_belong_together(lab):
    """Zero-shot without a picture: names of one group are nearer to each other than to another group's."""
    animals, food = ["dog", "wolf", "cat", "tiger"], ["pizza", "hamburger", "sandwich", "bread"]
    e = clip.embed_texts(lab, [*animals, *food], clip.TEMPLATES)
    near = e @ e.T - torch.eye(8)
    inside = (near[:4, :4].sum() + near[4:, 4:].sum()) / 24
    assert inside > near[:4, 4:].mean() + 0.05
