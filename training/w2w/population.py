"""Make or read a population: one low-rank adapter per identity, flattened, in shards that are never all in memory.

Three sources. `train`: adapters of one base from one start, many at a time as batched products on one copy of it.
`read_folder`: a folder of peft or diffusers adapters of any rank. `read_published`: the authors' released space.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from patches.adapters import read_adapter
from patches.engine.patch import ONLY, apply
from patches.families.diffusion.identity import denoising_target, spread
from patches.mechanisms.subspace import AdapterSet, AdapterSetConfig, Layer, size, split, start
from registry.errors import BadArtifact, ConfigError, NotFound
from training.progress import tqdm

Contexts = Callable[[Tensor, Generator], Mapping[str, Tensor]]
"""(indices (n,), generator) -> conditions (n, ...): the prompts of pictures, parts of them left out at random"""


# ---- training many at once -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shots:
    """The pictures of K people, M each."""

    latents: Tensor
    """(K, M, c, h, w)"""
    contexts: Contexts
    """Conditions of the pictures, which are numbered k * M + m"""


def train(
    pipe: Any, layers: Sequence[Layer], shots: Shots, *, steps: int, rows: int, lr: float, seed: int = 0,
    scale: float = 1.0, theta0: Tensor | None = None, log: list[float] | None = None,
) -> Tensor:  # fmt: skip
    """theta (K, d): an adapter for each person, all of them trained at once on one frozen base.

    Each step takes `rows` pictures of every person at timesteps spread over the schedule; the loss is each person's own
    mean, summed, so nobody's gradient depends on who else is in the batch. Adam, lr falling to a tenth.
    theta0: (d,) or (K, d); by default the common start (a space of adapters with starts of their own is not linear).
    """
    k, m = shots.latents.shape[:2]
    g = Generator().manual_seed(seed)
    first = start(layers) if theta0 is None else theta0
    device = next(pipe.parameters()).device
    theta = first.expand(k, -1).clone().to(device).requires_grad_(True)
    adapters = AdapterSet(AdapterSetConfig(tuple(layers), scale), {"theta": theta})
    opt = torch.optim.Adam([theta], lr, betas=(0.9, 0.99))
    own = torch.arange(k)[:, None]
    with apply(pipe, {ONLY: adapters}):
        for i in range(steps):
            opt.param_groups[0]["lr"] = lr * min(1, (i + 1) / 5) * (1 - 0.9 * i / steps)
            pick = torch.randint(0, m, (k, rows), generator=g)
            t = spread(k, rows, g, len(pipe.schedule.alphas))
            x0 = shots.latents[own, pick].flatten(0, 1)
            loss = denoising_loss(pipe, x0, t, shots.contexts((own * m + pick).flatten(), g), g)
            opt.zero_grad()
            loss.view(k, rows).mean(1).sum().backward()
            opt.step()
            if log is not None:
                log.append(loss.mean().item())
    return theta.detach().cpu()


def denoising_loss(pipe: Any, x0: Tensor, t: Tensor, context: Mapping[str, Tensor], g: Generator) -> Tensor:
    """(n,) mean squared error of what the denoiser predicts, at noise drawn here."""
    device = next(pipe.parameters()).device
    x, want = denoising_target(pipe.schedule, x0, t, torch.randn(x0.shape, generator=g))
    out: Tensor = pipe(sample=x.to(device), timestep=t.to(device), **{k: v.to(device) for k, v in context.items()})
    return (out - want.to(device)).square().flatten(1).mean(1)


# ---- shards --------------------------------------------------------------------------------------------------------


INDEX = "population.json"


@dataclass(frozen=True)
class Population:
    """N adapters in files of a folder: shard-00000.safetensors, ..., each theta (n, d) and labels (n, k)."""

    folder: Path
    layers: tuple[Layer, ...]
    scale: float
    form: str
    """`raw`, `canonical` or `update`"""
    attributes: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    def __len__(self) -> int:
        return sum(self._shape(f)[0] for f in self.files)

    @staticmethod
    def _shape(file: Path) -> list[int]:
        with safe_open(file, "pt") as f:
            shape: list[int] = f.get_slice("theta").get_shape()
        return shape

    def blocks(self) -> Iterator[Tensor]:
        """(n, d) float32, one shard at a time."""
        for file in self.files:
            with safe_open(file, "pt") as f:
                yield f.get_tensor("theta").float()

    def theta(self) -> Tensor:
        """(N, d), all of it: for populations that fit."""
        return torch.cat(list(self.blocks()))

    def labels(self) -> Tensor:
        """(N, k)"""
        return torch.cat([load_file(f)["labels"].float() for f in self.files])

    @classmethod
    def open(cls, folder: Path) -> Population:
        """Raises NotFound if no population lies there."""
        try:
            about = json.loads((folder / INDEX).read_text())
        except FileNotFoundError:
            raise NotFound(f"{folder} has no {INDEX}: no population lies there.") from None
        layers = tuple(Layer(x["site"], tuple(x["a"]), tuple(x["b"])) for x in about["layers"])
        return cls(folder, layers, about["scale"], about["form"], tuple(about["attributes"]))


def create(
    folder: Path, layers: Sequence[Layer], scale: float, attributes: Sequence[str], form: str = "raw"
) -> Population:
    """An empty population, or the one that an interrupted run began in `folder`; ConfigError if it is another."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Population(folder, tuple(layers), scale, form, tuple(attributes))
    if (folder / INDEX).is_file():
        if Population.open(folder) != made:
            raise ConfigError(f"{folder} holds a population of other layers or attributes. Name another folder.")
        return made
    about = {
        "layers": [{"site": x.site, "a": list(x.a), "b": list(x.b)} for x in layers],
        "scale": scale, "form": form, "attributes": list(attributes),
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(about, sort_keys=True))
    return made


