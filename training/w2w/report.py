"""The full measurement of a sealed space on people it never saw: `patchbay eval REF --full`.

Attributes from weights, edits, inversion of one picture, samples, guidance, entanglement against N, starts of their own
and pictures in another style; each beside its baselines and its control. Nothing here is chosen on these people.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator, Tensor

from patches.families.diffusion.identity import alone, invert
from patches.mechanisms.subspace import SubspaceEdit, start
from registry.errors import ConfigError
from registry.measure import Measure
from training.evidence import Draft, Opened, open_patch
from training.lab import faces
from training.lab.faces import BINARY
from training.w2w import baselines, combined, directions, measure, population, subspace
from training.w2w.config import Config
from training.w2w.draw import read
from training.w2w.fit import HELD, Source, trained
from training.w2w.measure import Lab, identity, over_people
from training.w2w.sprites import agreement, sprites

ASKED = torch.tensor([[1, 1 + i % 3, 1 + (2 * i) % 5, 0, 0, 0, 0, 0] for i in range(4)])
"""prompts (4, 8) that inverted people are drawn under: mouths and backgrounds that their picture did not show"""


AFAR = 2e-3
"""prior of pictures that are not of the base's world"""
LATE = (1000, 900, 800, 700, 500)
"""levels from which an edit is injected"""


