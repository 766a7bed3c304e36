"""Suppress the attention-sink circuit of a decoder language model on repeated tokens.

Three edits, alone or combined (Yona et al., arXiv 2503.08908):
- **neurons**: the paper's patch. At every token but the first of its row, the named MLP neurons are set to zero, to a
  value, or clipped, so that only the true first token can become an attention sink. `only_repeats` (ours) restricts
  this to tokens that equal their predecessor.
- **damping**: ours. In the named layers' attention, the logit of key j for query i gets b_ij = -log max(1, c_ij /
  limit), with c_ij the number of tokens at positions <= i that equal token j. However often a token is repeated, its
  copies together weigh at most as much as `limit` copies; this removes the premise of the paper's Theorem 4.1 (the
  output of the first attention layer on n repeats tends to that of the token alone).
- **run damping**: ours. The same with c_ij the copies in the unbroken run that key j belongs to. Ordinary text has no
  runs and is unchanged bit for bit, so later layers may be damped too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patches.engine.edits import Act, Bias, Edit, Inputs, Weight
from patches.engine.patch import Patch
from patches.families import llm
from registry.config import STRICT
from registry.errors import PatchError


@dataclass(frozen=True)
class SinkConfig:
    """Config of a sink edit: which neurons to suppress and how, and which layers' attention to damp."""

    __pydantic_config__ = STRICT

    neurons: tuple[tuple[int, int], ...] = ()
    """Suppressed neurons as (layer, neuron), 0-based"""
    mode: Literal["zero", "clip", "mean"] = "zero"
    """New activation of a neuron: 0 (zero), clipped to +-value (clip), or value (mean); values are the tensor
    `value`"""
    keep_first: bool = True
    """Spare the first real token of each row; False is a control, which destroys the model"""
    only_repeats: bool = False
    """Edit a token only where it equals its predecessor; ordinary text has almost none, so it is nearly unchanged"""
    damp_layers: tuple[int, ...] = ()
    """Layers whose attention is damped by all copies of a token"""
    damp_limit: float = 8.0
    """Number of copies of one token that may weigh in full"""
    run_layers: tuple[int, ...] = ()
    """Layers whose attention is damped by runs, disjoint from damp_layers"""
    run_limit: float = 16.0
    """Number of copies within one run that may weigh in full"""


