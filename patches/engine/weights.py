"""Write weight edits into modules, and restore the replaced parameters bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from patches.engine.edits import Weight
from registry.errors import PatchError


@torch.no_grad()
def put_weight(m: nn.Module, e: Weight, strength: float) -> Callable[[], Any]:
    """Write a weight edit into a module at a strength; return the function that restores the original parameters."""
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


def module_at(model: nn.Module, site: str) -> nn.Module:
    """Return the module at a dotted path ("" for the model).

    Raises PatchError, suggesting near paths, if there is none.
    """
    try:
        return model.get_submodule(site)
    except AttributeError:
        near = [n for n, _ in model.named_modules() if n.endswith("." + site.split(".")[-1])][:3]
        raise PatchError(
            f"{type(model).__name__} has no site {site!r}. Sites with that ending: {near or 'none'}."
        ) from None
