"""Apply patches to a base model: a patch is a value of a config, fitted tensors and the edits they define.

`apply` puts any number of patches ("arms") on one copy of a base; each row of a batch names its arm, and only rows that
use an arm pay for it. Reverting restores what was saved; it never computes an inverse. The state of one call (its
inputs, which row uses which arm) lives in a ContextVar, so concurrent threads cannot mix up arms. Shapes: B batch rows,
T tokens, K keys, D width, "..." whatever the site's tensor has after B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from patches.engine.edits import Act, Bias, Edit, Inputs, Side, Weight
from patches.engine.rows import Group, add_bias, shaped, span, strengths
from patches.engine.weights import module_at, put_weight
from registry.errors import Invalid, PatchError

ONLY = "patch"
"""Name of the arm when a single patch is applied by itself"""


@dataclass(frozen=True)
class Patch(ABC):
    """Abstract mechanism: subclasses define `Config` and `edits`, and deal with no hooks, rows or files."""

    Config: ClassVar[type[Any]]
    Ask: ClassVar[type[BaseModel] | None] = None
    """Model of what a request may send to this mechanism; None: nothing"""
    config: Any
    tensors: Mapping[str, Tensor]
    """Fitted tensors by name"""

    @abstractmethod
    def edits(self) -> Sequence[Edit]:
        """Return this patch's edits of the base, in order."""

    def weights(self) -> Sequence[Weight]:
        """Return the patch as weight edits alone. Raises PatchError if it has no such form."""
        edits = self.edits()
        weights = [e for e in edits if isinstance(e, Weight)]
        if weights and len(weights) == len(edits):
            return weights
        raise PatchError(f"{type(self).__name__} has no weight form, so it cannot be folded; serve it with hooks.")

    def params(self, ask: Any, base: Any) -> dict[str, Tensor]:
        """Convert a validated `Ask` into row parameters for rows on `base` (a Base).

        Raises Invalid if this mechanism takes none.
        """
        del ask, base
        raise Invalid(f"{type(self).__name__} takes nothing from a request; leave `ask` out.")

    def prepare(self, job: Any, ask: Any, base: Any, run: Callable[[Sequence[Any]], Any]) -> None:
        """Set `job.params` from a validated `ask`; override it if the parameters need forwards of the model first.

        run: decodes, embeds or denoises further jobs on the same worker and waits for them.
        """
        del run
        job.params = self.params(ask, base)

    @final
    def apply(self, model: nn.Module, strength: float = 1.0, root: str = "") -> Applied:
        """Apply this patch alone to `model`, for every row unless `rows` says otherwise.

        Undo with `revert` or `with`.
        """
        return apply(model, {ONLY: self}, strength, root)

    @final
    def fold(self, model: nn.Module, strength: float = 1.0) -> nn.Module:
        """Return a copy of the base with the patch in its weights, without hooks, which can be exported and compiled.

        Needs the memory of a second base. Raises PatchError if a patch is applied to the base, or if this one has no
        weight form.
        """
        if any(getattr(p, "_edits", None) for p in model.parameters()) or vars(model).get("_applied"):
            raise PatchError("This base carries an applied patch; revert it before folding another.")
        weights, out = self.weights(), deepcopy(model)
        for e in weights:
            put_weight(module_at(out, e.site), e, strength)
        return out

    def to(self, device: torch.device | str) -> Patch:
        """Return the patch with its tensors on `device`."""
        return type(self)(self.config, {k: v.to(device) for k, v in self.tensors.items()})


_INPUTS: ContextVar[Inputs | None] = ContextVar("inputs of the current forward", default=None)
_GROUPS: ContextVar[Mapping[int, tuple[int, tuple[Group, ...]]]] = ContextVar("rows of each Applied", default={})  # noqa: B039


