"""Denoising rows: each gets exactly what it would get alone, by diffusers' own schedulers, whoever shares its batch."""

import pytest
import torch

from patches.engine.edits import Act
from patches.engine.patch import Patch, apply
from patches.families import diffusion
from patches.families.diffusion import Denoiser, Denoising, Edit, Invert, Regenerate
from patches.families.diffusion.schedule import noise
from patches.families.worker import WorkerSettings
from registry.errors import Failed, Invalid, PatchbayError

FAMILY = diffusion.FAMILY


class Bare:
    """A base with arms, as a worker wants it."""

    def __init__(self, base, **arms):
        self.base, self.applied = base, apply(base.model, arms, root=base.root)


class Louder(Patch):
    """Scales the text condition, by a row parameter if the row has it."""

    Config = dict

    def edits(self):
        def act(x, inputs):
            own = inputs.row("scale")
            return x * (3.0 if own is None else torch.where(own == 0, 3.0, own)[:, :1, None])

        return [Act("given.text", act)]


@pytest.fixture(scope="module")
def tiny():
    return FAMILY.tiny(0)


@pytest.fixture
def bare(tiny):
    made = Bare(tiny, loud=Louder({}, {}))
    yield made
    made.applied.revert()


def rows(base):
    """Rows that differ in everything."""
    a, b = base.model.text(["a cat", "sun"])
    image = base.model.image(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)))[0]
    start = base.model.latents(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4)))[0]
    levels = diffusion.levels(base.model, 3)
    return [
        lambda: Denoising(condition=a, guidance=3.0, steps=4, seed=1),
        lambda: Denoising(condition=b, steps=7, seed=2, arm="loud"),
        lambda: Denoising(condition=image, guidance=2.0, steps=3, seed=3, solver="dpm++"),
        lambda: Denoising(condition=a, guidance=2.0, steps=5, seed=4, solver="unipc", arm="loud", strength=0.5),
        lambda: Denoising(condition=a, guidance=2.0, steps=3, arm="loud", params={"scale": torch.tensor([-2.0])}),
        lambda: Denoising(condition=a, other=image, guidance=2.0, steps=2, arm="loud", other_patched=True),
        lambda: Denoising(condition=image, start=start, program=Invert("edit_friendly", levels), decode=False),
        lambda: Denoising(condition=image, other=image, guidance=2.0, start=start, program=Edit("edict", levels)),
        lambda: Denoising(condition=a, start=start, strength_of_edit=0.5, steps=6, solver="dpm++"),
    ]


def test_a_row_in_company_is_what_it_is_alone(tiny, bare):
    """Rows that join, leave and wait for a slot."""
    makers = rows(tiny)
    together = [make() for make in makers]
    Denoiser(bare, WorkerSettings(slots=4)).run(together)
    for make, row in zip(makers, together, strict=True):
        alone = make()
        Denoiser(bare).run([alone])
        torch.testing.assert_close(row.out, alone.out, atol=2e-5, rtol=1e-4)
        assert row.evaluations == alone.evaluations
        assert row.stage == row.stages
    loud, quiet = together[4], together[0]
    assert not torch.allclose(loud.out, quiet.out)


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("kind", ["tiny", "stable", "unclip", "kandinsky"])
def test_samples_equal_diffusers_own_loop(kind, solver):
    base = FAMILY.tiny(0) if kind == "tiny" else FAMILY.purposes[kind]()
    told = base.model.text(["cat"])[0] if kind != "kandinsky" else base.model.image(torch.rand(1, 3, 16, 16))[0]
    bare = Bare(base)
    row = Denoising(condition=told, guidance=2.5, steps=5, solver=solver, seed=9)
    Denoiser(bare).run([row])
    scheduler = base.model.schedule.stock(solver, 5)
    x = noise(base.model.shape, 9)[None] * float(scheduler.init_noise_sigma)
    more = {"use_clipped_model_output": True} if solver == "ddim" else {}
    with torch.inference_mode():
        for t in scheduler.timesteps:
            both = torch.cat([scheduler.scale_model_input(x, t)] * 2)
            own, other = base.model.rows(both, torch.tensor([float(t)] * 2), [told, base.model.null()]).split(1)
            x = scheduler.step(other + 2.5 * (own - other), t, x, **more).prev_sample
    torch.testing.assert_close(row.out, x[0], atol=1e-4, rtol=1e-4)
    bare.applied.revert()


