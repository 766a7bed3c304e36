"""DirectionEdit: move a generator's condition from one class towards another.

Counterfactuals by arithmetic in the conditioning space (arXiv 2504.08046): with class means mu_c of unit conditions,
e' = |e| (e / |e| + amount (mu_target - mu_source)), rescaled to the old norm where the model was trained on unit
conditions. The condition is edited as it enters the denoiser, so rows of one batch go to different classes by
different amounts, and the other half of guidance can be the same row without the edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from patches.engine.edits import Act, Edit, Inputs, Side
from patches.engine.patch import Patch
from registry.config import STRICT
from registry.errors import Invalid, PatchError

Norm = Literal["unit", "free"]
MAX_AMOUNT = 8.0
STILL = {"class": torch.tensor([1.0, 0.0, 0.0, 0.0])}
"""row parameters that move nothing"""
NEAREST = -1
"""as a source class: the one of the target's domain, other than the target, whose mean is nearest to the row's
condition. As a target class: the one after the nearest of all, within its domain"""


@dataclass(frozen=True)
class DirectionConfig:
    """Which condition is moved, between which classes."""

    __pydantic_config__ = STRICT

    site: str
    """module path the condition passes through: `given.image` or `given.text`"""
    classes: tuple[str, ...]
    """names of the rows of `means`"""
    domains: tuple[str, ...]
    """Domain of each class, the question it is an answer to; a row moves within one domain"""
    source: int = NEAREST
    target: int = NEAREST
    """classes of a row that says nothing"""
    amount: float = 1.0
    norm: Norm = "unit"
    """unit: the moved condition gets its old norm back; free: it does not, as published"""


class DirectionAsk(BaseModel):
    """What one request says: where to, how far, and from where."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    target: str = Field(max_length=200)
    source: str | None = Field(None, max_length=200)
    """default: the class of the target's domain that the picture is nearest to"""
    amount: float = Field(1.0, ge=-MAX_AMOUNT, le=MAX_AMOUNT)
    """1: one class gap"""


@dataclass(frozen=True)
class DirectionEdit(Patch):
    """tensors: means (C, ...) of unit conditions, one per class; of a tuned domain also `a.<site>` (r, in) and
    `b.<site>` (out, r), a low-rank update of the denoiser that rows of this arm are drawn with, inverted with, and
    guided from: the model that the move is made on."""

    Config = DirectionConfig
    Ask = DirectionAsk

    def __post_init__(self) -> None:
        c = self.config
        means = self.tensors["means"]
        if len(c.classes) != len(means) or len(c.domains) != len(means) or len(means) < 2:
            raise PatchError(
                f"{len(means)} class means for {len(c.classes)} classes; each needs one, and two at least."
            )
        if not NEAREST <= c.target < len(means) or not NEAREST <= c.source < len(means):
            raise PatchError(f"Classes {c.source} and {c.target} of {len(means)}: there is no such class.")

    def edits(self) -> Sequence[Edit]:
        moved, tuned = Act(self.config.site, self._fn), (Side(s, self._update(s), under=True) for s in self.tuned)
        return [moved, *tuned]

    @property
    def tuned(self) -> tuple[str, ...]:
        """sites that a tuned domain's low-rank update changes"""
        return tuple(name.removeprefix("a.") for name in self.tensors if name.startswith("a."))

    def _update(self, site: str) -> Callable[[Tensor, Inputs], Tensor]:
        a, b = self.tensors[f"a.{site}"], self.tensors[f"b.{site}"]
        return lambda x, _: F.linear(F.linear(x, a.to(x)), b.to(x))

    def _fn(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Conditions x (B, ...) moved, each by what its row says."""
        count = x.shape[0]
        told = row(inputs, "class", count, 4, x.device)  # set, source, target, amount
        own = row(inputs, "direction", count, x[0].numel(), x.device)
        default = torch.tensor([1.0, self.config.source, self.config.target, self.config.amount], device=x.device)
        told = torch.where(told[:, :1] > 0, told, default)
        d = self._directions(x.float(), told)
        d = torch.where((own != 0).any(1)[:, None], own, d.flatten(1)).reshape(x.shape)
        return move(x.float(), d, self.config.norm).to(x.dtype)

    def _directions(self, x: Tensor, told: Tensor) -> Tensor:
        """(B, ...) amount (mu_target - mu_source) of each row."""
        means = self.tensors["means"].to(x)
        source, target = self.classes(x, told[:, 1].long(), told[:, 2].long())
        amount = told[:, 3].reshape(-1, *[1] * (means.ndim - 1))
        return amount * (means[target] - means[source])

    def classes(self, x: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) source and target of rows x (B, ...), with every NEAREST found."""
        scores = self.scores(x)
        domain, after = self._domains()
        domain, after = domain.to(x.device), after.to(x.device)
        target = torch.where(target < 0, after[scores.argmax(1)], target)
        fits = (domain[None] == domain[target][:, None]) & (
            torch.arange(len(domain), device=x.device) != target[:, None]
        )
        return torch.where(source < 0, scores.masked_fill(~fits, -torch.inf).argmax(1), source), target

    def scores(self, x: Tensor) -> Tensor:
        """(B, C) cosine of conditions x (B, ...) with the class means."""
        means = F.normalize(self.tensors["means"].to(x).flatten(1), dim=-1)
        return F.normalize(x.flatten(1), dim=-1) @ means.T

    def _domains(self) -> tuple[Tensor, Tensor]:
        """(C,) number of each class's domain, and the class after it there."""
        names = {name: i for i, name in enumerate(dict.fromkeys(self.config.domains))}
        own = [names[name] for name in self.config.domains]
        members = [[j for j, d in enumerate(own) if d == i] for i in own]
        after = [m[(m.index(i) + 1) % len(m)] for i, m in enumerate(members)]
        return torch.tensor(own), torch.tensor(after)

    def params(self, ask: DirectionAsk, base: Any) -> dict[str, Tensor]:
        """Row parameters of a request. Raises Invalid for a class this patch does not know."""
        target = self._class(ask.target)
        source = NEAREST if ask.source is None else self._class(ask.source)
        if source != NEAREST and self.config.domains[source] != self.config.domains[target]:
            raise Invalid(
                f"{ask.source!r} is of {self.config.domains[source]!r} and {ask.target!r} of "
                f"{self.config.domains[target]!r}; a picture moves within one domain."
            )
        return {"class": torch.tensor([1.0, float(source), float(target), ask.amount])}

    def _class(self, name: str) -> int:
        if name not in self.config.classes:
            raise Invalid(f"There is no class {name[:60]!r}. Classes: {', '.join(self.config.classes)}.")
        return self.config.classes.index(name)


def row(inputs: Inputs, name: str, count: int, width: int, device: torch.device) -> Tensor:
    """(count, width) of a row parameter, zeros where no row has it."""
    value = inputs.row(name)
    return torch.zeros(count, width, device=device) if value is None else value.float().flatten(1)


def move(x: Tensor, d: Tensor, norm: Norm) -> Tensor:
    """|x| (x / |x| + d), rescaled to |x| if norm is "unit"; a condition of zeros stays what it is. x, d (B, ...)."""
    shape = (-1, *[1] * (x.ndim - 1))
    length = x.flatten(1).norm(dim=1).reshape(shape)
    moved = x / length.clamp_min(1e-12) + d
    if norm == "unit":
        moved = F.normalize(moved.flatten(1), dim=-1).reshape(x.shape)
    return torch.where(length > 0, length * moved, x)
