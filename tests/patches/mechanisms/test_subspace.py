"""A weight space: rows of one batch at different points, folding, plain adapters, and what requests may say."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import Generator, nn

from patches.engine.patch import ONLY, apply
from patches.families import diffusion
from patches.families.base import load_base
from patches.families.diffusion import Denoiser, identity, small
from patches.families.diffusion.identity import Inversion
from patches.mechanisms import subspace
from patches.mechanisms.subspace import (
    AdapterSet,
    AdapterSetConfig,
    Layer,
    Point,
    SubspaceConfig,
    SubspaceEdit,
    dense,
    linear_layers,
    low_rank,
    size,
    split,
)
from patches.subject import Subject
from registry.errors import Invalid, PatchError


def make(model, leaves=("to_v", "to_out"), m=5, attributes=("beard", "hat"), rank=1, scale=1.5, form="raw"):
    """A random space over the modules of `model` with those last names; strong enough to be seen."""
    g = Generator().manual_seed(0)
    layers = linear_layers(model, leaves, rank, under="denoiser")
    if form == "update":
        layers = tuple(Layer(x.site, (), (x.b[0], x.a[1])) for x in layers)
    d, k = size(layers), len(attributes)
    tensors = {
        "mean": torch.randn(d, generator=g) * 0.1, "sd": torch.rand(d, generator=g) * 0.1 + 0.05,
        "basis": torch.linalg.qr(torch.randn(d, m, generator=g)).Q, "std": torch.rand(m, generator=g) * 3 + 2,
        "z": torch.randn(m, generator=g), "members": torch.randn(9, m, generator=g),
        "directions": nn.functional.normalize(torch.randn(k, m, generator=g), dim=1), "gap": torch.ones(k) * 2,
        "reach": torch.tensor([[-3.0, 3.0]]).expand(k, 2).contiguous(), "radius": torch.tensor([0.4, 1.6]),
    }  # fmt: skip
    return SubspaceEdit(SubspaceConfig(layers, scale, tuple(attributes), form), tensors)


@pytest.fixture(scope="module")
def base():
    return load_base("tiny:faces", "diffusion")


def inputs(base, n, seed=0):
    g = Generator().manual_seed(seed)
    text = torch.randn(n, *base.model.conditions["text"], generator=g)
    sample = torch.randn(n, *base.model.shape, generator=g)
    return {"sample": sample, "timestep": torch.linspace(20, 980, n), "text": text}


ASKS = [
    Point(), Point(coefficients=[1.0, -2.0]), Point(person=3), Point(seed=5), Point(seed=5, attributes={"beard": 2.0}),
    Point(person=1, attributes={"beard": -1.0, "hat": 0.5}), Point(coefficients=[0.0] * 5),
    Point(seed=6, truncation=0.5),
]  # fmt: skip


@pytest.mark.parametrize("form", ["raw", "update"])
def test_rows_of_one_batch_are_different_points_and_each_equals_its_merged_weights(base, form):
    patch = make(base.model, form=form)
    x = inputs(base, len(ASKS))
    with torch.no_grad(), apply(base.model, {"a": patch}) as on:
        with on.rows(["a"] * len(ASKS), params=[patch.params(ask, base) for ask in ASKS]):
            mixed = base.model(**x)
    for i, ask in enumerate(ASKS):
        folded = patch.at(patch.point(ask)).fold(base.model)
        with torch.no_grad():
            alone = folded(**{k: v[i : i + 1] for k, v in x.items()})
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=2e-5, rtol=1e-4)


def test_rows_that_say_nothing_are_at_the_patchs_own_point_beside_rows_that_say_something(base):
    patch = make(base.model)
    x = inputs(base, 3)
    with torch.no_grad(), apply(base.model, {"a": patch}) as on:
        with on.rows(["a", "a", None], params=[{}, patch.params(Point(seed=1), base), {}]):
            mixed = base.model(**x)
        with on.rows(["a"] * 3):
            own = base.model(**x)
        with on.rows([None] * 3):
            plain = base.model(**x)
    torch.testing.assert_close(mixed[0], own[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1], own[1], atol=1e-3)
    assert torch.equal(mixed[2], plain[2])


def test_a_convolution_is_edited_by_row():
    g = Generator().manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    x, a, b = (torch.randn(*s, generator=g) for s in ((6, 3, 8, 8), (3, 2, 3, 3, 3), (3, 5, 2, 1, 1)))
    got = low_rank(x, a, b, 0.7)
    for i in range(6):
        other = copy.deepcopy(conv)
        other.weight.data = dense(a[i // 2], b[i // 2], 0.7)
        other.bias.data.zero_()
        torch.testing.assert_close(got[i], other(x[i : i + 1])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["stable", "unclip", "kandinsky"])
def test_any_unet_is_edited_and_a_fold_equals_its_rows(name):
    base = load_base(f"tiny:{name}", "diffusion")
    # to_out.0 is attention's output, conv1 a convolution, both as diffusers names them
    patch = make(base.model, ("to_q", "to_v", "to_out.0", "conv1"), rank=2)
    g = Generator().manual_seed(0)
    x = {k: torch.randn(2, *s, generator=g) for k, s in base.model.conditions.items()}
    x |= {"sample": torch.randn(2, *base.model.shape, generator=g), "timestep": torch.tensor([500.0, 20.0])}
    asks = [Point(seed=1), Point(seed=2)]
    with torch.no_grad(), apply(base.model, {"a": patch}) as on:
        with on.rows(["a", "a"], params=[patch.params(a, base) for a in asks]):
            rows = base.model(**x)
    with torch.no_grad():
        for i, ask in enumerate(asks):
            folded = patch.at(patch.point(ask)).fold(base.model)
            torch.testing.assert_close(rows[i], folded(**x)[i], atol=5e-5, rtol=1e-4)


def test_the_worker_draws_each_row_as_it_would_alone_and_leaves_the_null_half_to_the_base(base):
    patch = make(base.model)
    subject = Subject(base, {"a": patch})
    told = base.model.text(["a smiling person"])[0]

    def row(i, ask):
        params = patch.params(ask, base) if i else {}
        return diffusion.Denoising(condition=told, arm="a", params=params, guidance=2.0, steps=4, seed=i)

    worker = Denoiser(subject)
    rows = worker.run([row(i, ask) for i, ask in enumerate(ASKS)])
    for i, ask in enumerate(ASKS):
        (alone,) = worker.run([row(i, ask)])
        torch.testing.assert_close(rows[i].picture, alone.picture, atol=1e-5, rtol=1e-5)
    subject.close()


def test_delayed_injection_is_the_base_above_its_timestep_and_the_edit_below(base):
    patch = make(base.model)
    x = inputs(base, 4)  # timesteps 20, 340, 660, 980
    told = [patch.params(Point(seed=1, after=t), base) for t in (1000, 500, 500, 500)]
    with torch.no_grad(), apply(base.model, {"a": patch}) as on:
        with on.rows(["a"] * 4, params=told):
            got = base.model(**x)
        with on.rows(["a"] * 4, params=told[:1] * 4):
            all_the_way = base.model(**x)
        with on.rows([None] * 4):
            plain = base.model(**x)
    torch.testing.assert_close(got[:2], all_the_way[:2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[2:], plain[2:], atol=1e-6, rtol=1e-5)


def test_an_exported_point_draws_the_same_in_stock_diffusers_and_peft(tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import PeftModel

    folder = tmp_path / "base"
    small.stable_folder(folder)
    base = load_base(f"local-dir:{folder}", "diffusion")
    patch = make(base.model, ("to_q", "to_v"), scale=27.0)
    z = patch.point(Point(seed=3)) * 0.3
    diffusion.write_adapter(identity.adapter(patch, z), tmp_path / "adapter")
    g = Generator().manual_seed(0)
    x, c = torch.randn(1, *base.model.shape, generator=g), torch.randn(1, *base.model.conditions["text"], generator=g)
    with torch.no_grad(), apply(base.model, {"a": patch}) as on:
        with on.rows(["a"], params=[patch.row(patch.decode(z))]):
            want = base.model(sample=x, timestep=torch.tensor([500.0]), text=c)
        plain = base.model(sample=x, timestep=torch.tensor([500.0]), text=c)
        subject_picture = _picture(base, patch, z)
    assert (want - plain).abs().max() > 0.01
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        got = pipe.unet(x, 500, encoder_hidden_states=c).sample
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    stock = pipe(
        "ABC", num_inference_steps=4, guidance_scale=1.0, latents=_noise(base), output_type="pt"
    ).images[0]  # fmt: skip
    torch.testing.assert_close(stock, subject_picture, atol=1e-4, rtol=1e-4)
    pipe.unload_lora_weights()
    peft = PeftModel.from_pretrained(pipe.unet, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(x, 500, encoder_hidden_states=c).sample, want, atol=1e-4, rtol=1e-4)


def _noise(base):
    return torch.randn(1, *base.model.shape, generator=Generator().manual_seed(9))


def _picture(base, patch, z):
    """What our own worker draws from `_noise` at a point."""
    subject = Subject(base, {"b": patch})
    row = diffusion.Denoising(
        condition=base.model.text(["ABC"])[0], arm="b", params=patch.row(patch.decode(z)), steps=4, seed=9
    )
    (done,) = Denoiser(subject).run([row])
    subject.close()
    return done.picture


def test_a_dense_update_is_exported_as_its_best_factors(base):
    patch = make(base.model, form="update")
    made = identity.adapter(patch)
    full = split(patch.config.layers, patch.decode(patch.tensors["z"]))
    for layer, (_, update) in zip(patch.config.layers, full, strict=True):
        a, b = made.factors[layer.site.removeprefix("denoiser.")]
        assert (b @ a - 1.5 * update).norm() <= 0.011 * (1.5 * update).norm()


def test_decoding_and_encoding_are_inverse_in_the_space(base):
    patch = make(base.model)
    z = torch.randn(7, 5, generator=Generator().manual_seed(2))
    torch.testing.assert_close(patch.encode(patch.decode(z)), z, atol=1e-4, rtol=1e-4)


def test_edits_add_up_and_are_read_back_in_gaps(base):
    patch = make(base.model)
    z = patch.tensors["z"]
    both = patch.move(patch.move(z, {"beard": 1.0}), {"hat": -0.5})
    torch.testing.assert_close(both, patch.move(z, {"hat": -0.5, "beard": 1.0}))
    moved = patch.read(patch.move(z, {"beard": 1.5})) - patch.read(z)
    assert abs(float(moved[0]) - 1.5) < 1e-4


def test_samples_stay_as_far_out_as_the_population_and_truncation_draws_them_in(base):
    patch = make(base.model)
    wide, near = (patch.sample(200, Generator().manual_seed(0), f).norm(dim=1) / 5**0.5 for f in (2.0, 0.1))
    assert float(wide.max()) <= 1.6 + 1e-5
    assert float(near.mean()) < 0.2
    assert float(patch.sample(2, Generator(), 0.0).abs().max()) == 0.0


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"attributes": {"beard": 1e9}}, "beyond"),
        ({"attributes": {"wings": 1.0}}, "Attributes: beard, hat"),
        ({"coefficients": [0.0] * 6}, "has 5"),
        ({"coefficients": [99.0]}, "standard deviations"),
        ({"person": 9}, "no member"),
        ({"person": 1, "seed": 1}, "one place"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(base, said, word):
    patch = make(base.model)
    with pytest.raises(Invalid, match=word):
        patch.params(Point.model_validate(said), base)


WRONG = [
    {"coefficients": [float("nan")]}, {"attributes": {"beard": float("inf")}}, {"wings": 1}, {"after": 1001},
    {"person": -1},
]  # fmt: skip


@pytest.mark.parametrize("said", WRONG, ids=str)
def test_what_is_no_number_is_refused_before_it_reaches_the_patch(said):
    with pytest.raises(ValidationError):
        Point.model_validate(said)


def test_a_space_with_holes_is_refused(base):
    good = make(base.model)
    holes = {"std": torch.zeros(5), "mean": torch.zeros(3), "sd": torch.full_like(good.tensors["sd"], torch.nan)}
    for name, bad in holes.items():
        with pytest.raises(PatchError):
            SubspaceEdit(good.config, {**good.tensors, name: bad})
    with pytest.raises(PatchError, match="needs the tensors"):
        SubspaceEdit(good.config, {k: v for k, v in good.tensors.items() if k != "basis"})


def test_inversion_finds_coefficients_that_explain_a_latent_better_and_leaves_the_base_alone(base):
    patch = make(base.model)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    latents = torch.randn(2, *base.model.shape, generator=Generator().manual_seed(4))
    text = base.model.null()["text"]
    losses = []
    forward, on = identity.alone(base.model, patch)
    z = identity.invert(
        patch, base.model.schedule, forward, latents, lambda rows, g: {"text": text.expand(2 * rows, *text.shape)},
        Inversion(steps=16, rows=8), on_step=lambda step, loss, z: losses.append(loss),
    )  # fmt: skip
    on.revert()
    assert z.shape == (2, 5)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())


def test_inversion_through_a_serving_arm_equals_inversion_alone(base):
    patch = make(base.model)
    latents = torch.randn(1, *base.model.shape, generator=Generator().manual_seed(4))
    text = base.model.null()["text"]

    def run(forward):
        def told(rows, g):
            return {"text": text.expand(rows, *text.shape)}

        return identity.invert(patch, base.model.schedule, forward, latents, told, Inversion(steps=4, rows=3))

    with apply(base.model, {"a": patch}) as on:
        through = run(identity.served(on, base.model, "a", patch))
    forward, on = identity.alone(base.model, patch)
    by_itself = run(forward)
    on.revert()
    torch.testing.assert_close(through, by_itself, atol=1e-4, rtol=1e-3)


def test_adapters_side_by_side_equal_each_by_itself(base):
    layers = linear_layers(base.model, ("to_v",))
    theta = torch.randn(3, size(layers), generator=Generator().manual_seed(0)) * 0.3
    x = inputs(base, 6)

    def run(t, part):
        with torch.no_grad(), apply(base.model, {ONLY: AdapterSet(AdapterSetConfig(layers, 2.0), {"theta": t})}):
            return base.model(**{k: v[part] for k, v in x.items()})

    together = run(theta, slice(None))
    for i in range(3):
        torch.testing.assert_close(together[2 * i : 2 * i + 2], run(theta[i : i + 1], slice(2 * i, 2 * i + 2)))
    with pytest.raises(PatchError, match="numbers"):
        run(theta[:, :-1], slice(None))


def test_a_module_that_is_not_there_is_named(base):
    with pytest.raises(PatchError, match="to_z"):
        linear_layers(base.model, ("to_z",))
    layers = linear_layers(base.model, ("to_v",))
    assert subspace.start(layers, 3).equal(subspace.start(layers, 3))
    assert not subspace.start(layers, 3).equal(subspace.start(layers, 4))
