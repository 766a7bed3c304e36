import pytest
import torch
from pydantic import ValidationError

from patches import artifact
from patches.families.vlm import PictureDecoder, base
from patches.mechanisms import erase
from patches.mechanisms.erase import ALONG, ROW, EraseAsk, EraseEdit, mentioned, project_away
from patches.subject import Subject
from registry.errors import ConfigError, Invalid, PatchError
from tests.patches.families.vlm.test_layouts import pictures, prompt
from tests.patches.families.vlm.test_worker import row


@pytest.fixture(scope="module")
def tiny():
    return base.tiny()


@pytest.fixture
def subject(tiny):
    made = Subject(tiny, {"a": erase.make(tiny, (0, 2), weight=1.5)})
    yield made
    made.close()


def tokens(base_, subject, rows):
    PictureDecoder(base_, subject.applied).run(rows)
    return [(r.out, [s for s, _ in r.scores]) for r in rows]


# ---- the algebra -------------------------------------------------------------------------------------------------


def test_weight_one_makes_positive_tokens_orthogonal_and_leaves_negative_ones():
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 5, 8, generator=g), torch.randn(2, 1, 8, generator=g)
    out = project_away(x, t, 1.0, torch.ones(2, 5, dtype=torch.bool))
    before, after = (x @ t.mT)[..., 0], (out @ t.mT)[..., 0]
    assert (before > 0).any()
    assert (before < 0).any()
    torch.testing.assert_close(after, before.clamp(max=0), atol=1e-5, rtol=0)
    assert torch.equal(out[before < 0], x[before < 0])
    torch.testing.assert_close(project_away(out, t, 1.0, torch.ones(2, 5, dtype=torch.bool)), out, atol=1e-5, rtol=0)


def test_only_masked_tokens_change_and_a_direction_of_zeros_does_nothing():
    x, t = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    mask = torch.tensor([[False, True, True, False]])
    out = project_away(x, t, 2.0, mask)
    assert torch.equal(out[:, [0, 3]], x[:, [0, 3]])
    assert torch.equal(project_away(x, torch.zeros(1, 3, 8), 2.0, mask), x)


def test_objects_go_one_after_the_other():
    x, t = torch.randn(1, 4, 8), torch.randn(1, 3, 8)
    mask, out = torch.ones(1, 4, dtype=torch.bool), x
    for k in range(3):
        out = project_away(out, t[:, k : k + 1], 1.5, mask)
    torch.testing.assert_close(project_away(x, t, 1.5, mask), out)


def test_the_control_takes_as_much_along_another_direction():
    x, t, other = torch.randn(1, 4, 8).abs(), torch.ones(1, 1, 8), torch.eye(8)[:1][None] * 8**0.5
    mask = torch.ones(1, 4, dtype=torch.bool)
    taken = x - project_away(x, t, 1.0, mask, other)
    assert (taken[..., 1:] == 0).all()
    torch.testing.assert_close(taken.norm(dim=-1), (x - project_away(x, t, 1.0, mask)).norm(dim=-1))


# ---- rows --------------------------------------------------------------------------------------------------------


def test_each_row_erases_its_own_and_nobody_elses(tiny, subject):
    patch = subject.arms["a"]
    lists = [None, ["a"], ["b", "c"], ["d"], None]
    params = [{} if w is None else {ROW: patch.directions(tiny, w)} for w in lists]
    how = {"max_tokens": 5, "logprobs": 0, "ignore_eos": True}
    mixed = [row(tiny, arm="a" if i else None, params=p, **how) for i, p in enumerate(params)]
    got = tokens(tiny, subject, mixed)
    alone = [
        tokens(tiny, subject, [row(tiny, arm="a" if i else None, params=p, **how)])[0] for i, p in enumerate(params)
    ]
    for (out, scores), (want, sure) in zip(got, alone, strict=True):
        assert out == want
        assert scores == pytest.approx(sure, abs=1e-4)
    assert got[4][1] == pytest.approx(got[0][1], abs=1e-5)  # an arm that is told nothing is the base
    assert got[1][1] != pytest.approx(got[0][1], abs=1e-4)
    assert got[1][1] != pytest.approx(got[2][1], abs=1e-4)


def test_a_row_without_a_picture_is_never_touched(tiny, subject):
    patch = subject.arms["a"]
    made = prompt(tiny, "hello", [])
    from patches.families.vlm import Picture

    def text(**more):
        return Picture(made.ids, max_tokens=5, logprobs=0, ignore_eos=True, **more)

    said = {"arm": "a", "params": {ROW: patch.directions(tiny, ["a", "b"])}}
    got, want = (tokens(tiny, subject, [text(**how), row(tiny, max_tokens=5)])[0] for how in (said, {}))
    assert got == want  # bit for bit, in the same company


def test_strength_zero_is_the_base_and_revert_is_bit_exact(tiny):
    patch = erase.make(tiny, (0, 1, 2))
    how = {"max_tokens": 4, "logprobs": 0, "ignore_eos": True}
    plain = row(tiny, **how)
    PictureDecoder(tiny).run([plain])
    subject = Subject(tiny, {"a": patch})
    said = {ROW: patch.directions(tiny, ["x"])}
    off, half, full = (row(tiny, arm="a", strength=s, params=said, **how) for s in (0.0, 0.5, 1.0))
    for one in (off, half, full):
        tokens(tiny, subject, [one])
    subject.close()
    again = row(tiny, **how)
    PictureDecoder(tiny).run([again])
    assert off.scores == plain.scores == again.scores
    assert half.scores != full.scores
    # the vision tower keeps transformers' own hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.model.language_model.modules())


