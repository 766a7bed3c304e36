"""Edits as values: what a patch changes at one site, and the inputs of the current forward that it may read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from patches.engine.rows import Group

V = TypeVar("V")


class Inputs(Mapping[str, Any]):
    """Keyword inputs of the base's current forward, plus `past_length`, narrowed to the rows of one arm. Read only."""

    def __init__(self, kwargs: Mapping[str, Any], previous: Inputs | None = None) -> None:
        self.kwargs, self.previous = kwargs, previous
        self.memo: dict[Any, Any] = {}
        self.at: Tensor | slice | None = None
        """Rows of the batch to which these inputs are narrowed; None: all"""
        self.group: Group | None = None
        """Strength and row parameters of these rows; None: no row parameters"""
        self.device: torch.device | None = None
        """Where what is read shall lie; None: where it does"""

    def __getitem__(self, key: str) -> Any:
        return self._placed(self.kwargs[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.kwargs)

    def __len__(self) -> int:
        return len(self.kwargs)

    def once(self, derive: Callable[[Inputs], Tensor]) -> Tensor:
        """Return derive(inputs of all rows) (B, ...), narrowed to these rows; computed once per forward."""
        if derive not in self.memo:
            whole = Inputs(self.kwargs)
            whole.memo = self.memo
            self.memo[derive] = derive(whole)
        value: Tensor = self.memo[derive]
        return self._placed(value if self.at is None else value[self.at])

    def once_here(self, derive: Callable[[Inputs], V]) -> V:
        """Return derive(these inputs), computed once per forward and set of rows, for patches that edit many sites."""
        key = (derive, id(self.at), self.device)
        if key not in self.memo:
            self.memo[key] = derive(self)
        value: V = self.memo[key]
        return value

    def row(self, name: str) -> Tensor | None:
        """Return row parameter `name` of these rows (rows, ...); None if no row has it.

        Parameters are stacked once per call. Different lengths are padded with zeros to the longest, and a row without
        the parameter gets zeros. So a parameter is best a list in which zero means "none".
        """
        return None if self.group is None else self._placed(self.group.parameter(name))

    def narrow(self, group: Group) -> Inputs:
        """Return these inputs narrowed to the rows of `group`."""
        if group.at is None and not group.params:
            return self
        out = Inputs(self.kwargs)
        out.memo, out.at, out.group, out.device = self.memo, group.at, group, self.device
        return out

    def on(self, device: torch.device) -> Inputs:
        """Return these inputs as read on another device, for a base that lies on several."""
        out = Inputs(self.kwargs)
        out.memo, out.at, out.group, out.device = self.memo, self.at, self.group, device
        return out

    def _placed(self, value: Any) -> Any:
        return value if self.device is None or not isinstance(value, Tensor) else value.to(self.device)


@dataclass(frozen=True)
class Act:
    """Rewrite the activation entering or leaving the module at `site`: fn(x (B, ...), inputs) -> (B, ...)."""

    site: str
    fn: Callable[[Tensor, Inputs], Tensor]
    where: Literal["input", "output"] = "output"
    alike: Hashable = None
    """edits of a site for which this is equal do the same to a row with the same parameters; rows of arms all of whose
    edits are alike go through them in one call. None: an arm's rows go by themselves"""
    prefill: bool = False
    """whether it changes nothing where one token (B, 1, D) of each row comes through"""


@dataclass(frozen=True)
class Bias:
    """Add to the attention logits of the module at `site`: fn(inputs) -> (B, 1 or heads, T, K), None for nothing.

    The module must take the keyword `attention_mask`, additive or boolean (B or 1, 1, T, K), or None for causal.
    """

    site: str
    fn: Callable[[Inputs], Tensor | None]


@dataclass(frozen=True)
class Side:
    """Add to what leaves the module at `site`: fn(what enters it (B, ...), inputs) -> (B, ...) like its output.

    A low-rank weight edit in the form that rows of one batch can differ in: fn = lambda x, _: (x @ A.T) @ B.T.
    """

    site: str
    fn: Callable[[Tensor, Inputs], Tensor]
    under: bool = False
    """part of the model that the patch's other edits are made on: rows that ask for what the patch starts from
    (`Applied.rows`) go through it too"""


@dataclass(frozen=True)
class Weight:
    """Replace parameters of the module at `site`: fn({"weight": W, ...}) -> the ones that change."""

    site: str
    fn: Callable[[dict[str, Tensor]], dict[str, Tensor]]


Edit = Act | Bias | Side | Weight