def open_lab(folder: Path, config: Config, split: str = "held") -> tuple[Opened, Lab]:
    """The measured people of a sealed space. Raises ConfigError if it holds none."""
    opened = open_patch(folder, config.base, config.device)
    if not (folder / HELD).is_file():
        raise ConfigError(f"{folder} holds no people that the space was not fitted to; fit with val and held people.")
    assert isinstance(opened.patch, SubspaceEdit)
    held = load_file(folder / HELD)
    return opened, Lab.open(config, opened.base, opened.patch, (held["theta"], held["labels"]), split)


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Every table by its name. Parts are kept on disk as they come; words of the command line may shorten them."""
    opened, lab = open_lab(folder, config)
    made = trained(config, lab.base)
    draft = Draft(opened.about)
    draft.keep("fit", value=dict(opened.fitted))
    tables: dict[str, Callable[[], Any]] = {
        "attributes": lambda: attributes(lab, made),
        "edits": lambda: edit_table(lab),
        "inversion": lambda: inversion(lab, made),
        "identity": lambda: identities(lab),
        "samples": lambda: samples(lab),
        "entanglement": lambda: entanglement(made, lab.space.components),
        "guidance": lambda: guidance(lab),
        "own_starts": lambda: own_starts(lab, made),
        "other_style": lambda: other_style(lab),
        "sprites": lambda: inverted_sprites(lab, made),
        "delayed": lambda: combined.delayed(lab, max(config.strengths), LATE),
        "composed": lambda: combined.composed(lab, config.strength),
    }
    for name, table in tables.items():
        begun = time.process_time()
        draft.keep(name, value=table())
        draft.keep("cpu_seconds", name, value=round(time.process_time() - begun, 1))
    return draft


def attributes(lab: Lab, made: Source) -> dict[str, Any]:
    """A linear probe on coefficients of held-out adapters, beside one on shuffled labels."""
    z = lab.space.tensors["members"].float()
    held = lab.space.encode(lab.theta)
    labels = made.labels[: len(z)]
    binary = [i for i, a in enumerate(made.attributes) if a in BINARY]
    auc, each = directions.probe_auc(z, labels, held, lab.labels, binary)
    said = directions.probe(z, labels, held, lab.labels)
    r2 = {
        a: directions.explained(said[:, i], lab.labels[:, i]) for i, a in enumerate(made.attributes) if i not in binary
    }
    return {
        "auc": auc, "each": {made.attributes[i]: v for i, v in each.items()}, "r2": r2,
        "shuffled": directions.shuffled_auc(z, labels, held, lab.labels, binary),
        "mean |cos| between directions": directions.mutual_cosine(lab.space.tensors["directions"].float()),
    }  # fmt: skip


def identities(lab: Lab) -> dict[str, Any]:
    """Whether pictures show their person: real ones, of adapters, of the adapters' coefficients alone, the base's."""
    per, own = lab.config.pictures, lab.people()
    pipe = lab.base.model
    real = pipe.pictures(own.shots.latents[:, :per].flatten(0, 1)).cpu()
    z = lab.space.encode(lab.theta)
    show = {
        "real pictures through the latent": real,
        "their adapters": lab.draw(lab.theta, per, 3),
        "coefficients alone": lab.draw(lab.space.decode(z), per, 3),
        "base": lab.draw(None, per, 3).repeat(len(lab.labels), 1, 1, 1),
    }
    return {k: identity(read(lab.judge, x, per), lab.labels) for k, x in show.items()}


def edit_table(lab: Lab) -> dict[str, Any]:
    """Ways of reversing an attribute of held-out people: this space, random directions, sliders, prompts."""
    c = lab.config
    space = measure.edits(lab, c.strengths, each=True)
    before = space.pop(0.0)
    train = Lab(c, lab.base, lab.space, lab.judge, lab.theta, lab.labels, range(min(120, c.people)))
    latents = train.people().shots.latents.flatten(0, 1)
    sliders = baselines.sliders(lab, latents, c.slider_steps)
    return {
        "before": before, "space, by gaps": space, "slider, by weight": baselines.slid(lab, sliders, (1.0, 2.0, 4.0)),
        "prompt": measure.prompted(lab, lab.theta), "prompt on the base": measure.prompted(lab, None),
    }  # fmt: skip


def fitted(lab: Lab, latents: Tensor, contexts: Callable[[int, Generator], dict[str, Tensor]], **how: Any) -> Tensor:
    """(n, m) coefficients of pictures with latents (n, c, h, w)."""
    forward, on = alone(lab.base.model, lab.space)
    try:
        return invert(
            lab.space, lab.base.model.schedule, forward, latents, contexts, replace(lab.config.inversion, **how)
        )
    finally:
        on.revert()


def inversion(lab: Lab, made: Source) -> dict[str, Any]:
    """One picture of each person -> the person, judged on four other pictures under other prompts."""
    own = lab.people()
    m = own.shots.latents.shape[1]
    first = torch.arange(len(lab.labels)) * m

    def contexts(rows: int, g: Generator) -> dict[str, Tensor]:
        return dict(own.shots.contexts(first.repeat_interleave(rows), g))

    latents = own.shots.latents[:, 0]
    ways: dict[str, Callable[[], Tensor]] = {
        f"ten-picture adapter ({lab.theta.shape[1]} numbers)": lambda: lab.theta,
        f"coefficients ({lab.space.components})": lambda: lab.space.decode(fitted(lab, latents, contexts)),
        "coefficients, begun at the mean": lambda: lab.space.decode(fitted(lab, latents, contexts, warm=False)),
        "ridge guess alone": lambda: lab.space.decode(lab.space.warm(latents)),
        "one-picture adapter": lambda: baselines.one_picture(lab, own.shots),
        "nearest training person": lambda: _nearest(lab, own.shots, made),
        "mean model": lambda: lab.space.decode(torch.zeros(len(lab.labels), lab.space.components)),
    }
    return {name: judged(lab, make()) for name, make in ways.items()}


def _nearest(lab: Lab, shots: population.Shots, made: Source) -> Tensor:
    pool, n = [], lab.config.people
    for at in range(0, n, 60):
        pool.append(lab.people(range(at, min(at + 60, n))).shots.latents[:, :3])
    found = baselines.nearest_person(lab, shots, torch.cat(pool))
    return torch.cat(list(made.blocks()))[found]


def judged(lab: Lab, theta: Tensor) -> dict[str, Measure]:
    """Identity under ASKED prompts, and whether mouth and background are what was asked."""
    image = lab.draw(theta, len(ASKED), 21, ASKED)
    said = identity(read(lab.judge, image, len(ASKED)), lab.labels)
    asked = ASKED.repeat(len(theta), 1)
    with torch.no_grad():
        outs = [lab.judge(part) for part in image.split(256)]
    mouth = torch.cat([o[1].argmax(1) for o in outs]) + 1 == asked[:, 1]
    ground = torch.cat([o[2].argmax(1) for o in outs]) + 1 == asked[:, 2]
    obeyed = (mouth & ground).float().unflatten(0, (len(theta), -1)).mean(1)
    return {**said, "prompt_obeyed": over_people(obeyed)}


def samples(lab: Lab, n: int = 60) -> dict[str, Any]:
    """New people from the space: like the population in rates, different from each other, no copies of members."""
    c, g = lab.config, Generator().manual_seed(8)
    n = min(n, max(4, len(lab.labels)))
    z = lab.space.sample(n, g)
    held = lab.space.encode(lab.theta)
    members = lab.space.tensors["members"].float()
    own = torch.nn.functional.normalize(members, dim=1)
    among = own @ own.T
    among.fill_diagonal_(-1)
    noise = torch.randn(n * c.pictures, *lab.base.model.shape, generator=g)

    def show(theta: Tensor | None) -> dict[str, Any]:
        from training.w2w.draw import draw

        text = lab.base.model.embed(torch.tensor([[1] + [0] * 7]).expand(n * c.pictures, -1))
        image = draw(
            lab.base.model, lab.space.config.layers, lab.space.config.scale, theta, text, noise,
            guidance=c.guidance, steps=c.denoising_steps,
        )  # fmt: skip
        said = read(lab.judge, image, c.pictures)
        within, between = said.var(1).mean(0), said.mean(1).var(0)
        between = (between - within / c.pictures).clamp(min=0)
        sure = ((said[..., : len(BINARY)] - 0.5).abs() > 0.3).float().mean((1, 2))
        return {
            "variance between people": float((between / (between + within).clamp(min=1e-9)).mean()),
            "attributes read surely": over_people(sure),
            "rates": {k: round(float((said[..., i] > 0.5).float().mean()), 3) for i, k in enumerate(BINARY)},
        }

    train = lab.people(range(min(200, c.people)))
    return {
        "nearest member, cosine": {
            "samples": float(lab.space.nearest(z)[0].mean()),
            "largest of the samples": float(lab.space.nearest(z)[0].max()),
            "held-out people": float(lab.space.nearest(held)[0].mean()),
            "members to another": float(among.amax(1).mean()),
        },
        "samples": show(lab.space.decode(z)), "held-out adapters": show(lab.theta[:n]), "base": show(None),
        "population rates": {k: round(float(train.labels[:, i].mean()), 3) for i, k in enumerate(BINARY)},
    }  # fmt: skip


def guidance(lab: Lab) -> dict[str, Any]:
    """The null half of guidance: the unpatched base, or through the adapter too as in the paper."""
    out = {}
    for both, weights in ((False, (1.0, 1.5, 2.0, 3.0)), (True, (1.5, 2.0, 3.0))):
        for w in weights:
            image = lab.draw(lab.theta, 3, 3, guidance=w, both=both)
            name = f"{w:g}, null {'with the adapter' if both else 'is the base'}"
            out[name] = identity(read(lab.judge, image, 3), lab.labels)
    return out


def entanglement(made: Source, m: int) -> dict[str, Any]:
    """Mean |cos| between attribute directions, in weights, against the number of models; four draws each."""
    theta = torch.cat(list(made.blocks()))
    out: dict[str, Any] = {}
    n = len(theta)
    for count in sorted({x for x in (25, 50, 100, 200, 400, n) if x <= n}):
        cosines = []
        for seed in range(1 if count == n else 4):
            k = torch.randperm(n, generator=Generator().manual_seed(seed))[:count]
            part = theta[k]
            found = subspace.fit(partial(iter, [part]), min(m, 32, count - 1))
            try:
                d, _, _ = directions.directions(found.encode(part), made.labels[k], found.std, "mean")
            except ConfigError:  # an attribute that these few all share
                continue
            cosines.append(directions.mutual_cosine((d * found.std) @ found.basis.T))
        if cosines:
            out[str(count)] = {"mean |cos|": sum(cosines) / len(cosines), "draws": len(cosines)}
    return out


def own_starts(lab: Lab, made: Source) -> dict[str, Any]:
    """The control of the common start: people's adapters from starts of their own, probed raw and as updates B A."""
    c, layers = lab.config, made.layers
    n = min(c.own_starts, len(made.labels))
    own = torch.stack([start(layers, 1000 + i) for i in range(n)])
    parts = []
    for at in range(0, n, c.shard):
        which = range(at, min(at + c.shard, n))
        shots = lab.people(which).shots
        parts.append(
            population.train(lab.base.model, layers, shots, steps=c.steps, rows=c.rows, lr=c.lr, seed=c.seed + at,
                             scale=c.scale, theta0=own[at : which.stop])
        )  # fmt: skip
    common = torch.cat(list(made.blocks()))[:n]
    binary, cut = [i for i, a in enumerate(made.attributes) if a in BINARY], (3 * n) // 4
    out: dict[str, Any] = {"fitted on": cut, "tested on": n - cut}
    for name, theta in (("common start", common), ("own starts", torch.cat(parts))):
        for form in ("raw", "update"):
            x = theta if form == "raw" else population.updates(layers, theta, c.scale)[1]
            found = subspace.fit(partial(iter, [x[:cut]]), min(32, cut - 1))
            auc, _ = directions.probe_auc(
                found.encode(x[:cut]), made.labels[:cut], found.encode(x[cut:]), made.labels[cut:n], binary, draws=200
            )
            out[f"{name}, {form}"] = auc
    return out


