"""Edit a generator by coefficients in a linear space of its customised weights (weights2weights).

A population of low-rank adapters of one base, flattened to theta in R^d, has principal components V (d, m) of its
z-scored members. A point of the space is z in R^m, in standard deviations of the population:

    theta(z) = mean + sd * (V (std * z))        theta = (A_1, B_1, A_2, B_2, ...),  y = W x + scale * B (A x)

Dravid, Gandelsman, Wang, Abdal, Wetzstein, Efros, Aberman, arXiv 2406.09413, section 3; scale is the adapters'
alpha / r (27 there). Rows of one batch may be different points: each row's A and B are decoded once, when the row is
made, and every layer adds two thin products (`low_rank`). At one point the patch is a change of weights, so it folds,
and it is a plain adapter that peft and diffusers load (`adapter`).

Shapes: N models, d numbers of one adapter, m components, k attributes, B rows, T tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from patches.engine.edits import Edit, Inputs, Side, Weight
from patches.engine.patch import Patch
from registry.config import STRICT
from registry.errors import Invalid, PatchError

MAX_Z = 12.0
"""largest coefficient a request may give, in standard deviations of the population"""
MAX_STRENGTH = 10.0
"""largest strength of one attribute a request may give, in gaps between those with and those without it"""
START = 1000
"""timestep above every schedule: inject from the beginning"""


@dataclass(frozen=True)
class Layer:
    """One edited module and the shapes of its two factors."""

    site: str
    """module path of a Linear or a Conv2d"""
    a: tuple[int, ...]
    """(r, in), of a convolution (r, in, h, w); empty for a dense update, whose numbers are all in `b`"""
    b: tuple[int, ...]
    """(out, r), of a convolution (out, r, 1, 1); a dense update is (out, in)"""

    @property
    def sizes(self) -> tuple[int, int]:
        return _count(self.a), _count(self.b)


def _count(shape: Sequence[int]) -> int:
    out = 1 if shape else 0
    for n in shape:
        out *= n
    return out


def size(layers: Sequence[Layer]) -> int:
    """d: how many numbers one adapter of these layers has."""
    return sum(sum(layer.sizes) for layer in layers)


def split(layers: Sequence[Layer], theta: Tensor) -> list[tuple[Tensor, Tensor]]:
    """theta (..., d) -> for each layer A (..., r, in) and B (..., out, r), as views."""
    sizes = [n for layer in layers for n in layer.sizes]
    if theta.shape[-1] != sum(sizes):
        raise PatchError(f"An adapter of these {len(layers)} layers has {sum(sizes)} numbers, not {theta.shape[-1]}.")
    parts = theta.split(sizes, -1)
    return [
        (parts[2 * i].unflatten(-1, layer.a) if layer.a else parts[2 * i], parts[2 * i + 1].unflatten(-1, layer.b))
        for i, layer in enumerate(layers)
    ]


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * B (A x) with factors of their own for each of G equal runs of rows.

    x (n, ..., in) or (n, in, H, W); a (G, r, in[, h, w]), b (G, out, r[, 1, 1]), n a multiple of G. A dense update has
    no `a` (G, 0) and b (G, out, in). Two batched products: 2 r (in + out) operations a token, where sharing x V among
    rows would cost 2 m (in + out).
    """
    groups, n = len(b), len(x)
    if b.ndim == 5:
        return _low_rank_conv(x, a, b, scale)
    flat = x.reshape(groups, -1, x.shape[-1])
    if not a.shape[-1]:
        return (scale * torch.bmm(flat, b.transpose(1, 2))).reshape(*x.shape[:-1], -1)
    if flat.shape[1] * groups != n * _count(x.shape[1:-1] or (1,)):
        raise PatchError(f"{n} rows are not {groups} equal runs.")
    y = torch.bmm(torch.bmm(flat, a.transpose(1, 2)), (scale * b).transpose(1, 2))
    return y.reshape(*x.shape[:-1], -1)


