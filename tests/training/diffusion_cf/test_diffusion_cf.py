"""Counterfactuals: splits share no drawing, directions leave their picture out, measures say what they say, the
smallest change is found."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Pillow

from patches import artifact
from patches.engine.patch import ONLY, apply
from patches.families import diffusion
from patches.families.diffusion import Denoiser, Denoising, Edit
from patches.mechanisms.direction import STILL, DirectionEdit
from patches.subject import Subject
from registry.errors import ConfigError, NotFound
from training import run
from training.diffusion_cf import RECIPES, domains, equal, find, judges, report
from training.diffusion_cf.domains import Pictures
from training.diffusion_cf.edit import Editor, smallest
from training.diffusion_cf.fit import _Bare as Bare
from training.diffusion_cf.measure import through
from training.lab import atlas, judge

fitting = sys.modules["training.diffusion_cf.fit"]  # the package's own `fit` is the function
reporting = sys.modules["training.diffusion_cf.report"]


def test_splits_share_no_drawing_and_every_class_is_there():
    seen = {s: domains.lab(s, 9) for s in ("train", "val", "test")}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(seen[a].sprite.tolist()) & set(seen[b].sprite.tolist())
    for split, pictures in seen.items():
        assert len(pictures) == 9 * 12, split
        assert pictures.x.shape[1:] == (3, 64, 64)
        assert 0 <= float(pictures.x.min()) <= float(pictures.x.max()) <= 1
        assert pictures.classes[int(pictures.partner()[0])] == "lizard"
    again = domains.lab("test", 9)
    assert torch.equal(again.x, seen["test"].x)
    assert not torch.equal(domains.lab("test", 9, seed=1).x, again.x)
    names = atlas.load().names
    assert all(names[int(atlas.load().concept[s])] == again.classes[int(c)]
               for s, c in zip(again.sprite, again.label, strict=True))  # fmt: skip
    with pytest.raises(NotFound, match="Domains of the lab"):
        domains.lab("test", 2, domains=("ghosts",))


def test_a_users_folder_is_read_with_its_split_or_one_of_its_own(tmp_path):
    def fill(place, n, value):
        place.mkdir(parents=True)
        for i in range(n):
            Pillow.fromarray(np.full((20, 30, 3), value + i, np.uint8)).save(place / f"{i}.png")

    for split in ("train", "test"):
        fill(tmp_path / "a" / split / "healthy", 3, 10)
        fill(tmp_path / "a" / split / "ill", 2, 100)
    got = domains.folder(tmp_path / "a", "test", (16, 16))
    assert got.classes == ("healthy", "ill")
    assert got.domains == ("a", "a")
    assert got.label.tolist() == [0, 0, 0, 1, 1]
    assert got.partner().tolist() == [1, 1, 1, 0, 0]
    fill(tmp_path / "b" / "x", 40, 0)
    fill(tmp_path / "b" / "y", 40, 60)
    parts = [domains.folder(tmp_path / "b", s, (16, 16)) for s in ("train", "val", "test")]
    assert sum(map(len, parts)) == 80
    assert len(parts[0]) > len(parts[1]) + len(parts[2])
    with pytest.raises(ConfigError, match="two"):
        domains.folder(tmp_path / "b" / "x", "train", (16, 16))
    with pytest.raises(NotFound, match="no folder"):
        domains.folder(tmp_path / "c", "train", (16, 16))


def known():
    g = torch.Generator().manual_seed(0)
    label = torch.arange(4).repeat_interleave(6)
    e = F.normalize(F.one_hot(label, 8) + 0.3 * torch.randn(24, 8, generator=g), dim=1)
    return find.Bank(e, label, torch.arange(24) // 2, ("a", "b", "c", "d"), ("p", "p", "q", "q"))


def test_a_direction_leaves_the_edited_drawing_out_of_its_class():
    b = known()
    source, target = torch.tensor([0, 0]), torch.tensor([1, 1])
    plain = b.directions(source, target)
    torch.testing.assert_close(plain[0], b.means()[1] - b.means()[0])
    without = b.directions(source, target, without=torch.tensor([0, 99]))
    torch.testing.assert_close(without[0], b.means()[1] - b.e[2:6].mean(0))
    torch.testing.assert_close(without[1], plain[1])
    near = b.directions(source, target, k=1, near=b.e[:2])
    torch.testing.assert_close(near[0], b.e[6:12][(b.e[6:12] @ b.e[0]).argmax()] - b.e[0])


def test_controls_have_equal_norm_and_another_end():
    b = known()
    source, target = b.label, torch.tensor([1, 0, 3, 2])[b.label]
    d = b.directions(source, target)
    for other in (find.elsewhere(b, source, target, d, 0), find.isotropic(d, 0)):
        torch.testing.assert_close(other.norm(dim=1), d.norm(dim=1))
        assert float(F.cosine_similarity(other, d).abs().mean()) < 0.9
    few = b.few(2, 0)
    assert few.label.bincount().tolist() == [2, 2, 2, 2]
    assert all(len(set(few.sprite[few.label == c].tolist())) == 2 for c in range(4))
    normal = find.shrunk(b, 0, 1)
    assert float((b.e[b.label == 1] @ normal).mean()) > float((b.e[b.label == 0] @ normal).mean())


def test_a_step_is_what_a_picture_needs_and_a_direction_what_decides():
    """Planted: classes differ along the first axis and vary along the second, which few examples mix into the means."""
    g = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 1]).repeat_interleave(12)
    e = 0.05 * torch.randn(24, 8, generator=g)
    e[:, 7] += 2.0
    e[:, 0] += torch.where(label == 1, 0.5, -0.5)
    e[:, 1] += 0.4 * torch.randn(24, generator=g)
    b = find.Bank(F.normalize(e, dim=1), label, torch.arange(24), ("a", "b"), ("p", "p"))
    source, target = torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1])
    d = b.directions(source, target)
    pure = find.decided(b, d, source, target)
    assert bool((d[:, 1].abs() > 0.02).all())
    assert float(pure[:, 1].abs().max()) < 0.3 * float(d[:, 1].abs().min())
    assert float((pure[:, 0] / d[:, 0]).min()) > 0.9
    means = b.means()
    middle = (means[0] + means[1]) / 2
    want = find.needed(b, torch.stack([means[0], means[1], middle]), source, target)
    torch.testing.assert_close(want, torch.tensor([1.0, 1.0, 0.5]), atol=0.05, rtol=0)
    further = find.needed(b, torch.stack([means[0] - means[1]] * 3), source, target)
    assert float(further.max()) <= 2.0


def test_the_smallest_flipping_amount_is_found_to_the_bisections_width():
    limits = torch.tensor([0.1, 0.7, 1.9, 5.0])

    def make(at, amounts):
        return amounts[:, None, None, None] * torch.ones(1, 3, 2, 2)

    amounts, made = smallest(make, lambda at, x: x[:, 0, 0, 0] > limits[at], 4, 2.0, rounds=6)
    assert torch.isnan(amounts[3])
    assert bool(((amounts[:3] - limits[:3]) > 0).all())
    assert bool(((amounts[:3] - limits[:3]) <= 2.0 / 2**6).all())
    torch.testing.assert_close(made[:3, 0, 0, 0], amounts[:3])


class Fixed:
    """A judge that reads the first pixel."""

    name, names = "cnn", ("a", "b", "c")

    def scores(self, x):
        return F.one_hot((x[:, 0, 0, 0] * 10).round().long(), 3).float()

    def column(self, name):
        return self.names.index(name)


def test_measures_count_flips_misses_and_change():
    x = torch.zeros(4, 3, 64, 64)
    source = Pictures(x, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2]), ("a", "b"), ("p", "p"))
    made = x.clone()
    made[:, 0, 0, 0] = torch.tensor([0.1, 0.0, 0.0, 0.2])
    got = judges.judged([Fixed()], source, source.partner(), made)
    assert got.values["flip_cnn"].tolist() == [1, 0, 1, 0]
    assert got.values["neither_cnn"].tolist() == [0, 0, 0, 1]
    value, low, high, n = got.summary()["flip_both"]
    assert (value, n) == (0.5, 4)
    assert low < 0.5 < high
    assert float(got.values["l1"][1]) == 0
    assert got.by_domain("flip_both")["p"][0] == 0.5


def test_the_judge_that_ships_knows_real_drawings_it_was_not_trained_with():
    """Held-out drawings of the domains' classes: chance of 1,198 names is .0008."""
    test = domains.lab("test", 3)
    names = atlas.load().names
    got = judge.logits(judge.load(), test.x).argmax(1)
    right = [names[int(i)] == test.classes[int(c)] for i, c in zip(got, test.label, strict=True)]
    assert np.mean(right) > 0.8
    d = judge.distance(judge.load(), test.x[:4], test.x[:4])
    assert float(d.abs().max()) < 1e-6
    assert float(judge.distance(judge.load(), test.x[:4], test.x[20:24]).min()) > 0.1


