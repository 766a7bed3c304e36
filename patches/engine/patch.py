"""A patch is a value: a config, fitted tensors, and the edits they make to a base model.

`apply` puts any number of patches ("arms") on one copy of a base; each row of a batch names the arm it
wants, and only the rows that use an arm pay for it. Reverting restores what was saved; it never computes
an inverse. Everything that belongs to one call (its inputs, which row wants which arm) lives in a
ContextVar, so threads cannot give each other the wrong arm.
Shapes: B batch rows, T tokens, K keys, D width, "..." whatever the site carries after B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, final

import torch
from torch import Tensor, nn

from registry.errors import PatchError

V = TypeVar("V")
ONLY = "patch"
"""name of the arm when a single patch is applied by itself"""


class Inputs(Mapping[str, Any]):
    """Keyword inputs of the base's current forward, as the rows of one arm see them, and `past_length`. Read only."""

    def __init__(self, kwargs: Mapping[str, Any], previous: Inputs | None = None) -> None:
        self.kwargs, self.previous = kwargs, previous
        self.memo: dict[Any, Any] = {}
        self.at: Tensor | slice | None = None
        """the rows of the batch these inputs are narrowed to; None: all"""

    def __getitem__(self, key: str) -> Any:
        return self.kwargs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kwargs)

    def __len__(self) -> int:
        return len(self.kwargs)

    def once(self, derive: Callable[[Inputs], Tensor]) -> Tensor:
        """derive(inputs of all rows) (B, ...), computed once per forward however many ask, narrowed to these rows."""
        if derive not in self.memo:
            whole = Inputs(self.kwargs)
            whole.memo = self.memo
            self.memo[derive] = derive(whole)
        value: Tensor = self.memo[derive]
        return value if self.at is None else value[self.at]

    def once_here(self, derive: Callable[[Inputs], V]) -> V:
        """derive(these inputs), computed once per forward and set of rows, for a patch that asks at many sites."""
        key = (derive, id(self.at))
        if key not in self.memo:
            self.memo[key] = derive(self)
        value: V = self.memo[key]
        return value

    def narrow(self, at: Tensor | slice | None) -> Inputs:
        if at is None:
            return self
        out = Inputs(self.kwargs)
        out.memo, out.at = self.memo, at
        return out


@dataclass(frozen=True)
class Act:
    """Rewrite the activation entering or leaving the module at `site`: fn(x (B, ...), inputs) -> (B, ...)."""

    site: str
    fn: Callable[[Tensor, Inputs], Tensor]
    where: Literal["input", "output"] = "output"


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


@dataclass(frozen=True)
class Weight:
    """Replace parameters of the module at `site`: fn({"weight": W, ...}) -> the ones that change."""

    site: str
    fn: Callable[[dict[str, Tensor]], dict[str, Tensor]]


Edit = Act | Bias | Side | Weight


@dataclass(frozen=True)
class Patch(ABC):
    """A mechanism: subclasses give `Config` and `edits`, and nothing about hooks, rows or files."""

    Config: ClassVar[type[Any]]
    config: Any
    tensors: Mapping[str, Tensor]

    @abstractmethod
    def edits(self) -> Sequence[Edit]:
        """What this patch does to the base, in order."""

    def weights(self) -> Sequence[Weight]:
        """The same patch as weight edits alone, where the maths allows it."""
        edits = self.edits()
        weights = [e for e in edits if isinstance(e, Weight)]
        if weights and len(weights) == len(edits):
            return weights
        raise PatchError(f"{type(self).__name__} has no weight form, so it cannot be folded; serve it with hooks.")

    @final
    def apply(self, model: nn.Module, strength: float = 1.0, root: str = "") -> Applied:
        """This patch alone on `model`, for every row unless `rows` says otherwise. Undo with `revert` or `with`."""
        return apply(model, {ONLY: self}, strength, root)

    @final
    def fold(self, model: nn.Module, strength: float = 1.0) -> nn.Module:
        """A copy of the base with the patch in its weights: no hooks, so it exports and compiles.

        Costs the memory of a second base. Raises PatchError if the base carries hooks of ours.
        """
        if any(getattr(p, "_edits", None) for p in model.parameters()) or vars(model).get("_applied"):
            raise PatchError("This base carries an applied patch; revert it before folding another.")
        weights, out = self.weights(), deepcopy(model)
        for e in weights:
            _put_weight(_module(out, e.site), e, strength)
        return out

    def to(self, device: torch.device | str) -> Patch:
        """The same patch with its tensors on `device`."""
        return type(self)(self.config, {k: v.to(device) for k, v in self.tensors.items()})