def _low_rank_conv(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Stride 1, same padding: one grouped convolution for all runs."""
    groups, r, runs = len(a), a.shape[1], len(x) // len(a)
    flat = x.reshape(groups, runs, *x.shape[1:]).transpose(0, 1).flatten(1, 2)  # (runs, G in, H, W)
    h = F.conv2d(flat, a.flatten(0, 1), padding=(a.shape[-2] // 2, a.shape[-1] // 2), groups=groups)
    y = F.conv2d(h, scale * b.flatten(0, 1), groups=groups)
    assert h.shape[1] == groups * r
    return y.unflatten(1, (groups, -1)).transpose(0, 1).reshape(len(x), -1, *y.shape[-2:])


# ---- adapters side by side ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterSetConfig:
    """Which layers are adapted, with which scale."""

    __pydantic_config__ = STRICT

    layers: tuple[Layer, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class AdapterSet(Patch):
    """K adapters at once on one base: the rows of a batch come in K equal runs. tensors: theta (K, d).

    What populations are trained with: theta may require gradients, and is read at every forward.
    """

    Config = AdapterSetConfig
    config: AdapterSetConfig

    def edits(self) -> list[Edit]:
        c = self.config

        def fn(i: int) -> Callable[[Tensor, Inputs], Tensor]:
            def side(x: Tensor, inputs: Inputs) -> Tensor:
                a, b = inputs.once_here(parts)[i]
                return low_rank(x, a, b, c.scale)

            return side

        def parts(_: Inputs) -> list[tuple[Tensor, Tensor]]:
            return split(c.layers, self.tensors["theta"])

        return [Side(layer.site, fn(i)) for i, layer in enumerate(c.layers)]

    def to(self, device: torch.device | str) -> Patch:
        return type(self)(self.config, {k: v if v.requires_grad else v.to(device) for k, v in self.tensors.items()})


def linear_layers(model: torch.nn.Module, leaves: Sequence[str], rank: int = 1, under: str = "") -> tuple[Layer, ...]:
    """Linear and Conv2d modules of the submodule `under` whose path ends in one of `leaves`, in the model's order."""
    out = []
    for name, m in model.named_modules():
        if under and not name.startswith(f"{under}."):
            continue
        if not any(name == leaf or name.endswith("." + leaf) for leaf in leaves):
            continue
        if isinstance(m, torch.nn.Linear):
            out.append(Layer(name, (rank, m.in_features), (m.out_features, rank)))
        elif isinstance(m, torch.nn.Conv2d) and m.stride == (1, 1) and m.groups == 1:
            out.append(Layer(name, (rank, m.in_channels, *m.kernel_size), (m.out_channels, rank, 1, 1)))
    if not out:
        raise PatchError(f"{type(model).__name__} has no Linear or plain Conv2d called {', '.join(leaves)}.")
    return tuple(out)


def start(layers: Sequence[Layer], seed: int = 0) -> Tensor:
    """(d,) the start that all adapters of a population share: A uniform in +-1/sqrt(in) as peft draws it, B = 0."""
    g = Generator().manual_seed(seed)
    parts = []
    for layer in layers:
        na, nb = layer.sizes
        bound = 1 / max(1, na // layer.a[0]) ** 0.5
        parts += [(torch.rand(na, generator=g) * 2 - 1) * bound, torch.zeros(nb)]
    return torch.cat(parts)


# ---- the space ---------------------------------------------------------------------------------------------------


class Point(BaseModel):
    """What one request may say: where in the space its row is, and how far it moves along attributes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    coefficients: list[float] | None = Field(default=None, max_length=20_000)
    """z, in standard deviations of the population; fewer than m are filled up with zeros"""
    person: int | None = Field(default=None, ge=0)
    """start at this member of the population, if its members are sealed"""
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    """start at a sample of the space"""
    truncation: float = Field(default=1.0, ge=0.0, le=2.0)
    """Factor of the sampled coefficients: 0 is the mean"""
    attributes: dict[str, float] = Field(default_factory=dict, max_length=64)
    """attribute -> strength, in gaps between the population's members with it and without it"""
    after: int = Field(default=START, ge=0, le=START)
    """delayed injection: the base's own weights while the timestep is larger, so that its layout stays"""


@dataclass(frozen=True)
class SubspaceConfig:
    """Which layers the population adapts, and what its directions are called."""

    __pydantic_config__ = STRICT

    layers: tuple[Layer, ...]
    scale: float = 1.0
    """Scale of the adapters, alpha / r"""
    attributes: tuple[str, ...] = ()
    """names of `directions`"""
    form: str = "raw"
    """what was put into the space: the factors as trained (`raw`), their canonical form, or the dense `update`"""


@dataclass(frozen=True)
class SubspaceEdit(Patch):
    """A point of a weight space, or as many as there are rows.

    tensors: mean (d,), sd (d,), basis (d, m), std (m,), z (m,) the point of rows that say nothing; of k attributes
    directions (k, m) unit vectors in z, gap (k,) and reach (k, 2): distance between those with and without, smallest
    and largest projection of a member; radius (2,) of members' |z| / sqrt(m); optional members (N, m), and warm
    (p + 1, m), a linear map from a picture's latent to z.
    """

    Config = SubspaceConfig
    Ask = Point
    config: SubspaceConfig

    def __post_init__(self) -> None:
        c, t = self.config, self.tensors
        need = {"mean", "sd", "basis", "std", "z"}
        if missing := need - t.keys():
            raise PatchError(f"A subspace needs the tensors {', '.join(sorted(missing))}.")
        d, m = size(c.layers), len(t["std"])
        shapes = {"mean": (d,), "sd": (d,), "basis": (d, m), "z": (m,)}
        if c.attributes:
            shapes |= {"directions": (len(c.attributes), m), "gap": (len(c.attributes),)}
        for name, want in shapes.items():
            got = tuple(t[name].shape) if name in t else "missing"
            if got != want:
                raise PatchError(f"{name} of a subspace of {m} components and {d} numbers must be {want}; it is {got}.")
        if not all(bool(v.isfinite().all()) for v in t.values()):
            raise PatchError("A subspace holds a number that is not finite.")
        if bool((t["std"] <= 0).any()):
            raise PatchError("A component of the subspace has no spread; keep fewer components.")

    @property
    def components(self) -> int:
        return len(self.tensors["std"])

    # -- coordinates

    def decode(self, z: Tensor) -> Tensor:
        """z (..., m) -> theta (..., d), float32: equation 2 of the paper with standardised coefficients."""
        t = self.tensors
        basis = t["basis"].float()[:, : z.shape[-1]]
        return t["mean"].float() + t["sd"].float() * ((z * t["std"].float()[: z.shape[-1]]) @ basis.T)

    def encode(self, theta: Tensor) -> Tensor:
        """theta (..., d) -> z (..., m)."""
        t = self.tensors
        return ((theta - t["mean"].float()) / t["sd"].float()) @ t["basis"].float() / t["std"].float()

    def at(self, z: Tensor) -> SubspaceEdit:
        """The same space at another point: what `fold` and `adapter` write, and rows that say nothing get."""
        return replace(self, tensors={**self.tensors, "z": z.detach().clone()})

    def move(self, z: Tensor, strengths: Mapping[str, float]) -> Tensor:
        """z moved along attributes; strengths are independent and add up (composition)."""
        for name, strength in strengths.items():
            i = self._attribute(name)
            z = z + strength * self.tensors["gap"][i].float() * self.tensors["directions"][i].float()
        return z

    def read(self, z: Tensor) -> Tensor:
        """(..., k) where z lies along each attribute, in gaps: 0 in the middle of the population."""
        t = self.tensors
        return z @ t["directions"].float().T / t["gap"].float()

    def sample(self, n: int, g: Generator, truncation: float = 1.0, clip: bool = True) -> Tensor:
        """(n, m) new points: independent Gaussians of the population's spread, no farther out than its members are.

        truncation: factor on the spread, 0 is the mean.
        """
        z = truncation * torch.randn(n, self.components, generator=g)
        if clip and "radius" in self.tensors:
            norm = z.norm(dim=1, keepdim=True) / self.components**0.5
            z = z * (float(self.tensors["radius"][1]) / norm.clamp(min=1e-9)).clamp(max=1.0)
        return z

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine to the nearest member of the population, and which it is, for z (n, m)."""
        if "members" not in self.tensors:
            raise PatchError("The members of this population were not sealed with its space.")
        near = F.normalize(z, dim=1) @ F.normalize(self.tensors["members"].float(), dim=1).T
        found = near.max(1)
        return found.values, found.indices

    def warm(self, latents: Tensor) -> Tensor:
        """(n, m) first guess of the point that draws pictures with these latents (n, ...), by ridge regression."""
        if "warm" not in self.tensors:
            return latents.new_zeros(len(latents), self.components)
        w = self.tensors["warm"].float()
        return latents.flatten(1) @ w[:-1] + w[-1]

    def _attribute(self, name: str) -> int:
        if name not in self.config.attributes:
            known = ", ".join(self.config.attributes) or "none"
            raise Invalid(f"There is no attribute {name[:40]!r}. Attributes: {known}.")
        return self.config.attributes.index(name)

    # -- requests

    def point(self, ask: Point) -> Tensor:
        """(m,) where a request starts and moves to. Raises Invalid for what lies outside."""
        given = [k for k in ("coefficients", "person", "seed") if getattr(ask, k) is not None]
        if len(given) > 1:
            raise Invalid(f"A row starts at one place; {' and '.join(given)} are two. Give one of them.")
        z = self.tensors["z"].float().cpu()
        if ask.coefficients is not None:
            if len(ask.coefficients) > self.components:
                raise Invalid(f"{len(ask.coefficients)} coefficients were given; this space has {self.components}.")
            given_z = torch.tensor(ask.coefficients)
            if bool((given_z.abs() > MAX_Z).any()):
                raise Invalid(f"A coefficient is beyond {MAX_Z:g} standard deviations; nothing the base can draw.")
            z = F.pad(given_z, (0, self.components - len(given_z)))
        if ask.person is not None:
            members = self.tensors.get("members")
            if members is None or ask.person >= len(members):
                raise Invalid(f"There is no member {ask.person}; {0 if members is None else len(members)} are sealed.")
            z = members[ask.person].float().cpu()
        if ask.seed is not None:
            z = self.sample(1, Generator().manual_seed(ask.seed), ask.truncation)[0]
        if far := [k for k, s in ask.attributes.items() if abs(s) > MAX_STRENGTH]:
            raise Invalid(f"The strength of {far[0][:40]!r} is beyond {MAX_STRENGTH:g} gaps of the population.")
        return self.on("cpu").move(z, ask.attributes)

    def on(self, device: torch.device | str) -> SubspaceEdit:
        """This patch with its tensors on `device`, itself if they are there."""
        return (
            self
            if self.tensors["mean"].device == torch.device(device)
            else replace(self, tensors=self.to(device).tensors)
        )

    def params(self, ask: Point | None, base: Any) -> dict[str, Tensor]:
        """Row parameters: theta (d,) decoded here once, not in every layer of every step."""
        ask = Point() if ask is None else ask
        here = self.tensors["mean"].device
        theta = self.decode(self.point(ask).to(here))
        return self.row(theta, ask.after)

    def row(self, theta: Tensor, after: int = START) -> dict[str, Tensor]:
        """What a row is told to use the adapter theta (d,)."""
        return {"theta": theta, "said": theta.new_ones(1), "after": theta.new_full((1,), float(after))}

    # -- edits

    def edits(self) -> list[Edit]:
        c, default = self.config, self.decode(self.tensors["z"].float())[None]

        def parts(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
            theta = inputs.row("theta")
            if theta is None:
                return split(c.layers, default)
            said = inputs.row("said")
            assert said is not None
            theta = torch.where(said > 0, theta, default.to(theta))
            return [(a, b) for a, b in split(c.layers, theta)]

        def fn(i: int) -> Callable[[Tensor, Inputs], Tensor]:
            def side(x: Tensor, inputs: Inputs) -> Tensor:
                a, b = inputs.once_here(parts)[i]
                y = low_rank(x, a.to(x), b.to(x), c.scale)
                live = inputs.once_here(_live)
                return y if live is None else y * live.to(y).reshape(-1, *[1] * (y.ndim - 1))

            return side

        return [Side(layer.site, fn(i)) for i, layer in enumerate(c.layers)]

    def weights(self) -> list[Weight]:
        c = self.config
        pairs = split(c.layers, self.decode(self.tensors["z"].float()))
        return [Weight(layer.site, _plus(dense(a, b, c.scale))) for layer, (a, b) in zip(c.layers, pairs, strict=True)]

    def factors(self, z: Tensor | None = None, rank: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """The point z (default: the patch's own) as plain factors: site -> A (r, in), B (out, r), the scale inside B.

        A dense update is cut to `rank` (0: the fewest that keep 99.99 % of each update's square).
        """
        c, out = self.config, {}
        theta = self.decode(self.tensors["z"].float() if z is None else z)
        for layer, (a, b) in zip(c.layers, split(c.layers, theta), strict=True):
            a, b = (a, b) if layer.a else shorten(b, rank)
            out[layer.site] = (a.contiguous(), (c.scale * b).contiguous())
        return out


def _live(inputs: Inputs) -> Tensor | None:
    """(rows,) 1 where the adapter is on at this step, 0 before its delayed injection; None: on everywhere."""
    after = inputs.row("after")
    if after is None or bool((after >= START).all()) or "timestep" not in inputs:
        return None
    t = torch.as_tensor(inputs["timestep"], device=after.device).reshape(-1)
    if len(t) > 1 and inputs.at is not None:
        t = t[inputs.at]
    said = inputs.row("said")
    assert said is not None
    after = torch.where(said > 0, after, torch.full_like(after, float(START)))
    return (t.to(after) <= after[:, 0]).to(after)


def _plus(update: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda p: {"weight": p["weight"] + update.to(p["weight"])}


def dense(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """The change of the weight that factors make: (out, in), of a convolution (out, in, h, w)."""
    if not a.numel():
        return scale * b
    if a.ndim == 4:
        return scale * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    return scale * b @ a


def shorten(update: Tensor, rank: int = 0) -> tuple[Tensor, Tensor]:
    """The best factors A (r, in), B (out, r) of a dense update (out, in)."""
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    if not rank:
        kept = s.square().cumsum(0) / s.square().sum().clamp(min=1e-30)
        rank = int((kept < 0.9999).sum()) + 1
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