def test_direct_calls_of_the_model_are_edited_too(tiny):
    made = prompt(tiny, "hi", pictures(1))
    ids, patch = torch.tensor([made.ids]), erase.make(tiny, (0,), weight=4.0)
    subject = Subject(tiny, {"a": patch})
    with torch.inference_mode():
        before = tiny.model(input_ids=ids, **made.pixels).logits
        with subject.applied.rows(["a"], None, [{ROW: patch.directions(tiny, ["b"])}]):
            after = tiny.model(input_ids=ids, **made.pixels).logits
    subject.close()
    first = made.ids.index(tiny.processor.image_token)
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_save_and_load_round_trip(tiny, tmp_path):
    patch = erase.make(tiny, (1,), (0,), own=True, objects=("a|b", "c"), limit=0.2, lens_depths=(0, 3))
    about = artifact.save(patch, "vlm_erasure", tmp_path / "a", base=tiny.label)
    _, loaded = artifact.load(tmp_path / "a", digest=about.digest)
    assert loaded.config == patch.config
    assert torch.equal(loaded.directions(tiny, ["x"]), patch.directions(tiny, ["x"]))
    mean = patch.tensors["mean"]
    plain = erase.make(tiny, (1,), (0,))
    torch.testing.assert_close(patch.directions(tiny, ["x"]), plain.directions(tiny, ["x"]) - mean)


def test_it_has_no_weight_form(tiny):
    with pytest.raises(PatchError, match="serve it with hooks"):
        erase.make(tiny, (0,)).fold(tiny.model)


def test_configs_that_contradict_themselves_are_refused(tiny):
    with pytest.raises(ConfigError, match="names one depth twice"):
        erase.make(tiny, (1, 1))
    with pytest.raises(ConfigError, match="own=True needs objects"):
        erase.make(tiny, (1,), own=True)
    with pytest.raises(PatchError, match="needs a tensor 'mean'"):
        EraseEdit(erase.make(tiny, (1,), own=True, objects=("a",)).config, {})


# ---- words -------------------------------------------------------------------------------------------------------


def test_a_word_of_several_tokens_is_erased_each_way_and_told(tiny, subject):
    patch = subject.arms["a"]
    states = base.word_states(tiny, tiny.processor.word("cat"), (0, 2))
    ways = {how: patch.directions(tiny, ["cat"], how) for how in ("last", "mean", "each")}
    torch.testing.assert_close(ways["last"][0], states[:, -1])
    torch.testing.assert_close(ways["mean"][0], states.mean(1))
    torch.testing.assert_close(ways["each"], states.transpose(0, 1))
    worker = PictureDecoder(tiny, subject.applied)
    job = row(tiny, arm="a", max_tokens=3)
    patch.prepare(job, EraseAsk(erase=["cat", "d"], how="each", show=["cat"]), tiny, worker.run)
    assert job.params[ROW].shape == (4, 2, 32)
    assert [(e["object"], e["tokens"], e["as"]) for e in job.told["erased"]] == [
        ("cat", 3, "each token by itself"), ("d", 1, "its one token"),
    ]  # fmt: skip
    assert job.told["heatmaps"]["cat"].startswith("data:image/png;base64,")
    assert 0 <= job.told["objects"][0]["confidence"] <= 1


def test_words_are_found_in_captions():
    objects = ("dog|puppy", "hot dog", "knife", "berry", "bus")
    assert mentioned("Two puppies and a hot dog.", objects) == ["dog", "hot dog"]
    assert mentioned("knives, berries; BUSES", objects) == ["knife", "berry", "bus"]
    assert mentioned("a hotdog", objects) == []


# ---- what a request may say --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"erase": []}, {"erase": ["x"] * 1000}, {"erase": [""]}, {"erase": "everything"}, {"erase": ["x" * 100]},
        {"erase": [3]}, {"how": "first"}, {"more": 1}, {"show": ["x"] * 9},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(bad):
    with pytest.raises(ValidationError):
        EraseAsk.model_validate(bad)


def test_an_erasure_without_a_picture_is_refused(tiny, subject):
    from patches.families.vlm import Picture

    patch = subject.arms["a"]
    job = Picture(prompt(tiny, "hello", []).ids, arm="a")
    for ask in (EraseAsk(erase=["x"]), EraseAsk(erase="auto"), EraseAsk(show=["x"])):
        with pytest.raises(Invalid, match="no picture"):
            patch.prepare(job, ask, tiny, lambda jobs: None)
    patch.prepare(job, EraseAsk(), tiny, lambda jobs: None)
    assert job.params == {}
    assert job.told == {}


def test_a_word_the_vocabulary_cannot_say_is_refused():
    from patches.families.vlm import lab
    from patches.families.vlm.processor import LabProcessor, Processor

    words = lab.tokenizer((*lab.MARKS, "cat", "cheese wedge"))
    processor = Processor(LabProcessor(words, 2, 96, (0.5,) * 3, (0.5,) * 3), words, lab.IMAGE, ("pixel_values",))
    assert processor.word("Cheese wedge") == [6]
    with pytest.raises(Invalid, match="'zeppelin' is not in this model's vocabulary"):
        processor.word("zeppelin")


def test_the_control_row_parameter_is_used(tiny, subject):
    patch = subject.arms["a"]
    t = patch.directions(tiny, ["x"])
    how = {"arm": "a", "max_tokens": 2, "logprobs": 0, "ignore_eos": True}
    one, other = row(tiny, params={ROW: t}, **how), row(tiny, params={ROW: t, ALONG: torch.randn(t.shape)}, **how)
    tokens(tiny, subject, [one])
    tokens(tiny, subject, [other])
    assert one.scores != other.scores