@dataclass(frozen=True)
class Group:
    """The rows of one call that use one arm."""

    arm: str
    at: Tensor | slice | None
    """None: every row"""
    strength: Tensor | float
    """a number, or (rows of the group,)"""


_INPUTS: ContextVar[Inputs | None] = ContextVar("inputs of the current forward", default=None)
_GROUPS: ContextVar[Mapping[int, tuple[int, tuple[Group, ...]]]] = ContextVar("rows of each Applied", default={})  # noqa: B039


@dataclass
class Applied:
    """Patches on a model: the one mutable object. `rows` chooses per call, `revert` takes everything off."""

    model: nn.Module
    strength: float
    arms: dict[str, dict[tuple[str, str], Act | Bias | Side]] = field(default_factory=dict)
    """arm -> (site, kind) -> edit; replaced whole when arms come and go, never changed in place"""
    hooked: set[tuple[str, str]] = field(default_factory=set)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(arm, site) -> forwards in which the edit ran"""
    undo: list[Callable[[], Any]] = field(default_factory=list)

    def revert(self) -> None:
        """Take off what this application put on, last first. Raises PatchError if a later patch is in the way."""
        while self.undo:
            self.undo[-1]()  # stays on the stack if it refuses, so revert can be tried again
            self.undo.pop()
        self.arms, self.hooked = {}, set()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()

    def add(self, name: str, patch: Patch) -> None:
        """One more arm. Calls in flight keep the arms they started with. Raises PatchError, changing nothing."""
        edits = list(patch.edits())
        if any(isinstance(e, Weight) for e in edits):
            raise PatchError(
                f"{type(patch).__name__} edits weights, and rows of one batch share the weights: "
                "apply it alone, or fold it and serve the copy."
            )
        if name in self.arms:
            raise PatchError(f"There is an arm {name!r} already; remove it first.")
        depth = len(self.undo)
        table: dict[tuple[str, str], Act | Bias | Side] = {}
        try:
            for e in edits:
                assert not isinstance(e, Weight)
                key = (e.site, e.where if isinstance(e, Act) else type(e).__name__.lower())
                if key in table:
                    raise PatchError(f"{type(patch).__name__} edits {key} twice; make it one edit.")
                table[key] = e
                if key not in self.hooked:
                    self.undo.append(self._hook(*key))
                    self.hooked = self.hooked | {key}
        except BaseException:
            while len(self.undo) > depth:
                self.undo.pop()()
            raise
        self.arms = {**self.arms, name: table}

    def remove(self, name: str) -> None:
        """One arm less; hooks that no arm uses any more stay until `revert` and cost nothing."""
        self.arms = {k: v for k, v in self.arms.items() if k != name}

    @contextmanager
    def rows(self, names: Sequence[str | None], strength: Sequence[float] | None = None) -> Iterator[None]:
        """Within this block and this thread, row i of a batch uses arm names[i] (None: the base).

        A batch may hold k times as many rows (beams): each name then stands for k neighbours.
        """
        table: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            if name is not None and (strength is None or strength[i] != 0.0):
                table.setdefault(name, []).append(i)
        if unknown := table.keys() - self.arms.keys():
            raise PatchError(f"There is no arm {sorted(unknown)[0]!r}. Arms: {', '.join(self.arms) or 'none'}.")
        groups = tuple(Group(name, _span(rows, len(names)), _strengths(rows, strength)) for name, rows in table.items())
        token = _GROUPS.set({**_GROUPS.get(), id(self): (len(names), groups)})
        try:
            yield
        finally:
            _GROUPS.reset(token)

    def unreached(self) -> list[str]:
        """Sites of arms that no forward has passed through: a patch that does nothing where it was meant to."""
        return sorted({f"{arm}:{site}" for arm, t in self.arms.items() for site, _ in t if not self.calls[arm, site]})

    def _groups(self, batch: int) -> tuple[Group, ...]:
        if id(self) not in _GROUPS.get():
            # a patch applied by itself means every row; several arms mean nobody until rows are named
            return (Group(ONLY, None, self.strength),) if self.strength and ONLY in self.arms else ()
        count, groups = _GROUPS.get()[id(self)]
        if count == batch or not groups:
            return groups
        beams, rest = divmod(batch, count)
        if rest:
            raise PatchError(f"rows names {count} rows, but the batch has {batch}; name every row once.")
        return tuple(Group(g.arm, _beams(g.at, beams), _repeat(g.strength, beams)) for g in groups)

    def _hook(self, site: str, kind: str) -> Callable[[], Any]:
        module = _module(self.model, site)
        key = (site, kind)
        if kind == "bias":

            def bias(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                total = self._bias(key, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
                if total is None:
                    return None
                return args, {**kwargs, "attention_mask": _add_bias(kwargs.get("attention_mask"), total)}

            return module.register_forward_pre_hook(bias, with_kwargs=True).remove
        if kind == "side":

            def side(_: nn.Module, args: Any, out: Any) -> Any:
                if isinstance(out, tuple):
                    return (self._side(key, args[0], out[0]), *out[1:])
                return self._side(key, args[0], out)

            return module.register_forward_hook(side).remove
        if kind == "input":

            def before(_: nn.Module, args: Any) -> Any:
                return (self._act(key, args[0]), *args[1:])

            return module.register_forward_pre_hook(before).remove

        def after(_: nn.Module, __: Any, out: Any) -> Any:
            return (self._act(key, out[0]), *out[1:]) if isinstance(out, tuple) else self._act(key, out)

        return module.register_forward_hook(after).remove

    def _act(self, key: tuple[str, str], x: Tensor) -> Tensor:
        out = x
        for group in self._groups(x.shape[0]):
            edit = self.arms.get(group.arm, {}).get(key)
            if not isinstance(edit, Act):
                continue
            self.calls[group.arm, key[0]] += 1
            part = x if group.at is None else x[group.at]
            new = edit.fn(part, self._inputs().narrow(group.at))
            if isinstance(group.strength, Tensor) or group.strength != 1.0:
                new = part + _shaped(group.strength, x) * (new - part)
            if group.at is None:
                out = new
                continue
            if out is x:
                out = x.clone()
            out[group.at] = new
        return out

    def _side(self, key: tuple[str, str], x: Tensor, y: Tensor) -> Tensor:
        out = y
        for group in self._groups(x.shape[0]):
            edit = self.arms.get(group.arm, {}).get(key)
            if not isinstance(edit, Side):
                continue
            self.calls[group.arm, key[0]] += 1
            part = x if group.at is None else x[group.at]
            more = _shaped(group.strength, y) * edit.fn(part, self._inputs().narrow(group.at))
            if group.at is None:
                out = y + more
                continue
            if out is y:
                out = y.clone()
            out[group.at] += more
        return out

    def _bias(self, key: tuple[str, str], x: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for group in self._groups(x.shape[0]):
            edit = self.arms.get(group.arm, {}).get(key)
            if not isinstance(edit, Bias):
                continue
            self.calls[group.arm, key[0]] += 1
            new = edit.fn(self._inputs().narrow(group.at))
            if new is None:
                continue
            new = new.to(x.dtype) * _shaped(group.strength, new)
            if group.at is None:
                return new
            if total is None:
                total = x.new_zeros(x.shape[0], *new.shape[1:])
            total[group.at] = new
        return total

    @staticmethod
    def _inputs() -> Inputs:
        inputs = _INPUTS.get()
        if inputs is None:
            raise PatchError("The base was called below its root, so its inputs are unknown; call the model itself.")
        return inputs


def apply(model: nn.Module, arms: Mapping[str, Patch], strength: float = 1.0, root: str = "") -> Applied:
    """Put patches on one copy of `model`; if one edit fails, all are undone.

    `root`: the module whose keyword inputs the edits read ("" for the model itself). A single arm called "patch"
    holds for every row with `strength`; otherwise `rows` says who gets what. Weight edits need a single arm.
    """
    on = Applied(model, strength)
    top = _module(model, root)

    def enter(_: nn.Module, __: Any, kwargs: Mapping[str, Any]) -> None:
        # a cache grows while the forward runs, so how long it was has to be read here
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        _INPUTS.set(Inputs({**kwargs, "past_length": past}, _INPUTS.get()))

    def leave(*_: Any) -> None:
        current = _INPUTS.get()
        _INPUTS.set(current.previous if current else None)

    on.undo.append(top.register_forward_pre_hook(enter, with_kwargs=True).remove)
    on.undo.append(top.register_forward_hook(leave, always_call=True).remove)
    vars(model)["_applied"] = vars(model).get("_applied", 0) + 1
    on.undo.append(lambda: vars(model).update(_applied=vars(model)["_applied"] - 1))
    try:
        for name, patch in arms.items():
            edits = list(patch.edits())
            weights = [e for e in edits if isinstance(e, Weight)]
            if not weights:
                on.add(name, patch)
                continue
            if len(arms) > 1 or len(weights) != len(edits):
                raise PatchError(
                    f"{type(patch).__name__} edits weights, and rows of one batch share the weights: "
                    "apply it alone, or fold it and serve the copy."
                )
            for e in weights:
                on.undo.append(_put_weight(_module(model, e.site), e, strength))
    except BaseException:
        on.revert()
        raise
    return on


@torch.no_grad()
def _put_weight(m: nn.Module, e: Weight, strength: float) -> Callable[[], Any]:
    """Write the edit, return what restores it. Keeps a copy of every parameter it changes."""
    old = {n: p.detach().clone() for n, p in m.named_parameters(recurse=False)}
    new = e.fn(old)
    token = object()
    for n, w in new.items():
        m.get_parameter(n).copy_(w if strength == 1.0 else old[n] + strength * (w - old[n]))
        vars(m.get_parameter(n)).setdefault("_edits", []).append(token)
    kept = {n: old[n] for n in new}

    @torch.no_grad()
    def undo() -> None:
        if any(vars(m.get_parameter(n))["_edits"][-1] is not token for n in kept):
            raise PatchError(f"{e.site} was patched again after this patch; revert the later patch first.")
        for n, w in kept.items():
            m.get_parameter(n).copy_(w)
            vars(m.get_parameter(n))["_edits"].pop()

    return undo


def _module(model: nn.Module, site: str) -> nn.Module:
    try:
        return model.get_submodule(site)
    except AttributeError:
        near = [n for n, _ in model.named_modules() if n.endswith("." + site.split(".")[-1])][:3]
        raise PatchError(
            f"{type(model).__name__} has no site {site!r}. Sites with that ending: {near or 'none'}."
        ) from None


def _add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An additive mask (B, h, T, K) from what the attention would have used and the bias."""
    T, K = bias.shape[-2:]
    lowest = torch.finfo(bias.dtype).min
    if mask is None:  # the attention would have used its causal flag; queries are the last T of K keys
        if T == 1:
            return bias
        future = torch.ones(T, K, dtype=torch.bool, device=bias.device).triu(K - T + 1)
        return bias.masked_fill(future, lowest)
    if mask.shape[-1] > K:  # a cache with room to spare
        bias = nn.functional.pad(bias, (0, mask.shape[-1] - K))
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, lowest)
    # clamp: two very negative numbers must not become -inf, or a fully masked row turns into NaN
    return (mask + bias).clamp_min(lowest)


def _span(rows: list[int], count: int) -> Tensor | slice | None:
    """Neighbouring rows as a slice (a view, no gather); None for all of them."""
    if len(rows) == count:
        return None
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def _strengths(rows: list[int], strength: Sequence[float] | None) -> Tensor | float:
    if strength is None:
        return 1.0
    used = [float(strength[i]) for i in rows]
    return used[0] if len(set(used)) == 1 else torch.tensor(used)


def _shaped(strength: Tensor | float, x: Tensor) -> Any:
    """The strength so that it multiplies x (rows, ...)."""
    return strength.to(x).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(strength, Tensor) else strength


def _beams(at: Tensor | slice | None, k: int) -> Tensor | slice | None:
    if isinstance(at, slice):
        return slice(at.start * k, at.stop * k)
    if at is None:
        return None
    return (at[:, None] * k + torch.arange(k)).reshape(-1)


def _repeat(strength: Tensor | float, k: int) -> Tensor | float:
    return strength.repeat_interleave(k) if isinstance(strength, Tensor) else strength