@pytest.mark.parametrize("method", ["edict", "o_belm", "edit_friendly"])
@pytest.mark.parametrize("kind", ["tiny", "stable"])
def test_exact_inversions_give_the_picture_back(kind, method):
    base = FAMILY.tiny(0) if kind == "tiny" else FAMILY.purposes[kind]()
    bare, told = Bare(base), base.model.text(["cat"])[0]
    x = base.model.latents(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))[0]
    levels = diffusion.levels(base.model, 6)
    worker = Denoiser(bare)
    up = Denoising(condition=told, start=x, program=Invert(method, levels), decode=False)
    worker.run([up])
    down = Denoising(condition=told, start=up.out, program=Regenerate(method, levels))
    worker.run([down])
    torch.testing.assert_close(down.out, x, atol=2e-3, rtol=1e-3)
    bare.applied.revert()


def test_fixed_point_comes_nearer_than_plain_ddim(tiny, bare):
    told = tiny.model.text(["cat"])[0]
    x = tiny.model.latents(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))[0]
    off = {}
    for method in ("ddim", "fixed_point"):
        row = Denoising(condition=told, start=x, program=Edit(method, diffusion.levels(tiny.model, 8)))
        Denoiser(bare).run([row])
        off[method] = float((row.out - x).abs().mean())
    assert off["fixed_point"] < 0.3 * off["ddim"]


def test_an_edit_without_an_arm_gives_the_picture_back_and_inverts_on_the_base(tiny, bare):
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5))
    plain = diffusion.changed(tiny.model, picture, count=6)
    arm = diffusion.changed(tiny.model, picture, count=6, arm="loud")
    Denoiser(bare).run([plain, arm])
    assert float((plain.picture - picture).abs().mean()) < 0.05
    assert float((arm.picture - plain.picture).abs().mean()) > 1e-4


BAD = [
    ({"steps": 0}, "steps"),
    ({"steps": 10**6}, "steps"),
    ({"guidance": float("nan")}, "Guidance"),
    ({"guidance": 1e9}, "Guidance"),
    ({"solver": "magic"}, "Solvers"),
    ({"strength_of_edit": 0.0}, "Strength"),
    ({"size": (64, 64)}, "pictures of"),
    ({"start": torch.zeros(3, 16, 16)}, "latents of shape"),
    ({"params": {"z": torch.tensor([float("nan")])}}, "NaN"),
    ({"condition": {"text": torch.zeros(24, 32)}}, "told text, image"),
    ({"condition": {"text": torch.full((24, 32), float("inf")), "image": torch.zeros(24)}}, "finite"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=lambda x: str(x)[:20])
def test_a_row_that_cannot_be_run_is_refused_in_words(tiny, bare, bad, words):
    worker = Denoiser(bare)
    good = Denoising(condition=tiny.model.null(), steps=2)
    with pytest.raises(Invalid, match=words):
        worker.add([good, Denoising(**{"condition": tiny.model.null(), **bad})])
    assert worker.idle


def test_a_row_that_breaks_fails_alone(tiny, bare):
    class Broken(Patch):
        Config = dict

        def edits(self):
            return [Act("given.text", lambda x, _: x * torch.nan)]

    bare.applied.add("broken", Broken({}, {}))
    told = tiny.model.text(["cat"])[0]
    good, bad = Denoising(condition=told, steps=3), Denoising(condition=told, steps=3, arm="broken")
    worker = Denoiser(bare)
    worker.add([bad, good])
    while not worker.idle:
        worker.step()
    assert isinstance(bad.error, Failed)
    assert good.picture is not None
    with pytest.raises(PatchbayError):
        worker.proof("broken")


def test_cancelling_a_row_leaves_the_others(tiny, bare):
    told = tiny.model.text(["cat"])[0]
    a, b = (Denoising(condition=told, steps=6, seed=i) for i in range(2))
    worker = Denoiser(bare)
    worker.add([a, b])
    worker.step()
    worker.cancel(a)
    while not worker.idle:
        worker.step()
    alone = Denoising(condition=told, steps=6, seed=1)
    Denoiser(bare).run([alone])
    assert a.finished == "cancelled"
    torch.testing.assert_close(b.out, alone.out, atol=2e-5, rtol=1e-4)