def fill(
    population: Population, count: int, shard: int, make: Callable[[range], tuple[Tensor, Tensor]],
    done: Callable[[int], Any] = lambda n: None,
) -> None:  # fmt: skip
    """Write the shards that are missing: make(range of people) -> theta (n, d), labels (n, k). A shard is renamed into
    place when it is whole, so a run that was killed goes on where it stopped."""
    for i, at in enumerate(tqdm(range(0, count, shard), "population", disable=None, leave=False)):
        file = population.folder / f"shard-{i:05d}.safetensors"
        if not file.exists():
            theta, labels = make(range(at, min(count, at + shard)))
            part = file.with_suffix(".part")
            save_file({"theta": theta.contiguous(), "labels": labels.contiguous()}, part)
            part.replace(file)
        done(min(count, at + shard))


# ---- reading foreign adapters ---------------------------------------------------------------------------------------


def _key(key: str, folder: Path | str) -> tuple[str, str]:
    """(module path, "A" or "B") of a key, whatever prefix and adapter name it was saved with."""
    got = re.fullmatch(
        r"(?:base_model\.model\.|unet\.|transformer\.)?(.+)\.lora[_.]([AB])(?:\.[A-Za-z0-9_-]+)??\.weight", key
    )
    if got is None:
        raise BadArtifact(f"{folder}: {key[:80]!r} is no factor of a low-rank adapter (...lora_A.weight).")
    return got[1], got[2]


def read_folder(folder: Path) -> tuple[list[str], list[dict[str, tuple[Tensor, Tensor]]]]:
    """(names, adapters) of the folders in `folder`, by name; ConfigError if they do not adapt the same modules."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
    if len(names) < 3:
        raise ConfigError(f"{folder} holds {len(names)} adapters; a population has three or more.")
    adapters = [dict(read_adapter(folder / n).factors) for n in names]
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.keys() != adapters[0].keys():
            odd = sorted(adapter.keys() ^ adapters[0].keys())[0]
            raise ConfigError(f"{name} and {names[0]} adapt different modules ({odd}); they are of two populations.")
        for site, (a, b) in adapter.items():
            if (a.shape[1:], b.shape[:1]) != (adapters[0][site][0].shape[1:], adapters[0][site][1].shape[:1]):
                raise ConfigError(f"{name}: {site} has another shape than in {names[0]}; they are of two bases.")
            if not bool(a.isfinite().all() and b.isfinite().all()):
                raise BadArtifact(f"{name}: {site} holds a number that is not finite.")
    return names, adapters


def canonical(a: Tensor, b: Tensor, rank: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The factors of the same update B A with one code: A = sqrt(s) v, B = sqrt(s) u of its singular values, `rank` of
    them, each pair's sign such that <v, like> >= 0 (like (in,); default: the largest entry of u is positive)."""
    qa, ra = torch.linalg.qr(a.flatten(1).T)  # (in, r), (r, r)
    qb, rb = torch.linalg.qr(b.flatten(1))
    u, s, v = torch.linalg.svd(rb @ ra.T)
    left, right = qb @ u, v @ qa.T
    if like is None:
        sign = left.gather(0, left.abs().argmax(0, keepdim=True))[0].sign()
    else:
        sign = (right @ like.flatten()).sign()
    sign[sign == 0] = 1.0
    root = s.sqrt()
    pad = max(0, rank - len(s))
    new_a = torch.nn.functional.pad((sign * root)[:, None] * right, (0, 0, 0, pad))[:rank]
    new_b = torch.nn.functional.pad(left * (sign * root), (0, pad))[:, :rank]
    return new_a.reshape(rank, *a.shape[1:]), new_b.reshape(b.shape[0], rank, *b.shape[2:])


