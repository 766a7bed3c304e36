"""Fit a weight space: the population, its components, directions chosen on val, and what is sealed with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from patches import artifact
from patches.evidence import write_evidence
from patches.families.base import Base, load_base
from patches.mechanisms.subspace import Layer, SubspaceConfig, SubspaceEdit, linear_layers
from registry import manifest
from registry.errors import ConfigError, Tampered, Unsealed
from registry.home import home
from registry.manifest import Manifest
from training.choose import Offer, best
from training.lab import faces
from training.w2w import directions, measure, people, population, subspace
from training.w2w.config import Config
from training.w2w.figures import save, strip
from training.w2w.population import Population

HELD = "held.safetensors"
"""theta and labels of held people: on whom nothing was chosen"""
MEMBERS = 4096
"""members whose coefficients are sealed with the space, to begin at and to compare with"""
SHARES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""numbers of components whose share of the variance is told"""
EXACT = 50_000
"""numbers of a basis up to which it is sealed in float32"""
CACHED = 20_000
"""numbers of a picture's latent up to which a warm start is fitted"""


@dataclass(frozen=True)
class Source:
    """A population that a space can be fitted to."""

    layers: tuple[Layer, ...]
    scale: float
    attributes: tuple[str, ...]
    blocks: subspace.Blocks
    labels: Tensor
    """(N, k)"""
    digest: str
    """Digest of the sealed population; empty: it was read from elsewhere"""
    held: tuple[Tensor, Tensor] | None
    """theta and labels of val and held people"""


# ---- the population ------------------------------------------------------------------------------------------------


def adapted(config: Config, base: Base) -> tuple[Layer, ...]:
    """The layers of the denoiser whose weights a population changes."""
    return linear_layers(base.model, config.layers, config.rank, under="denoiser")


def trained(config: Config, base: Base) -> Source:
    """The population of a config, trained or taken up where an earlier run stopped; sealed under home()/populations."""
    total = people.count(config)
    if config.data:
        config = replace(config, people=total - config.val - config.held)
    if config.people < 3:
        raise ConfigError(f"A population of {config.people} has no directions; make one of three people or more.")
    layers, names = adapted(config, base), people.attributes(config)
    told = {
        k: getattr(config, k)
        for k in (
            "seed",
            "people",
            "val",
            "held",
            "shots",
            "layers",
            "rank",
            "scale",
            "steps",
            "rows",
            "lr",
            "shard",
            "prompt",
        )
    }
    key = manifest.digest_of({"base": base.digest, "faces": faces.VERSION, "data": Path(config.data).name, **told})
    folder = home() / "populations" / f"w2w-{key[:16]}"
    try:
        about = manifest.read(folder)
        found = Population.open(folder)
    except (Unsealed, Tampered):
        found = population.create(folder, layers, config.scale, names)
        (folder / manifest.NAME).unlink(missing_ok=True)
        population.fill(found, total, config.shard, lambda which: _adapters(config, base, layers, which))
        about = manifest.write(folder, kind="finding", system="w2w", base=base.label, config={"key": key})
    n = config.people
    theta, labels = found.theta(), found.labels()
    return Source(
        layers, config.scale, names, lambda: iter(theta[:n].split(1024)), labels[:n], about.digest,
        (theta[n:], labels[n:]),
    )  # fmt: skip


def _adapters(config: Config, base: Base, layers: tuple[Layer, ...], which: range) -> tuple[Tensor, Tensor]:
    own = people.people(config, base.model, which)
    theta = population.train(
        base.model, layers, own.shots, steps=config.steps, rows=config.rows, lr=config.lr,
        seed=config.seed + which.start, scale=config.scale,
    )  # fmt: skip
    return theta, own.labels


