"""The direct-effect decomposition: what adds up, to what, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patches.engine.edits import Act
from patches.engine.patch import Patch, apply
from patches.families import clip
from patches.families.clip.direct import Lens, readout
from patches.mechanisms.features import SAE, edit
from registry.errors import Invalid, NotFound


@pytest.fixture(scope="module")
def lens(tiny_clip):
    return Lens(tiny_clip)


@pytest.fixture(scope="module")
def exact():
    """The tiny tower in float64, where a mistake cannot hide behind rounding."""
    base = clip.tiny()
    base.model.double()
    return Lens(base)


def images(n=5, seed=0, dtype=torch.float32):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("share", ["own", "apportioned"])
def test_all_terms_add_up_to_the_embedding(lens, share):
    x = images()
    parts = lens.read(x, patches=[0, 2], share=share)
    with torch.no_grad():
        y = lens.base.model.visual(x)
    torch.testing.assert_close(parts.y, y)
    torch.testing.assert_close(parts.sum, y, atol=1e-5, rtol=0)
    assert parts.rest.abs().max() < 1e-5
    for i in (0, 2):
        extra = 0 if share == "apportioned" else lens.readout.bias.new_zeros(1)
        torch.testing.assert_close(parts.patches[i].sum(2), parts.heads[:, i] + extra, atol=1e-5, rtol=0)
    unit = parts.sum / parts.norm[:, None]
    torch.testing.assert_close(unit, clip.embed_images(lens.base, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", ["own", "apportioned"])
def test_in_float64_they_add_up_to_rounding(exact, share):
    parts = exact.read(images(dtype=torch.float64), patches=[0, 1, 2], share=share)
    assert parts.rest.abs().max() < 1e-12
    for i in range(3):
        torch.testing.assert_close(parts.patches[i].sum(2), parts.heads[:, i], atol=1e-12, rtol=0)


def test_topic_maps_are_the_patches_terms_against_the_texts(exact):
    x, t = images(dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    maps = exact.maps(x, t, [0, 2])
    parts = exact.read(x, patches=[0, 2])
    for n, i in enumerate((0, 2)):
        want = torch.einsum("bhsk,nk->bhns", parts.patches[i], t)
        torch.testing.assert_close(maps.said[:, n], want, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        exact.maps(x, t).said.sum(-1), torch.einsum("blhk,nk->blhn", parts.heads, t), atol=1e-12, rtol=0
    )


def test_the_row_of_attention_is_the_module_s_own(exact):
    from patches.engine.read import record

    x = images(dtype=torch.float64)
    with record(exact.base.model, [clip.site("pattern", 1)]) as seen, torch.no_grad():
        exact.base.model(image=x)
    torch.testing.assert_close(
        exact.maps(x, torch.zeros(1, 24)).pattern[:, 1], seen[clip.site("pattern", 1)][0][:, :, 0]
    )


def test_a_head_without_a_way_out_adds_nothing(tiny_clip):
    base = clip.tiny()
    base.model.visual.transformer.resblocks[1].attn.out_proj.weight.data[:, 8:16] = 0
    parts = Lens(base).read(images(), patches=[1])
    assert parts.heads[:, 1, 1].abs().max() == 0
    assert parts.patches[1][:, 1].abs().max() == 0
    assert parts.heads[:, 1, 0].abs().max() > 0


@settings(max_examples=8, deadline=None, derandomize=True)
@given(scale=st.floats(0.1, 10), batch=st.integers(1, 5))
def test_terms_scale_with_the_projection_and_ignore_their_neighbours(scale, batch):
    base = clip.tiny()
    want = Lens(base).read(images())
    base.model.visual.proj.data *= scale
    got = Lens(base).read(images()[:batch])
    torch.testing.assert_close(got.heads, scale * want.heads[:batch], atol=1e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(got.mlps, scale * want.mlps[:batch], atol=1e-5 * scale, rtol=1e-4)


def test_a_patched_forward_is_read_as_it_is(lens):
    """A head patch shows in that head alone; what a patch of a whole block adds is the rest."""
    x = images()

    class Half(Patch):
        def edits(self):
            def fn(z, _):
                out = z.clone()
                out[:, 0, :8] *= 0.5
                return out

            return [Act(clip.site("heads", 2), fn, "input")]

    before = lens.read(x)
    with apply(lens.base.model, {"a": Half(None, {})}) as on, on.rows(["a"] * 5):
        after = lens.read(x)
    assert after.rest.abs().max() < 1e-5
    scaled = before.heads[:, 2, 0] * (before.sigma / after.sigma)[:, None]
    torch.testing.assert_close(after.heads[:, 2, 0], 0.5 * scaled, atol=1e-5, rtol=1e-4)

    sae = SAE(torch.eye(32), torch.zeros(32), torch.eye(32), torch.zeros(32))
    with edit(sae, clip.site("block", 1), [0, 3], "clamp", 3.0).apply(lens.base.model):
        parts = lens.read(x)
    torch.testing.assert_close(parts.sum + parts.rest, parts.y, atol=1e-5, rtol=0)
    assert parts.rest.abs().max() > 1e-3


def test_half_precision_is_read_with_full_statistics():
    base = clip.tiny()
    want = Lens(base).read(images())
    base.model.bfloat16()
    parts = Lens(base).read(images())
    assert parts.y.dtype == torch.float32
    assert parts.rest.norm() / parts.y.norm() < 0.02
    assert (parts.heads - want.heads).norm() / want.heads.norm() < 0.1


def test_the_readout_is_linear_under_frozen_statistics(exact):
    r = readout(exact.base)
    z = torch.randn(4, 32, dtype=torch.float64)
    sigma = r.sigma(z)
    with torch.no_grad():
        want = exact.base.model.visual.ln_post(z) @ exact.base.model.visual.proj
    torch.testing.assert_close(r(z, sigma) + r.bias, want, atol=1e-12, rtol=0)
    parts = torch.randn(4, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(r(parts, sigma).sum(1), r(parts.sum(1), sigma))


def test_other_architectures_are_refused_by_name(tiny_clip, tiny_llm):
    with pytest.raises(NotFound, match="LlamaForCausalLM has no image tower"):
        Lens(tiny_llm)
    for change, says in (
        (lambda v: setattr(v, "pool_type", "avg"), "pooling of the class token"),
        (lambda v: setattr(v, "proj", None), "projection"),
        (lambda v: setattr(v.transformer.resblocks[1], "ls_1", torch.nn.Linear(1, 1)), "LayerScale"),
    ):
        base = clip.tiny()
        change(base.model.visual)
        with pytest.raises(NotFound, match=says):
            Lens(replace(base, name="odd"))


@pytest.mark.parametrize(("layers", "says"), [([3], "no layer 3"), ([-1], "no layer -1"), ([1, 1], "different")])
def test_layers_that_are_not_there_are_named(lens, layers, says):
    with pytest.raises(Invalid, match=says):
        lens.read(images(1), patches=layers)
    with pytest.raises(Invalid, match=says):
        lens.maps(images(1), torch.zeros(1, 24), layers)