def other_style(lab: Lab) -> dict[str, Any]:
    """Out of distribution: people drawn in grey with outlines, inverted to a person of this base's world."""
    few, z = _from_afar(lab, faces.sketch(lab.people().image[:, 0]))
    mean = torch.zeros(len(z), lab.space.components)
    return {
        f"first {few.components} coefficients, prior {AFAR:g}": judged(lab, few.decode(z)),
        "mean model": judged(lab, lab.space.decode(mean)),
        "mean |z| / sqrt(m)": float(z.norm(dim=1).mean() / few.components**0.5),
    }


def _from_afar(lab: Lab, image: Tensor) -> tuple[SubspaceEdit, Tensor]:
    """The space cut to a quarter of its components, and coefficients in it of pictures (n, 3, H, W) of another
    style."""
    latents = lab.base.model.latents(image).cpu()
    plainly = lab.base.model.embed(torch.tensor([[1] + [0] * 7])).cpu()

    def contexts(rows: int, g: Generator) -> dict[str, Tensor]:
        return {"text": plainly.expand(rows * len(latents), -1, -1)}

    few = replace(lab.space, tensors=_fewer(lab.space.tensors, max(2, lab.space.components // 4)))
    return few, fitted(replace(lab, space=few), latents, contexts, warm=False, prior=AFAR)


def inverted_sprites(lab: Lab, made: Source) -> dict[str, Any]:
    """Out of distribution: emoji of people inverted to a person of this base's world, against what their names say."""
    given = sprites()
    few, z = _from_afar(lab, given.image)
    per = lab.config.pictures

    def said(theta: Tensor) -> Tensor:
        return read(lab.judge, lab.draw(theta, per, 21), per).mean(1)

    own = said(few.decode(z))
    latents = lab.base.model.latents(given.image).cpu()
    pool = lab.people(range(min(300, lab.config.people))).shots.latents[:, 0].flatten(1)
    near = torch.cat(list(made.blocks()))[torch.cdist(latents.flatten(1), pool).argmin(1)]
    shuffle = torch.randperm(len(own), generator=Generator().manual_seed(3))
    return {
        f"first {few.components} coefficients, prior {AFAR:g}": agreement(own, given.told),
        "control: another sprite's coefficients": agreement(own[shuffle], given.told),
        "nearest training person": agreement(said(near), given.told),
        "the judge on the sprite itself": agreement(lab.judge.read(given.image), given.told),
        "mean |z| / sqrt(m)": float(z.norm(dim=1).mean() / few.components**0.5),
    }


def _fewer(tensors: Any, m: int) -> dict[str, Tensor]:
    cut = {"basis": lambda t: t[:, :m], "std": lambda t: t[:m], "z": lambda t: t[:m], "members": lambda t: t[:, :m],
           "warm": lambda t: t[:, :m], "directions": lambda t: F.normalize(t[:, :m].float(), dim=1)}  # fmt: skip
    return {k: cut[k](t) if k in cut else t for k, t in tensors.items()}
