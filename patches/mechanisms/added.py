"""AddedEdit: what others trained beside a base and it is added with: LoRA factors and steering vectors.

    y = W x + B A x            at each module that has factors (Hu et al., arXiv 2106.09685; the scale alpha / r in B)
    h' = h + amount v          at each block that has a vector (Turner et al., arXiv 2308.10248; Zou et al., 2310.01405)

Rows of one batch may differ in it, like in any patch; without vectors it folds into the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from patches.engine.edits import Act, Edit, Inputs, Side, Weight
from patches.engine.patch import Patch
from registry.config import STRICT
from registry.errors import PatchError

A, B, V = "a.", "b.", "v."
"""tensors: a.<site> (r, in), b.<site> (out, r), v.<site> (D,)"""


@dataclass(frozen=True)
class AddedConfig:
    """What is added where, and what it was before it came here."""

    __pydantic_config__ = STRICT

    factors: tuple[str, ...] = ()
    """module paths of linear layers"""
    vectors: tuple[str, ...] = ()
    """module paths of blocks"""
    amount: float = 1.0
    """Factor of the vectors"""
    made: str = ""
    """layout it was read from: peft, diffusers or vectors"""


@dataclass(frozen=True)
class AddedEdit(Patch):
    """tensors: a.<site> (r, in) and b.<site> (out, r) of each module in `factors`, v.<site> (D,) of each in
    `vectors`."""

    Config = AddedConfig
    config: AddedConfig

    def __post_init__(self) -> None:
        c = self.config
        if not c.factors and not c.vectors:
            raise PatchError("This edit adds nothing: it has neither factors nor vectors.")
        need = {f"{p}{s}" for s in c.factors for p in (A, B)} | {f"{V}{s}" for s in c.vectors}
        if odd := sorted(need ^ self.tensors.keys()):
            raise PatchError(f"The tensor {odd[0][:80]!r} and the sites that are named do not belong together.")
        for s in c.factors:
            a, b = self.tensors[A + s], self.tensors[B + s]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise PatchError(f"{s}: factors {tuple(b.shape)} x {tuple(a.shape)} are no product.")

    def edits(self) -> list[Edit]:
        c, t = self.config, self.tensors
        sides: list[Edit] = [Side(s, _product(t[A + s], t[B + s])) for s in c.factors]
        return [*sides, *(Act(s, _plus(c.amount * t[V + s])) for s in c.vectors)]

    def weights(self) -> list[Weight]:
        if self.config.vectors:
            raise PatchError("A vector is added to a stream and has no weights to be folded into; serve it with hooks.")
        return [Weight(s, _more(self.tensors[B + s] @ self.tensors[A + s])) for s in self.config.factors]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """site -> A (r, in), B (out, r) with the scale inside B."""
        return {s: (self.tensors[A + s], self.tensors[B + s]) for s in self.config.factors}


def _product(a: Tensor, b: Tensor) -> Callable[[Tensor, Inputs], Tensor]:
    return lambda x, _: (x @ a.to(x).T) @ b.to(x).T


def _plus(v: Tensor) -> Callable[[Tensor, Inputs], Tensor]:
    return lambda x, _: x + v.to(x)


def _more(update: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda p: {"weight": p["weight"] + update.to(p["weight"])}
