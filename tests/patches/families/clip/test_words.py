"""Words that a tokenizer does not know, and texts that are one to it."""

import json
from types import SimpleNamespace

import pytest

from patches.families import clip
from patches.families.clip import tokens
from registry.errors import Invalid


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base with CLIP's tokenizer cut down to a few words, as lab:clip has it."""
    from open_clip.tokenizer import HFTokenizer

    folder = tmp_path_factory.mktemp("words")
    clip.compact_tokenizer(["a picture of a cat", "guinea pig"]).save_pretrained(folder)
    tokenizer = HFTokenizer(str(folder), context_length=16)
    return SimpleNamespace(
        name="lab", processor=SimpleNamespace(tokenizer=tokenizer, text=lambda t: tokenizer(list(t)))
    )


def test_unknown_words_are_named_text_by_text(base):
    found = clip.unknown_words(base, ["a cat", "a kangaroo", "guinea pig", "pig's tail"])
    assert found.keys() == {"a kangaroo", "pig's tail"}
    assert found["a kangaroo"] == ["kangaroo"]
    assert "tail" in found["pig's tail"]
    assert "does not know the word 'kangaroo' in 'a kangaroo'" in clip.doubts(base, ["a cat", "a kangaroo"])[0]
    assert clip.doubts(base, ["a cat"]) == []
    many = clip.doubts(base, [f"kangaroo number {w}" for w in "bcdfghijklmn"])
    assert len(many) == 9
    assert many[-1] == "Nor words in 4 other texts."


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["kangaroo", "okapi"], "'kangaroo' and 'okapi' cannot be told apart.*does not know 'kangaroo', 'okapi'"),
        (["a cat", "pig", "A  Cat"], "'a cat' and 'A  Cat' cannot be told apart.*the same tokens of both"),
        (["cat " * 40 + "pig", "cat " * 41], "cannot be told apart"),  # beyond the context
    ],
)
def test_texts_that_are_the_same_tokens_are_refused(base, labels, says):
    with pytest.raises(Invalid, match=says):
        clip.check_told_apart(base, labels)


def test_what_differs_in_one_token_passes(base):
    clip.check_told_apart(base, ["a cat", "a pig", "a guinea pig", "a kangaroo"])


def test_a_tokenizer_that_spells_everything_knows_every_word():
    from open_clip.tokenizer import SimpleTokenizer

    whole = SimpleNamespace(name="x", processor=SimpleNamespace(tokenizer=SimpleTokenizer()))
    assert clip.unknown_words(whole, ["a kangaroo", "okapi xyzzy"]) == {}


TEXTS = [
    "a cat",
    "a  Picture of\ta cat!",
    "guinea pig's tail",
    "",
    "kangaroo é 12",
    "cat " * 40,
    "<pad> <unk>",
    "<end_of_text> a",
]


@pytest.mark.parametrize("where", ["lab", "compact", "letters"])
def test_a_service_reads_a_plain_tokenizer_as_transformers_does(where, tmp_path):
    from open_clip.tokenizer import HFTokenizer

    if where == "compact":
        clip.compact_tokenizer(["a picture of a cat", "guinea pig"]).save_pretrained(tmp_path)
    elif where == "letters":
        tokens._letters(97).save_pretrained(tmp_path)
    folder = clip.SHIPPED / "clip" if where == "lab" else tmp_path
    want, got = HFTokenizer(str(folder), context_length=16), tokens._Words.read(folder, 16)
    assert got is not None
    assert got(TEXTS).equal(want(TEXTS))
    assert got.tokenizer.unk_token_id == want.tokenizer.unk_token_id
    plain = want.tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert got.tokenizer(TEXTS, add_special_tokens=False)["input_ids"] == plain


@pytest.mark.parametrize(
    "more", [{"tokenizer_class": "CLIPTokenizer"}, {"add_bos_token": True}, {"eos_token": "<odd>"}]
)
def test_a_tokenizer_that_says_more_is_left_to_transformers(more, tmp_path):
    tokens._letters(97).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    assert tokens._Words.read(tmp_path, 16) is None
