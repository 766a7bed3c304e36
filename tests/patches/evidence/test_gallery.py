"""A gallery answers exactly what all contributions would, but for what fp16 and its directions drop."""

import pytest
import torch

from patches.evidence.gallery import Gallery, directions, joined, load_gallery, make_gallery, save_gallery
from patches.families.clip.direct import Lens
from registry.errors import Invalid, NotFound

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def lens(tiny_clip):
    return Lens(tiny_clip)


def images(n=12, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def given(lens, x):
    """(N, L, H, k) what heads of LAYERS add to unit embeddings."""
    parts = lens.read(x)
    return (parts.heads / parts.norm[:, None, None, None])[:, list(LAYERS)]


def built(lens, x, size=5, keep=1.0):
    c = given(lens, x)
    d = c - c.mean(0)
    basis = directions(torch.einsum("nlhk,nlhm->lhkm", d, d) / len(c), keep)
    names = [str(i) for i in range(len(x))]
    pictures = torch.zeros(len(x), 3, 40, 60)
    at = [slice(i, i + size) for i in range(0, len(x), size)]
    batches = [(x[s], pictures[s], names[s]) for s in at]
    return make_gallery(lens, batches, LAYERS, basis)


@pytest.mark.parametrize("heads", [[(2, 3)], [(1, 0), (2, 1), (2, 2)]])
@pytest.mark.parametrize("metric", ["raw", "centred", "cosine"])
def test_neighbours_are_those_of_the_contributions(lens, heads, metric):
    x = images()
    g, c = built(lens, x), given(lens, x)
    v = torch.stack([c[:, LAYERS.index(layer), h] for layer, h in heads]).mean(0)
    mean = v.mean(0)
    v = v if metric == "raw" else v - mean
    t = torch.nn.functional.normalize(torch.randn(24, generator=torch.Generator().manual_seed(1)), dim=0)
    want = v @ t / (v.norm(dim=1) if metric == "cosine" else 1)
    rows, scores = g.nearest(t, heads, 12, metric)
    torch.testing.assert_close(
        scores, want.sort(descending=True).values, atol=2e-3 if metric == "cosine" else 2e-4, rtol=1e-2
    )
    assert int(rows[0]) == int(want.argmax())
    q = g.ask(c[4], heads, metric)
    torch.testing.assert_close(q, v[4], atol=1e-4, rtol=1e-3)
    rows, scores = g.nearest(q, heads, 1, "cosine" if metric == "cosine" else "centred")
    if metric == "cosine":
        assert (int(rows[0]), float(scores[0])) == (4, pytest.approx(1.0, abs=2e-3))


def test_batches_do_not_matter_and_the_codes_keep_what_they_say(lens):
    x = images(20)
    one, two = built(lens, x, 5), built(lens, x, 20)
    torch.testing.assert_close(one.code, two.code, atol=2e-3, rtol=1e-2)
    assert one.names == two.names
    assert one.kept > 0.999
    assert one.thumbs.shape == (20, 3, 48, 48)
    less = built(lens, x, keep=0.9)
    assert less.code.shape[-1] < one.code.shape[-1]
    assert 0.9 <= less.kept < one.kept


def test_what_is_saved_comes_back(lens, tmp_path):
    g = built(lens, images())
    save_gallery(g, tmp_path)
    again = load_gallery(tmp_path)
    assert (again.layers, again.names, again.kept) == (g.layers, g.names, g.kept)
    assert torch.equal(again.code, g.code)
    with pytest.raises(NotFound, match="no gallery"):
        load_gallery(tmp_path / "nowhere")


def test_joined_galleries_are_one_gallery(lens):
    x = images(12)
    whole = built(lens, x)
    parts = [
        make_gallery(lens, [(x[at], torch.zeros(6, 3, 8, 8), ["a"] * 6)], LAYERS, whole.basis)
        for at in (slice(6), slice(6, 12))
    ]
    both = joined(*parts)
    torch.testing.assert_close(both.mean, whole.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(both.code.float(), whole.code.float(), atol=2e-3, rtol=2e-2)
    assert len(both) == 12


def test_centring_takes_hubs_away():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(200, 8, generator=g)
    v = v * (1 + 0.5 * torch.rand(200, 1, generator=g))
    k = torch.eye(8)[None, None]
    constant = torch.zeros(1, 1, 8)
    constant[..., 0] = 5.0
    thumbs = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    made = Gallery((0,), k, constant, v[:, None, None].half(), thumbs, ("",) * 200, 1.0)
    assert made.hubness([(0, 0)], "raw") > 3 * abs(made.hubness([(0, 0)], "cosine"))


def test_heads_it_has_not_are_named(lens):
    g = built(lens, images(4))
    bad = [([(0, 0)], NotFound, "no head 0.0"), ([(1, 9)], NotFound, "1.9"), ([], Invalid, "empty")]
    for heads, error, says in bad:
        with pytest.raises(error, match=says):
            g.nearest(torch.zeros(24), heads, 3)
    with pytest.raises(Invalid, match="at least one picture"):
        make_gallery(lens, [], LAYERS, g.basis)