def gather(
    adapters: Sequence[dict[str, tuple[Tensor, Tensor]]], form: str, rank: int = 1
) -> tuple[tuple[Layer, ...], Tensor]:
    """(layers, theta (N, d)) of adapters: their factors as they are (`raw`, equal ranks), their canonical form, or the
    dense update B A (`update`), in which starts, scales and signs no longer matter."""
    sites = sorted(adapters[0])
    layers, columns = [], []
    for site in sites:
        pairs = [x[site] for x in adapters]
        if form == "update":
            if pairs[0][0].ndim > 2:
                raise ConfigError(f"{site} is a convolution; read this population in canonical form.")
            made = [(torch.zeros(0), b @ a) for a, b in pairs]
            layers.append(Layer(site, (), tuple(made[0][1].shape)))
        elif form == "canonical":
            made = [canonical(a, b, rank) for a, b in pairs]
            layers.append(Layer(site, tuple(made[0][0].shape), tuple(made[0][1].shape)))
        else:
            made = pairs
            if len({len(a) for a, _ in pairs}) > 1:
                raise ConfigError(f"The adapters of {site} have several ranks; read them in canonical form.")
            layers.append(Layer(site, tuple(pairs[0][0].shape), tuple(pairs[0][1].shape)))
        columns.append(torch.stack([torch.cat([a.flatten(), b.flatten()]) for a, b in made]))
    return tuple(layers), torch.cat(columns, 1)


def updates(layers: Sequence[Layer], theta: Tensor, scale: float = 1.0) -> tuple[tuple[Layer, ...], Tensor]:
    """A population of factors (N, d) as dense updates (N, sum of out * in)."""
    parts = split(layers, theta)
    new = tuple(Layer(x.site, (), (x.b[0], x.a[1])) for x in layers)
    return new, torch.cat([(scale * b @ a).flatten(1) for a, b in parts], 1)


def read_published(folder: Path) -> dict[str, Any]:
    """The authors' released space (V.pt, mean.pt, std.pt, proj*.pt, weight_dimensions.pt), each read as tensors alone.

    -> layers, mean (d,), sd (d,), basis (d, m), coefficients (N, m). `weight_dimensions` is an ordered dict
    key -> ((count,), shape) whose keys alternate lora_A, lora_B of a module.
    """

    def read(pattern: str) -> Any:
        file = next(iter(sorted(folder.glob(pattern))), None)
        if file is None:
            raise NotFound(
                f"{folder} has no {pattern}. The published space is V, mean, std, proj and weight_dimensions."
            )
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise BadArtifact(f"{file} holds more than tensors, and nothing else of it is read.") from None

    dimensions = read("weight_dimensions.pt")
    layers: list[Layer] = []
    pending: tuple[str, tuple[int, ...]] | None = None
    for key, (count, shape) in dimensions.items():
        site, letter = _key(key, folder)
        n = int(count[0] if isinstance(count, (tuple, list, torch.Size)) else count)
        shape = tuple(int(x) for x in shape)
        if n != torch.Size(shape).numel() or (letter == "A") != (pending is None) or (pending and pending[0] != site):
            raise BadArtifact(f"{folder}: {key[:80]!r} does not follow A, B, A, B with its own count.")
        if pending is None:
            pending = (site, shape)
        else:
            layers.append(Layer(site, pending[1], shape))
            pending = None
    mean, sd, basis, proj = (read(p).float() for p in ("mean.pt", "std.pt", "V.pt", "proj*.pt"))
    if len(mean.flatten()) != size(layers) or len(basis) != size(layers):
        raise BadArtifact(f"{folder}: V has {len(basis)} rows; its dimensions add up to {size(layers)}.")
    return {
        "layers": tuple(layers), "mean": mean.flatten(), "sd": sd.flatten(), "basis": basis, "coefficients": proj,
    }  # fmt: skip
