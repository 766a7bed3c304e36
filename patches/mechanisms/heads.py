"""Zero, mean-ablate or scale the output of attention heads.

The heads' outputs are concatenated at the input of the attention's output projection, so any such edit is affine:

    x' = keep * x + put          x (B, T, D), D = H e; keep and put differ from 1 and 0 in the edited heads' e columns

Mean and zero ablation of heads: Gandelsman, Efros, Steinhardt, arXiv 2310.05916, section 4.4, and Dyslexify, arXiv
2508.20570 (class token only). Soft pruning by a factor per head: arXiv 2503.11103. At all tokens the edit is one of the
projection's weights, so it folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patches.engine.edits import Act, Edit, Inputs, Weight
from patches.engine.patch import Patch
from registry.config import STRICT
from registry.errors import PatchError

Mode = Literal["zero", "mean", "scale"]


@dataclass(frozen=True)
class HeadConfig:
    """Config of a head edit: which heads, the operation on their output, at which tokens."""

    __pydantic_config__ = STRICT

    site: str
    """Module path of the output projection, with {i} for the layer"""
    heads: tuple[tuple[int, int], ...]
    """Edited heads as (layer, head)"""
    count: int
    """Number of heads per layer"""
    mode: Mode = "zero"
    """Operation on a head's output: zero, mean (the tensor `value`) or scale (the tensor `factor`)"""
    tokens: Literal["all", "cls"] = "all"
    """Tokens that are edited; cls is token 0 alone, so that other tokens still read the heads' output"""


@dataclass(frozen=True)
class HeadEdit(Patch):
    """Patch that edits head outputs.

    tensors, in the order of `heads`: value (n, e), or (n, T, e) by position, for mean; factor (n,) for scale.
    """

    Config = HeadConfig
    config: HeadConfig

    def __post_init__(self) -> None:
        c, t, n = self.config, self.tensors, len(self.config.heads)
        if not n:
            raise PatchError("This head edit names no head; it would do nothing.")
        if "{i}" not in c.site:
            raise PatchError(f"site={c.site[:60]!r} must have {{i}} where the layer goes.")
        if len(set(c.heads)) < n:
            raise PatchError("A head is named twice.")
        if odd := [h for h in c.heads if h[0] < 0 or not 0 <= h[1] < c.count]:
            raise PatchError(f"There is no head {odd[0]}; a layer has heads 0 to {c.count - 1}.")
        need: dict[str, tuple[int, ...]] = {"mean": (2, 3), "scale": (1,), "zero": ()}
        name = {"mean": "value", "scale": "factor", "zero": ""}[c.mode]
        if name and (name not in t or t[name].ndim not in need[c.mode] or len(t[name]) != n):
            got = list(t[name].shape) if name in t else "missing"
            raise PatchError(f"mode={c.mode!r} of {n} heads needs a tensor {name!r} of {n} rows; it is {got}.")
        if c.mode == "mean" and c.tokens == "cls" and t["value"].ndim == 3:
            raise PatchError("A value by position belongs to tokens='all'; the class token has one.")
        if not all(bool(v.isfinite().all()) for v in t.values()):
            raise PatchError("A head edit holds a number that is not finite.")

    def edits(self) -> list[Edit]:
        return [Act(self._site(layer), self._rewrite(layer), "input") for layer in self._layers()]

    def weights(self) -> list[Weight]:
        if self.config.tokens != "all" or (self.config.mode == "mean" and self.tensors["value"].ndim == 3):
            raise PatchError("A head edit of single tokens has no weight form; serve it with hooks.")
        return [Weight(self._site(layer), self._folded(layer)) for layer in self._layers()]

    def _site(self, layer: int) -> str:
        """Return the module path of a layer's output projection."""
        return self.config.site.replace("{i}", str(layer))

    def _layers(self) -> list[int]:
        """Return the layers with edited heads."""
        return sorted({layer for layer, _ in self.config.heads})

    def _line(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return a layer's keep (H, 1), and put (H, e) or (T, H, e) or None for zeros, in float32."""
        c = self.config
        keep, put = torch.ones(c.count, 1), None
        for row, (mine, head) in enumerate(c.heads):
            if mine != layer:
                continue
            keep[head] = self.tensors["factor"][row].float() if c.mode == "scale" else 0.0
            if c.mode == "mean":
                value = self.tensors["value"][row].float()  # (e,) or (T, e)
                put = value.new_zeros(*value.shape[:-1], c.count, value.shape[-1]) if put is None else put
                put[..., head, :] = value
        return keep, put

    def _rewrite(self, layer: int) -> Callable[[Tensor, Inputs], Tensor]:
        site, count, only = self._site(layer), self.config.count, self.config.tokens == "cls"
        keep, put = self._line(layer)

        def fn(x: Tensor, _: Inputs) -> Tensor:  # (B, T, D), the concatenated heads
            if x.shape[-1] % count:
                raise PatchError(f"{site} has {x.shape[-1]} columns, which are not {count} heads.")
            part = (x[:, :1] if only else x).unflatten(-1, (count, -1))
            new = part * keep.to(x)
            if put is not None:
                if put.shape[-1] != part.shape[-1]:
                    raise PatchError(f"The value is for heads of {put.shape[-1]} columns; {site} has {part.shape[-1]}.")
                if put.ndim == 3 and len(put) != part.shape[1]:
                    raise PatchError(f"The value is for {len(put)} tokens, but {site} has {part.shape[1]}.")
                new = new + put.to(x)
            out = new.flatten(-2)
            return torch.cat([out, x[:, 1:]], 1) if only else out

        return fn

    def _folded(self, layer: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        keep, put = self._line(layer)

        def fn(p: dict[str, Tensor]) -> dict[str, Tensor]:  # weight (D_out, D)
            W = p["weight"]
            out = {"weight": W * keep.to(W).expand(-1, W.shape[1] // self.config.count).flatten()}
            if put is not None:
                if "bias" not in p:
                    raise PatchError(f"{self._site(layer)} has no bias that a mean could go to; serve it with hooks.")
                out["bias"] = p["bias"] + W @ put.to(W).flatten()
            return out

        return fn