def source(config: Config, base: Base) -> Source:
    """The population a config names."""
    kind, _, place = config.population.partition(":")
    if not kind:
        return trained(config, base)
    if kind != "adapters":
        raise ConfigError(
            f"population={config.population[:60]!r}: write adapters:<folder>, published:<folder> or nothing."
        )
    names, adapters = population.read_folder(Path(place))
    layers, theta = population.gather(adapters, config.form, config.rank)
    sited = tuple(replace(x, site=_site(base, x.site)) for x in layers)
    attributes, labels = people.labels_of(Path(place), names)
    n = max(3, len(theta) - config.val - config.held)
    return Source(
        sited, 1.0, attributes, lambda: iter(theta[:n].split(1024)), labels[:n], "",
        (theta[n:], labels[n:]) if n < len(theta) else None,
    )  # fmt: skip


def _site(base: Base, site: str) -> str:
    """A module path of an adapter as the base calls it. Raises ConfigError if the base has no such module."""
    there = dict(base.model.named_modules())
    for path in (f"denoiser.{site}", site):
        if path in there:
            return path
    raise ConfigError(f"{base.ref} has no module {site[:80]!r}; these adapters belong to another base.")


# ---- the space -----------------------------------------------------------------------------------------------------


def space(
    components: subspace.Components, made: Source, z: Tensor, method: str, form: str = "raw", warm: Tensor | None = None
) -> SubspaceEdit:
    """The patch of fitted components and directions; its own point is the mean."""
    apart = [directions.classes(column) for column in made.labels.T]
    usable = [i for i, (yes, no) in enumerate(apart) if min(int(yes.sum()), int(no.sum())) >= 2]
    names = [made.attributes[i] for i in usable]
    radius = z.norm(dim=1) / z.shape[1] ** 0.5
    basis = components.basis if components.basis.numel() <= EXACT else components.basis.half()
    tensors = {
        "mean": components.mean, "sd": components.sd, "basis": basis.contiguous(), "std": components.std,
        "z": torch.zeros(z.shape[1]), "radius": torch.stack([radius.min(), radius.max()]),
        "members": z[:MEMBERS].half(),
    }  # fmt: skip
    if names:
        d, gap, reach = directions.directions(z, made.labels[:, usable], components.std, method, names)
        tensors |= {"directions": d, "gap": gap, "reach": reach}
    if warm is not None:
        tensors["warm"] = warm.half()
    return SubspaceEdit(SubspaceConfig(made.layers, made.scale, tuple(names), form), tensors)


def components_of(made: Source, m: int) -> tuple[subspace.Components, Tensor]:
    """The first m components of a population, and its members' coefficients (N, m)."""
    found = subspace.fit(made.blocks, min(m, len(made.labels) - 1))
    return found, torch.cat([found.encode(block) for block in made.blocks()])


def shortened(found: subspace.Components, m: int) -> subspace.Components:
    return replace(found, basis=found.basis[:, :m], std=found.std[:m], share=found.share[:m])