@dataclass
class Applied:
    """Patches applied to a model; the only mutable object. `rows` selects arms per call, `revert` removes all."""

    model: nn.Module
    strength: float
    """Strength of a single patch applied by itself"""
    arms: dict[str, dict[tuple[str, str], Act | Bias | Side]] = field(default_factory=dict)
    """Arm -> (site, kind) -> edit; replaced as a whole when arms come and go, so that running calls keep theirs"""
    hooked: set[tuple[str, str]] = field(default_factory=set)
    """(site, kind) of every hook that is registered"""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(arm, site) -> number of forwards in which the edit ran"""
    undo: list[Callable[[], Any]] = field(default_factory=list)
    """What `revert` calls, last first"""

    patches: dict[str, Patch] = field(default_factory=dict)
    """Arm -> its patch"""
    kin: dict[str, Hashable] = field(default_factory=dict)
    """Arm -> what is equal for arms that are alike"""
    copies: dict[tuple[str, torch.device], dict[tuple[str, str], Act | Bias | Side]] = field(default_factory=dict)
    """(arm, device) -> its edits with tensors there, for a base that lies on several devices"""

    @cached_property
    def device(self) -> torch.device | None:
        """Device of the model's first parameters; row parameters are moved there."""
        return next((p.device for p in self.model.parameters()), None)

    @cached_property
    def several(self) -> bool:
        """Whether the model's parameters lie on more than one device."""
        return len({p.device for p in self.model.parameters()}) > 1

    def revert(self) -> None:
        """Remove everything this application added, last first. Raises PatchError if a later patch depends on it."""
        while self.undo:
            self.undo[-1]()  # popped only after success, so that revert can be retried
            self.undo.pop()
        self.arms, self.hooked, self.patches, self.kin, self.copies = {}, set(), {}, {}, {}

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()

    def add(self, name: str, patch: Patch) -> None:
        """Add an arm.

        Running calls keep the arms they started with. Raises PatchError and changes nothing on failure.
        """
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
        alike = [(key, e.alike) for key, e in table.items() if isinstance(e, Act) and e.alike is not None]
        self.kin = {**self.kin, name: tuple(alike) if len(alike) == len(table) else name}
        self.arms, self.patches = {**self.arms, name: table}, {**self.patches, name: patch}

    def remove(self, name: str) -> None:
        """Remove an arm. Its hooks stay until `revert` and cost nothing."""
        self.arms = {k: v for k, v in self.arms.items() if k != name}
        self.patches = {k: v for k, v in self.patches.items() if k != name}
        self.kin = {k: v for k, v in self.kin.items() if k != name}
        self.copies = {k: v for k, v in self.copies.items() if k[0] != name}

    @contextmanager
    def rows(
        self,
        names: Sequence[str | None],
        strength: Sequence[float] | None = None,
        params: Sequence[Mapping[str, Tensor]] | None = None,
        under: Sequence[bool] | None = None,
    ) -> Iterator[None]:
        """Assign arms to batch rows within this block and thread: row i uses arm names[i] (None: the base).

        strength: one per row, default 1. params: row parameters by name, one mapping per row (`Inputs.row`). A batch
        may have k times as many rows (beams, guidance): each name then covers k neighbours. under: whether a row asks
        for what its arm starts from, which is the base and the arm's edits marked `Side.under`. Raises PatchError for
        an unknown arm.
        """
        table: dict[tuple[Hashable, bool], dict[int, str]] = {}
        for i, name in enumerate(names):
            if name is not None and (strength is None or strength[i] != 0.0):
                if name not in self.arms:
                    raise PatchError(f"There is no arm {name!r}. Arms: {', '.join(self.arms) or 'none'}.")
                table.setdefault((self.kin.get(name, name), under is not None and under[i]), {})[i] = name
        said = params if params is not None and any(params) else None
        groups = tuple(
            Group(
                arms[0], span([*rows], len(names)), strengths([*rows], strength),
                tuple(said[i] for i in rows) if said else (), device=self.device, under=below, arms=arms,
            )
            for (_, below), rows in table.items()
            if (arms := tuple(dict.fromkeys(rows.values()))) and (not below or self.founded(arms[0]))
        )  # fmt: skip
        token = _GROUPS.set({**_GROUPS.get(), id(self): (len(names), groups)})
        try:
            yield
        finally:
            _GROUPS.reset(token)

    def founded(self, name: str) -> bool:
        """Whether an arm starts from more than the base: whether it has edits marked `Side.under`."""
        return any(isinstance(e, Side) and e.under for e in self.arms.get(name, {}).values())

    def unreached(self) -> list[str]:
        """List the sites ("arm:site") that no forward has reached: there the patch has no effect."""
        return sorted({f"{arm}:{site}" for arm, t in self.arms.items() for site, _ in t if not self.calls[arm, site]})

    def _groups(self, batch: int) -> tuple[Group, ...]:
        if id(self) not in _GROUPS.get():
            # a single patch covers every row by default; with several arms, rows use the base until they are named
            return (Group(ONLY, None, self.strength),) if self.strength and ONLY in self.arms else ()
        count, groups = _GROUPS.get()[id(self)]
        if count == batch or not groups:
            return groups
        beams, rest = divmod(batch, count)
        if rest:
            raise PatchError(f"rows names {count} rows, but the batch has {batch}; name every row once.")
        return tuple(g.widened(beams) for g in groups)

    def _hook(self, site: str, kind: str) -> Callable[[], Any]:
        module = module_at(self.model, site)
        key = (site, kind)
        if kind == "bias":

            def bias(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                total = self._bias(key, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
                if total is None:
                    return None
                return args, {**kwargs, "attention_mask": add_bias(kwargs.get("attention_mask"), total)}

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
            edit = self._edit(group.arm, key, x)
            if not isinstance(edit, Act) or group.under:
                continue
            for arm in group.arms or (group.arm,):
                self.calls[arm, key[0]] += 1
            if edit.prefill and x.ndim == 3 and x.shape[1] == 1:
                continue
            part = x if group.at is None else x[group.at]
            new = edit.fn(part, self._inputs(x).narrow(group))
            if isinstance(group.strength, Tensor) or group.strength != 1.0:
                new = part + shaped(group.strength, x) * (new - part)
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
            edit = self._edit(group.arm, key, x)
            if not isinstance(edit, Side) or (group.under and not edit.under):
                continue
            self.calls[group.arm, key[0]] += 1
            part = x if group.at is None else x[group.at]
            more = shaped(group.strength, y) * edit.fn(part, self._inputs(x).narrow(group))
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
            edit = self._edit(group.arm, key, x)
            if not isinstance(edit, Bias) or group.under:
                continue
            self.calls[group.arm, key[0]] += 1
            new = edit.fn(self._inputs(x).narrow(group))
            if new is None:
                continue
            new = new.to(x.dtype) * shaped(group.strength, new)
            if group.at is None:
                return new
            if total is None:
                total = x.new_zeros(x.shape[0], *new.shape[1:])
            total[group.at] = new
        return total

    def _edit(self, arm: str, key: tuple[str, str], x: Tensor) -> Act | Bias | Side | None:
        """Return an arm's edit of a site, with its tensors where x lies."""
        edit = self.arms.get(arm, {}).get(key)
        if edit is None or not self.several or x.device == self.device:
            return edit
        at = arm, x.device
        if at not in self.copies:
            edits = zip(self.arms[arm], self.patches[arm].to(x.device).edits(), strict=True)
            self.copies = {**self.copies, at: {k: e for k, e in edits if not isinstance(e, Weight)}}
        return self.copies[at][key]

    def _inputs(self, x: Tensor) -> Inputs:
        inputs = _INPUTS.get()
        if inputs is None:
            raise PatchError("The base was called below its root, so its inputs are unknown; call the model itself.")
        return inputs if not self.several or x.device == self.device else inputs.on(x.device)


def apply(model: nn.Module, arms: Mapping[str, Patch], strength: float = 1.0, root: str = "") -> Applied:
    """Apply patches to one copy of `model`; if any edit fails, all are undone.

    root: the module whose keyword inputs the edits read ("" for the model itself). A single arm called "patch" covers
    every row with `strength`; otherwise `rows` assigns arms. Raises PatchError for several arms with weight edits.
    """
    on = Applied(model, strength)
    top = module_at(model, root)

    def enter(_: nn.Module, __: Any, kwargs: Mapping[str, Any]) -> None:
        # the cache grows during the forward, so its length must be read before
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
            for i, e in enumerate(weights):
                module = module_at(model, e.site)
                if on.several:  # an edit's tensors go where its site is
                    placed = patch.to(next(module.parameters()).device).edits()[i]
                    assert isinstance(placed, Weight)
                    e = placed
                on.undo.append(put_weight(module, e, strength))
    except BaseException:
        on.revert()
        raise
    return on
