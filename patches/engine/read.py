"""Read activations of a model at its sites: `with record(model, ["model.layers.3"]) as acts`, or `upto` in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from patches.engine.weights import module_at


@contextmanager
def record(
    model: nn.Module,
    sites: Iterable[str],
    where: Literal["input", "output"] = "output",
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[dict[str, list[Tensor]]]:
    """Record activations at sites: yields site -> list of detached (B, ...) tensors, one per forward.

    keep: reduces each tensor before it is stored (a norm, some columns), so that long runs fit in memory. Edits that
    were applied before are included. Raises PatchError, suggesting near sites, for a site that does not exist.
    """
    acts: dict[str, list[Tensor]] = {site: [] for site in sites}

    def store(site: str, x: Any) -> None:
        x = (x[0] if isinstance(x, tuple) else x).detach()
        acts[site].append(keep(x) if keep else x)

    handles = []
    try:
        for site in acts:
            module = module_at(model, site)
            if where == "input":
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, a, kw, site=site: store(site, a[0] if a else kw["hidden_states"]), with_kwargs=True
                    )
                )
            else:
                handles.append(module.register_forward_hook(lambda _, __, out, site=site: store(site, out)))
        yield acts
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """Raised to stop a forward after its last recorded site."""


def upto(model: nn.Module, sites: Sequence[str], **inputs: Any) -> dict[str, Tensor]:
    """Return the outputs (B, ...) of `sites` in one forward on `inputs`, detached.

    The forward stops at the last of `sites`, so later layers cost nothing; list them in the order in which they run.
    """

    def stop(*_: Any) -> None:
        raise _Enough

    with record(model, sites) as acts:
        handle = module_at(model, sites[-1]).register_forward_hook(stop)  # runs after the recording hook
        try:
            model(**inputs)
        except _Enough:
            pass
        finally:
            handle.remove()
    return {site: x[0] for site, x in acts.items()}