def fit(config: Config, folder: Path) -> Manifest:
    """Population, components, directions; sealed as a patch whose parent is the population."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "diffusion", config.device)
    if config.population.startswith("published:"):
        return _published(config, base, folder)
    made = source(config, base)
    chosen, trace = _choose(config, base, made)
    write_evidence(folder, trace)
    if made.held is not None:
        theta, labels = (x[config.val :] for x in made.held)
        save_file({"theta": theta.half().contiguous(), "labels": labels.contiguous()}, folder / HELD)
        if not config.data and not config.population and len(theta):
            save(folder, strip(measure.Lab.open(config, base, chosen, (theta, labels), "held")))
    return artifact.save(chosen, "w2w", folder, base=base.label, parents=[made.digest] if made.digest else [])


def _choose(config: Config, base: Base, made: Source) -> tuple[SubspaceEdit, dict[str, Any]]:
    """Number of components and kind of direction: on val, flips of the asked attribute less those of a random direction
    of equal norm, less what others flip beyond theirs. Without people to judge on: the first of each."""
    most, z = components_of(made, max(config.components))
    warm = _warm(config, base, made, z)
    judged = made.held is not None and config.val > 0 and not config.data and not config.population
    offers: list[Offer[SubspaceEdit]] = []
    for m in sorted({min(m, z.shape[1]) for m in config.components}):
        for method in config.directions:
            short = None if warm is None else warm[:, :m]
            patch = space(shortened(most, m), made, z[:, :m], method, config.form, short)
            row: dict[str, Any] = {"components": m, "direction": method, "worth": 0.0}
            if judged:
                assert made.held is not None
                val = (made.held[0][: config.val], made.held[1][: config.val])
                lab = measure.Lab.open(config, base, patch, val, "val")
                row |= _judged(made, z[:, :m], lab)
            offers.append(Offer(patch, row, size=m))
    chosen = best(offers, within=0.02) if judged else offers[-1]
    trace = {
        "models": len(z), "numbers": len(most.mean), "chosen": chosen.row, "offers": [o.row for o in offers],
        "share": {str(k): round(float(most.share[k - 1]), 4) for k in SHARES if k <= len(most.share)},
        "warm": warm is not None, "attributes": list(chosen.what.config.attributes),
    }  # fmt: skip
    return chosen.what, trace


def _judged(made: Source, z: Tensor, lab: measure.Lab) -> dict[str, float]:
    """What a candidate does on val."""
    strength = lab.config.strength
    got = measure.edits(lab, [strength], pictures=1)[strength]
    keys = ("flip", "random_flip", "other_flip", "random_other_flip")
    flip, random, other, random_other = (float(got[k].value) for k in keys)
    binary = [i for i, a in enumerate(made.attributes) if a in faces.BINARY]
    auc, _ = directions.probe_auc(z, made.labels, lab.space.encode(lab.theta), lab.labels, binary, draws=2)
    out = {"flip": flip, "random_flip": random, "other_flip": other, "random_other_flip": random_other}
    out |= {"auc": float(auc.value), "worth": flip - random - max(0.0, other - random_other)}
    return {k: round(v, 4) for k, v in out.items()}


def _warm(config: Config, base: Base, made: Source, z: Tensor) -> Tensor | None:
    """Ridge regression from a picture's latent to coefficients, on three pictures of each member."""
    size = torch.Size(base.model.shape).numel()
    if config.population or size > CACHED or len(z) < 8:
        return None
    x = []
    for at in range(0, len(z), 60):
        own = people.people(config, base.model, range(at, min(at + 60, len(z))))
        x.append(own.shots.latents[:, :3])
    latents = torch.cat(x).flatten(2)
    return directions.warm_start(latents.flatten(0, 1), z.repeat_interleave(latents.shape[1], 0))


def _published(config: Config, base: Base, folder: Path) -> Manifest:
    """The authors' released space as a patch, from tensors alone."""
    place = Path(config.population.partition(":")[2])
    told = population.read_published(place)
    m = min(max(config.components), told["basis"].shape[1], told["coefficients"].shape[1])
    beta = told["coefficients"][:, :m]
    std = beta.std(0)
    found = subspace.Components(told["mean"], told["sd"], told["basis"][:, :m], std, torch.zeros(m), len(beta))
    names, labels = (
        people.labels_of(place, [str(i) for i in range(len(beta))])
        if (place / "labels.json").is_file()
        else ((), torch.zeros(len(beta), 0))
    )
    layers = tuple(replace(x, site=_site(base, x.site)) for x in told["layers"])
    made = Source(layers, config.scale, names, lambda: iter(()), labels, "", None)
    patch = space(found, made, beta / std, config.directions[0], "raw")
    chosen = {"components": m, "direction": config.directions[0]}
    write_evidence(
        folder, {"models": len(beta), "numbers": len(found.mean), "chosen": chosen, "attributes": list(names)}
    )
    return artifact.save(patch, "w2w", folder, base=base.label)
