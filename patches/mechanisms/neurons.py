"""Ablate, scale or project MLP neurons: their activations in any base, or only their second-order effects in CLIP.

One config, two paths:
- **all**: the activation itself, a' = m + g (a - m), so that everything downstream changes. g = 0 is mean-ablation, m =
  0 a plain gain. At all tokens it is also a weight edit (columns of the output projection, and its bias).
- **second_order** (CLIP's image tower; arXiv 2406.04341): only phi_n, the neuron's contribution to the embedding
  through later heads (`patches/families/clip/second_order.py`), computed in the same forward:

    y' = y + sum_n sum_g (S - mean S)[n, g] V[n, g]

  V = -U replaces effects by their mean, (g - 1) U scales them about it, U (r r^T - I) keeps only the component along
  the neuron's direction r (rank-1 replacement). The neuron's other effects stay, so this is the more specific edit.

Shapes: B rows, T tokens, N neurons of the layer, n edited ones, G later heads of the lens, H heads, k joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patches.engine.edits import Act, Edit, Inputs, Weight
from patches.engine.patch import Patch
from patches.families import clip
from patches.families.base import Base
from patches.families.clip.second_order import Directions, NeuronLens, _spread
from registry.config import STRICT
from registry.errors import PatchError

Op = Literal["mean", "gain", "rank1"]
Tokens = Literal["all", "cls", "patches"]
BLOCK = "visual.transformer.resblocks.{i}."


@dataclass(frozen=True)
class NeuronConfig:
    """Config of a neuron edit: which neurons, the operation on them, and the path it acts on."""

    __pydantic_config__ = STRICT

    site: str
    """Module path of the projection whose input the neurons are"""
    neurons: tuple[int, ...]
    """Indices of the edited neurons"""
    op: Op = "mean"
    """Edit: set to the mean (mean), scale about it (gain), keep only the component along r_n (rank1; second_order)"""
    path: Literal["all", "second_order"] = "all"
    tokens: Tokens = "all"
    """Tokens that path `all` edits; token 0 is the class token"""
    layers: int = 0
    """Blocks of the tower, for path `second_order`; the last ones, after the neurons' own, are read"""
    eps: float = 1e-5
    """Epsilon of the tower's norms"""


