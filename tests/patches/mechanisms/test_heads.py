"""Head edits on CLIP: what they touch, where, and what is refused. The conformance suite has the rest."""

import pytest
import torch

from patches.engine.read import record
from patches.families import clip
from patches.families.clip.direct import Lens
from patches.families.clip.towers import export_towers
from patches.mechanisms.heads import HeadConfig, HeadEdit
from registry.errors import PatchError

SITE = clip.SITES["heads"]
HEADS = ((0, 1), (2, 0), (2, 3))


def heads(mode="zero", tokens="all", where=HEADS, **tensors):
    return HeadEdit(HeadConfig(SITE, where, 4, mode, tokens), tensors)


def images(n=4):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def given(base, layer):
    """(B, T, H, e) that leaves the heads of a layer, after any patch."""
    site = clip.site("heads", layer)
    with record(base.model, [site], "input") as seen, torch.no_grad():
        base.model(image=images())
    return seen[site][0].unflatten(-1, (4, -1))


@pytest.mark.parametrize("tokens", ["all", "cls"])
def test_only_the_named_heads_change_and_only_where_they_should(tiny_clip, tokens):
    before = given(tiny_clip, 0)
    with heads(tokens=tokens, where=((0, 1),)).apply(tiny_clip.model):
        after = given(tiny_clip, 0)
    at = slice(None) if tokens == "all" else slice(0, 1)
    assert after[:, at, 1].abs().max() == 0
    rest = torch.ones_like(before, dtype=torch.bool)
    rest[:, at, 1] = False
    assert torch.equal(after[rest], before[rest])


def test_a_factor_weakens_and_a_mean_replaces(tiny_clip):
    before = given(tiny_clip, 2)
    with heads("scale", factor=torch.tensor([1.0, 0.25, -2.0])).apply(tiny_clip.model):
        x = given(tiny_clip, 2)[:, :, 0]
    # layer 0 is scaled by 1, so layer 2 gets what it got
    torch.testing.assert_close(x, 0.25 * before[:, :, 0])
    value = torch.randn(3, 8)
    with heads("mean", "cls", value=value).apply(tiny_clip.model):
        after = given(tiny_clip, 2)
    assert torch.equal(after[:, 0, 3], value[2].expand(4, -1))
    by_position = torch.randn(3, 17, 8)
    with heads("mean", value=by_position).apply(tiny_clip.model):
        assert torch.equal(given(tiny_clip, 2)[:, :, 0], by_position[1].expand(4, -1, -1))


def test_a_silent_head_has_no_direct_effect(tiny_clip):
    lens = Lens(tiny_clip)
    with heads(tokens="cls").apply(tiny_clip.model):
        parts = lens.read(images())
    assert parts.heads[:, 2, 3].abs().max() == 0
    assert parts.heads[:, 2, 1].abs().max() > 0


@pytest.mark.parametrize("mode", ["zero", "mean", "scale"])
def test_at_all_tokens_it_folds(tiny_clip, mode):
    tensors = {"mean": {"value": torch.randn(3, 8)}, "scale": {"factor": torch.tensor([0.5, 2.0, 0.0])}}.get(mode, {})
    patch = heads(mode, **tensors)
    folded = patch.fold(tiny_clip.model)
    with torch.inference_mode(), patch.apply(tiny_clip.model):
        want = tiny_clip.model(image=images())["image_features"]
        torch.testing.assert_close(folded(image=images())["image_features"], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "patch", [heads("mean", "cls", value=torch.zeros(3, 8)), heads("mean", value=torch.zeros(3, 17, 8))]
)
def test_what_holds_for_single_tokens_is_not_folded(tiny_clip, patch):
    with pytest.raises(PatchError, match="hooks"):
        patch.fold(tiny_clip.model)


def test_a_class_token_edit_is_traced_into_the_graph(tiny_clip, tmp_path):
    export_towers(tiny_clip, tmp_path, heads("mean", "cls", value=torch.randn(3, 8)), system="clip_heads")
    assert clip.FAMILY.fold is not None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: heads(where=()), "no head"),
        (lambda: heads(where=((0, 4),)), r"no head \(0, 4\)"),
        (lambda: heads(where=((-1, 0),)), "no head"),
        (lambda: heads(where=((0, 1), (0, 1))), "twice"),
        (lambda: heads("mean"), "'value'"),
        (lambda: heads("scale", factor=torch.ones(2)), "'factor'"),
        (lambda: heads("scale", factor=torch.tensor([1.0, float("nan"), 1.0])), "finite"),
        (lambda: heads("mean", "cls", value=torch.zeros(3, 17, 8)), "class token has one"),
        (lambda: HeadEdit(HeadConfig("visual.attn", HEADS, 4), {}), "{i}"),
    ],
)
def test_bad_edits_are_told_why(make, says):
    with pytest.raises(PatchError, match=says):
        make()


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (heads("mean", value=torch.zeros(3, 7)), "7 columns"),
        (heads("mean", value=torch.zeros(3, 9, 8)), "9 tokens"),
        (HeadEdit(HeadConfig(SITE, ((0, 1),), 5), {}), "not 5 heads"),
    ],
)
def test_an_edit_of_another_tower_is_told_why(tiny_clip, patch, says):
    with patch.apply(tiny_clip.model), pytest.raises(PatchError, match=says):
        tiny_clip.model(image=images())