@dataclass(frozen=True)
class SinkEdit(Patch):
    """Patch that suppresses the attention sink on repeats.

    tensors: value (len(neurons),) float, absent for mode zero.
    """

    Config = SinkConfig
    config: SinkConfig

    def edits(self) -> list[Edit]:
        c = self.config
        if not c.neurons and not c.damp_layers and not c.run_layers:
            raise PatchError("This sink patch names no neuron and damps no layer; it would do nothing.")
        out: list[Edit] = []
        for layers, copies, limit in (
            (c.damp_layers, llm.real_tokens, c.damp_limit), (c.run_layers, llm.runs, c.run_limit)
        ):  # fmt: skip
            damping = _damping(copies, limit)
            out += [Bias(llm.site("attn", layer), damping) for layer in layers]
        for layer in sorted({layer for layer, _ in c.neurons}):
            out.append(Act(llm.site("neurons", layer), self._silence(layer), "input"))
        return out

    def weights(self) -> list[Weight]:
        """Return the weight form of the control that zeroes at every token; all else depends on position or tokens."""
        c = self.config
        if c.keep_first or c.only_repeats or c.damp_layers or c.run_layers or c.mode != "zero":
            raise PatchError(
                "A sink patch that spares the first token or damps repeats depends on the tokens, so no weights can "
                "hold it; serve it with hooks (it costs about nothing)."
            )

        def fold(js: list[int]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
            def fn(p: dict[str, Tensor]) -> dict[str, Tensor]:
                w = p["weight"].clone()
                w[:, js] = 0
                return {"weight": w}

            return fn

        layers = sorted({layer for layer, _ in c.neurons})
        return [Weight(llm.site("neurons", at), fold([j for layer, j in c.neurons if layer == at])) for at in layers]

    def _silence(self, layer: int) -> Callable[[Tensor, Inputs], Tensor]:
        c = self.config
        which = [n for n, (at, _) in enumerate(c.neurons) if at == layer]
        js = [c.neurons[n][1] for n in which]
        value = self.tensors["value"][which] if c.mode != "zero" else None

        def fn(a: Tensor, inputs: Inputs) -> Tensor:  # a (B, T, m): activations of all neurons
            old = a[..., js]
            if value is None:
                new = torch.zeros_like(old)
            elif c.mode == "clip":
                new = torch.minimum(torch.maximum(old, -value.to(old)), value.to(old))
            else:
                new = value.to(old).expand_as(old)
            if c.keep_first:
                new = torch.where(inputs.once(llm.first_token)[..., None], old, new)
            if c.only_repeats:
                new = torch.where(inputs.once(llm.repeated_token)[..., None], new, old)
            out = a.clone()
            out[..., js] = new
            return out

        return fn

    def __post_init__(self) -> None:
        if self.config.mode != "zero" and (
            "value" not in self.tensors or self.tensors["value"].shape != (len(self.config.neurons),)
        ):
            raise PatchError(f"mode={self.config.mode!r} needs a tensor 'value' with one number per neuron.")


def _damping(copies: Callable[[Inputs], Tensor], limit: float) -> Callable[[Inputs], Tensor | None]:
    """Build the attention bias shared by all layers of one kind, computed once per forward.

    copies: key identities (B, K), equal for copies.
    """

    def bias(inputs: Inputs) -> Tensor | None:
        return repeat_bias(inputs.once(copies), inputs.once(llm.query_columns), limit)

    return lambda inputs: inputs.once_here(bias)


def repeat_bias(ids: Tensor, at: Tensor, limit: float) -> Tensor | None:
    """Compute the logit bias (B, 1, T, K) of repeated keys; None if no token occurs more than `limit` times.

    ids (B, K): token of every key, -1 for none. at (B, T): key column of each query. Only tokens that occur more than
    `limit` times matter, so the bias has rank H, their number: b_ij = -sum_h log max(1, c_h(i)/limit) [id_j = h].
    """
    B = ids.shape[0]
    # one histogram for all rows: token t of row b is counted in cell b*V + t, padding in the last cell
    V = int(ids.max()) + 1
    cells = torch.where(ids >= 0, ids + torch.arange(B, device=ids.device)[:, None] * V, B * V)
    hot = (torch.bincount(cells.reshape(-1), minlength=B * V + 1)[:-1] > limit).nonzero()[:, 0]
    if not len(hot):
        return None
    row, token = hot // V, hot % V
    table = ids.new_full((B, int(torch.bincount(row).max())), -2)  # (B, H): each row's frequent tokens, padded with -2
    table[row, torch.arange(len(hot), device=ids.device) - torch.searchsorted(row, row)] = token
    equal = (ids[:, None, :] == table[:, :, None]).float()  # (B, H, K)
    seen = equal.cumsum(-1).gather(-1, at[:, None, :].expand(-1, table.shape[1], -1))  # (B, H, T): copies so far
    return -torch.einsum("bht,bhk->btk", (seen / limit).clamp_min(1.0).log(), equal)[:, None]


def describe(config: SinkConfig) -> dict[str, Any]:
    """Summarise the patch for people and tags."""
    return {
        "op": "sink",
        "neurons": ", ".join(f"{layer}.{j}" for layer, j in config.neurons) or "none",
        "damping": f"layers {list(config.damp_layers)}, limit {config.damp_limit:g}" if config.damp_layers else "none",
        "run damping": f"layers {list(config.run_layers)}, limit {config.run_limit:g}" if config.run_layers else "none",
    }