@dataclass(frozen=True)
class NeuronEdit(Patch):
    """Patch that edits neurons.

    tensors, path all: mean (n,), and gain (n,) of op gain; second_order: mean (n, G) of S, write (n, G, k) V.
    """

    Config = NeuronConfig
    config: NeuronConfig

    def __post_init__(self) -> None:
        c, t, n = self.config, self.tensors, len(self.config.neurons)
        if not n:
            raise PatchError("This neuron edit names no neuron; it would do nothing.")
        if len(set(c.neurons)) != n or min(c.neurons) < 0:
            raise PatchError("Neurons must be different columns of the projection, 0 or more.")
        need = {"mean": 1} | ({"gain": 1} if c.op == "gain" else {})
        if c.path == "second_order":
            need = {"mean": 2, "write": 3}
            if c.tokens != "all":
                raise PatchError("A second-order effect has no tokens left to choose; use tokens='all'.")
        elif c.op == "rank1":
            raise PatchError("op='rank1' replaces second-order effects; it needs path='second_order'.")
        for name, dims in need.items():
            if name not in t or t[name].ndim != dims or len(t[name]) != n:
                got = list(t[name].shape) if name in t else "missing"
                raise PatchError(
                    f"This edit of {n} neurons needs a tensor {name!r} of {n} rows, {dims}-d; it is {got}."
                )
        if c.path == "second_order":
            if t["write"].shape[:2] != t["mean"].shape:
                raise PatchError(
                    f"write {list(t['write'].shape)} and mean {list(t['mean'].shape)} do not fit together."
                )
            if not 0 <= self.layer < c.layers - 1 or t["mean"].shape[1] % (c.layers - 1 - self.layer):
                raise PatchError(
                    f"{c.site} is no MLP projection before the last of {c.layers} blocks, or the "
                    f"{t['mean'].shape[1]} heads do not fit the blocks after it."
                )
        if not all(bool(v.isfinite().all()) for v in t.values()):
            raise PatchError("A neuron edit holds a number that is not finite.")

    @property
    def layer(self) -> int:
        """Block whose neurons are edited; -1 if the site's path has no number."""
        head, _, rest = self.config.site.partition("resblocks.")
        number = rest.partition(".")[0]
        return int(number) if head == "visual.transformer." and number.isdigit() else -1

    def edits(self) -> list[Edit]:
        return self._lens() if self.config.path == "second_order" else [Act(self.config.site, self._fire(), "input")]

    def weights(self) -> list[Weight]:
        """Fold a' = m + g (a - m) at every token into the projection: W' = W diag(g), b' = b + W (1 - g) m."""
        c = self.config
        if c.path == "second_order" or c.tokens != "all":
            raise PatchError(
                "This neuron edit depends on the token or on later attention, so no weights can hold it; serve it with "
                "hooks."
            )
        js, gain, mean = list(c.neurons), self._gain(), self.tensors["mean"]

        def fold(p: dict[str, Tensor]) -> dict[str, Tensor]:
            w = p["weight"].clone()
            more = w[:, js] @ ((1 - gain) * mean).to(w)
            w[:, js] = w[:, js] * gain.to(w)
            if "bias" in p:
                return {"weight": w, "bias": p["bias"] + more}
            if bool(more.any()):
                raise PatchError(
                    f"{c.site} has no bias, so no weights can hold a mean that is not 0; serve it with hooks."
                )
            return {"weight": w}

        return [Weight(c.site, fold)]

    def _gain(self) -> Tensor:
        mean = self.tensors["mean"]
        return self.tensors["gain"] if self.config.op == "gain" else torch.zeros_like(mean)

    def _fire(self) -> Callable[[Tensor, Inputs], Tensor]:
        js, gain, mean = list(self.config.neurons), self._gain(), self.tensors["mean"]
        at = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}[self.config.tokens]

        def fn(a: Tensor, _: Inputs) -> Tensor:  # a (B, T, N)
            out = a.clone()
            m = mean.to(a)
            part = out[:, at]  # a view, written in place
            part[..., js] = m + gain.to(a) * (part[..., js] - m)
            return out

        return fn

    def _lens(self) -> list[Edit]:
        """Build the edits that record a forward's neurons, attention and norms, and finally correct the embedding."""
        c, mean, write = self.config, self.tensors["mean"], self.tensors["write"]
        js, later = list(c.neurons), range(self.layer + 1, c.layers)

        def note(name: str, take: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Inputs], Tensor]:
            def fn(x: Tensor, inputs: Inputs) -> Tensor:
                self._notes(inputs)[name] = take(x)
                return x

            return fn

        def move(y: Tensor, inputs: Inputs) -> Tensor:  # y (B, k)
            seen = self._notes(inputs)
            rows = [seen[f"pattern {i}"] / seen[f"sigma {i}"][:, None] for i in later]  # each (B, H, T)
            s = torch.cat(rows, 1) @ seen["p"] / seen["sigma"][:, None, None]  # (B, G, n)
            if s.shape[1] != mean.shape[1]:
                raise PatchError(f"This edit was made for {mean.shape[1]} later heads; this tower has {s.shape[1]}.")
            return y + ((s.mT - mean).flatten(1) @ write.flatten(0, 1)).to(y)

        def sigma(z: Tensor) -> Tensor:
            return _spread(z, c.eps)[..., 1]

        def post(z: Tensor) -> Tensor:
            return sigma(z if z.ndim == 2 else z[:, 0])

        out: list[Edit] = [Act(c.site, note("p", lambda a: a[..., js].float()), "input")]
        for i in later:
            out.append(Act(BLOCK.format(i=i) + "ln_1", note(f"sigma {i}", sigma), "input"))
            out.append(
                Act(BLOCK.format(i=i) + "attn.pattern", note(f"pattern {i}", lambda a: a[:, :, 0].float()), "output")
            )
        return [*out, Act("visual.ln_post", note("sigma", post), "input"), Act("visual", move)]

    def _notes(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return what this patch recorded in this forward for the current rows, which are the same at every site."""
        at = inputs.at
        rows = (at.start, at.stop) if isinstance(at, slice) else at if at is None else tuple(at.tolist())
        found: dict[str, Tensor] = inputs.memo.setdefault((id(self), rows), {})
        return found


def ablate(
    site: str, neurons: Sequence[int], mean: Tensor, gain: Tensor | float = 0.0, tokens: Tokens = "all"
) -> NeuronEdit:
    """Build the patch that sets neurons of `site` to their mean, or scales them about it by `gain`.

    mean: (n,) of these neurons.
    """
    value = torch.as_tensor(gain).to(mean).expand(len(neurons)).clone()
    plain = not bool(value.any())
    config = NeuronConfig(site, tuple(map(int, neurons)), "mean" if plain else "gain", "all", tokens)
    return NeuronEdit(config, {"mean": mean} if plain else {"mean": mean, "gain": value})


def replace_effects(
    base: Base, at: NeuronLens, known: Directions, neurons: Sequence[int], op: Op = "mean", gain: float = 0.0
) -> NeuronEdit:
    """Build the patch that mean-ablates, scales or projects the second-order effects of `neurons`."""
    js = [int(n) for n in neurons]
    if wrong := [n for n in js if not 0 <= n < at.neurons]:
        raise PatchError(f"This layer has neurons 0 to {at.neurons - 1}, so there is no neuron {wrong[0]}.")
    if op == "rank1":
        c = known.axis[js]  # V = R^T (a a^T - 1) Q
        write = at.size[js].mT @ (c[:, :, None] * (c[:, None] @ at.basis[js]) - at.basis[js])
    else:
        write = ((gain if op == "gain" else 0.0) - 1) * at.write(js)
    blocks = base.model.visual.transformer.resblocks
    site = clip.site("neurons", at.layer)
    config = NeuronConfig(site, tuple(js), op, "second_order", layers=len(blocks), eps=base.model.visual.ln_post.eps)
    return NeuronEdit(config, {"mean": known.mean[js].contiguous(), "write": write.contiguous()})