def test_the_tiny_recipe_reports_everything(home):
    folder = run.fit("diffusion_cf/tiny")
    evidence = json.loads((folder / "evidence.json").read_text())
    assert evidence["classes"] == ["leopard", "tiger", "lemon", "tangerine"]
    rows = []
    got = report(folder, RECIPES["tiny"], lambda name, value: rows.append(name))
    assert {"main", "amounts", "directions", "baselines", "examples a class", "inversions", "held style"} <= got.keys()
    assert {"direction", *(n for n in got["main"] if n.startswith("control"))} <= got["held style"].keys()
    assert got.pop("strips").axes
    assert len(rows) == sum(len(t) for t in got.values())
    exact = got["inversions"]
    assert exact["EDICT"]["reconstruction"].value < 1e-3 < exact["DDIM"]["reconstruction"].value


def curve(flips, changes):
    """Four drawings, two pictures each, all of them alike."""
    flip = torch.tensor(flips)[:, None] > (torch.arange(8) // 2)[None] / 4
    return equal.Curve(flip.float(), torch.tensor(changes)[:, None].expand(-1, 8), torch.arange(8) // 2)


def test_change_is_compared_at_equal_flips_on_straight_lines():
    ours, twice = curve([0.0, 0.5, 1.0], [0.0, 0.04, 0.1]), curve([0.0, 0.5, 1.0], [0.0, 0.08, 0.2])
    weights = torch.ones(8)
    assert ours.at(0.5, weights) == pytest.approx(0.04)
    assert ours.at(0.75, weights) == pytest.approx(0.07)
    got = equal.at_flip(twice, ours, 0.75)
    assert got["l1"][0] == pytest.approx(0.14)
    assert got["more"][0] == pytest.approx(2.0)
    assert got["l1"][1] <= 0.14 <= got["l1"][2]
    assert got["l1"][3] == 8
    never = curve([0.0, 0.25, 0.5], [0.0, 0.01, 0.02])
    assert equal.at_flip(never, ours, 0.75) == {"highest flip": [0.5]}


def test_the_amount_is_the_first_that_reaches_or_the_one_furthest_from_its_control():
    rows = [{"amount": a, "nearer": n, "control": c} for a, n, c in ((0.5, 0.5, 0.1), (1.0, 0.9, 0.3), (1.5, 1.0, 0.6))]
    assert fitting.chosen(replace(RECIPES["lab"], rule="reach", goal=0.9), rows)["amount"] == 1.0
    assert fitting.chosen(replace(RECIPES["lab"], rule="reach", goal=2.0), rows)["amount"] == 1.5
    assert fitting.chosen(replace(RECIPES["lab"], rule="apart"), rows)["amount"] == 1.0
    rows[0]["control"] = -0.1  # as far apart as the next, and the smaller change
    assert fitting.chosen(replace(RECIPES["lab"], rule="apart"), rows)["amount"] == 0.5


def test_tuning_writes_an_adapter_and_folds_it(home, tmp_path):
    from training.diffusion_cf.config import Tune
    from training.diffusion_cf.tuning import tune

    base = diffusion.tiny(0)
    before = {k: v.clone() for k, v in base.model.denoiser.state_dict().items()}
    train = domains.lab("train", 2, domains=("cats",))
    train = Pictures(judges.sized(train.x, 16), train.label, train.sprite, train.classes, train.domains)
    adapter = tune(Tune(steps=3, batch=2, rate=1e-2), base, train, tmp_path, 0)
    again = diffusion.read_adapter(tmp_path / "adapter", base.model.denoiser)
    assert again.factors.keys() == adapter.factors.keys()
    changed = {k for k, v in base.model.denoiser.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{k}.weight" for k in adapter.factors}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny artifact whose denoiser was tuned."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("home")))
        return run.fit("diffusion_cf/tiny", ["tune.steps=2", "tune.rate=0.01"])


def folded(folder):
    """The tiny base with the artifact's adapter in its weights."""
    base = diffusion.tiny(0)
    diffusion.read_adapter(folder / "adapter", base.model.denoiser).fold(base.model.denoiser)
    return base


def test_a_tuned_domain_is_served_with_its_adapter(tuned):
    _, patch = artifact.load(tuned)
    base = diffusion.tiny(0)
    told = {**base.model.null(), "image": torch.ones(24) / 24**0.5}
    with apply(base.model, {ONLY: patch}, root=base.root) as on:
        rows = [Denoising(condition=told, steps=2, arm=ONLY, params={"class": torch.tensor([1.0, 0, 1, 0])})]
        rows.append(Denoising(condition=told, steps=2))
        Denoiser(type("S", (), {"base": base, "applied": on})()).run(rows)
        assert on.unreached() == []
    assert not torch.allclose(rows[0].out, rows[1].out, atol=1e-5)


def test_a_tuned_arm_inverts_guides_and_moves_on_its_own_denoiser(tuned):
    """Every half of every query is the folded model's: what fit chose the amount on, and the move alone is added."""
    _, patch = artifact.load(tuned)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def edit(base, arm, params, method, arms):
        told, start = base.model.image(x)[0], base.model.latents(x)[0]
        program = Edit(method, diffusion.levels(base.model, 3), 2)
        row = Denoising(condition=told, guidance=2.0, start=start, program=program, arm=arm, params=params)
        other = Denoising(condition=told, steps=2, seed=1)  # in the same batch, and not tuned
        with apply(base.model, arms, root=base.root) as on:
            Denoiser(Bare(base, on)).run([row, other])
        return row.out, other.out

    moved = {"class": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    bare = DirectionEdit(patch.config, {"means": patch.tensors["means"]})
    for method in ("fixed_point", "edit_friendly"):
        for params in (STILL, moved):
            ours, beside = edit(diffusion.tiny(0), ONLY, params, method, {ONLY: patch})
            want, _ = edit(folded(tuned), ONLY, params, method, {ONLY: bare})
            torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-3)
            plain, alone = edit(diffusion.tiny(0), ONLY, params, method, {ONLY: bare})
            assert not torch.allclose(ours, plain, atol=1e-3)
            torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-4)


def test_a_tuned_artifact_is_reported_as_it_is_served(tuned):
    """`eval --full` drew with the base's denoiser."""
    c = RECIPES["tiny"]
    with Subject.load(tuned, c.base, "cpu") as subject:
        bench = reporting.Bench(subject, c)
        made = bench.along(bench.directions)
        served = through(subject, replace(c, test_images=1), bench.test, ONLY)
        base = Editor(subject)
        states = base.invert(bench.test.x, bench.conditions, bench.how, c.seed)
        plain = base.along(states, bench.conditions, bench.directions, bench.amount, bench.how)
    torch.testing.assert_close(made, served, atol=1e-4, rtol=1e-3)
    assert float((plain - made).abs().max()) > 1e-3
