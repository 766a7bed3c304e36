"""Find the attention-sink circuit: layers that raise the first token's norm, their neurons, and what binds the sink."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from patches.engine.read import record, upto
from patches.families import llm
from patches.families.base import Base
from patches.mechanisms.sink import SinkConfig, SinkEdit
from training.data import text

RISE = 2.0
"""A stage multiplies the first token's residual norm by at least this much within one layer"""
ABOVE = 2.5
"""Smallest ratio of the first token's norm to the mean norm of other tokens, after a stage"""


@dataclass(frozen=True)
class Circuit:
    """An attention-sink circuit: what binds the sink, the neurons that create it, and residual norms per layer."""

    bound_to: Literal["position", "bos", "none"]
    """What makes a token a sink: being first, or being the BOS token; none: the model has no sink"""
    stages: tuple[tuple[tuple[int, int], ...], ...]
    """Neurons (layer, neuron) of each stage, a run of neighbouring layers, strongest first"""
    first_norms: tuple[float, ...]
    """Residual norm of the first token after each layer"""
    other_norms: tuple[float, ...]
    """Mean residual norm of all other tokens after each layer"""
    repeat_norms: tuple[float, ...]
    """Residual norm of the last of many repeats after each layer, median over words"""
    bos_norms: tuple[float, ...]
    """Mean norm of a BOS token in the middle of a text; empty if the tokenizer has none"""
    plain_norms: tuple[float, ...]
    """Norm of an ordinary first token, without BOS"""
    echoes: tuple[tuple[int, int], ...] = ()
    """Neurons in the stages' layers that fire on repeats once the sink is silenced. Ordinary text needs them, so they
    may only be silenced at repeats"""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Circuit:
        """Read a circuit back from sealed evidence."""
        stages = tuple(tuple((int(layer), int(j)) for layer, j in stage) for stage in found["stages"])
        return cls(**{**found, "stages": stages, "echoes": tuple((a, b) for a, b in found.get("echoes", ()))})

    @property
    def neurons(self) -> tuple[tuple[int, int], ...]:
        return tuple(n for stage in self.stages for n in stage)


@torch.inference_mode()
def find(base: Base, words: Iterable[int], copies: int = 500, documents: int = 12) -> Circuit:
    """Find the sink stages and neurons of a decoder from its activations; the model is left unchanged.

    words: token ids to repeat; copies: how often.
    """
    layers = base.model.config.num_hidden_layers
    docs = text.documents("prose", base.processor, documents, 80)
    norms = residual_norms(base, docs)  # (layers, T) for each document
    first = torch.stack([n[:, 0] for n in norms]).mean(0)
    others = torch.cat([n[:, 1:] for n in norms], 1).mean(1)
    bos = base.processor.bos_token_id
    lead = [bos] if bos is not None else []
    repeats = [torch.tensor([*lead, *[w] * copies]) for w in words]
    repeated = torch.stack([n[:, -1] for n in residual_norms(base, repeats)]).median(0).values
    plain = torch.stack([n[:, 0] for n in residual_norms(base, [d[len(lead) :] for d in docs])]).mean(0)
    middle = (
        torch.stack([n[:, 20] for n in residual_norms(base, [torch.cat([d[1:21], d[:1], d[21:]]) for d in docs])]).mean(
            0
        )
        if bos is not None
        else torch.zeros(0)
    )
    top = int((first / others)[: layers - 1].argmax())
    if first[top] < ABOVE * others[top]:
        bound: Literal["position", "bos", "none"] = "none"
    else:
        bound = "bos" if plain[top] < 0.5 * first[top] else "position"
    known = Circuit(bound, (), _floats(first), _floats(others), _floats(repeated), _floats(middle), _floats(plain))
    if bound != "position":
        return known
    before = torch.cat([_embedding_norm(base, docs)[None], first[:-1]])
    rising = [i for i in range(layers - 1) if first[i] > RISE * before[i] and first[i] > ABOVE * others[i]]
    found = [_neurons(base, group, docs, repeats, others) for group in _neighbours(rising)]
    return replace(
        known, stages=tuple(s for s, _ in found if s), echoes=tuple(e for s, echoes in found if s for e in echoes)
    )


FIRST, LAST = slice(0, 1), slice(-1, None)
"""Token positions"""


def _neurons(
    base: Base, group: list[int], docs: list[Tensor], repeats: list[Tensor], others: Tensor
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Find the neurons of one stage, and their echoes.

    Candidates are ranked by |activation| x |output weights| and kept if silencing them lowers the norm of repeats.
    """
    end, ordinary = group[-1], float(others[group[-1]])
    scored: list[tuple[float, int, int]] = []
    for layer in group:
        down = base.model.get_submodule(llm.site("neurons", layer)).weight.norm(dim=0).cpu()
        at_first = activations(base, layer, docs, FIRST).abs() * down
        at_last = activations(base, layer, repeats, LAST).abs() * down
        # A sink neuron fires both on the first token and on repeats, so take the smaller score of the two. The floor
        # scales with the residual norm of ordinary tokens.
        both = torch.minimum(at_first.mean(0), at_last.amax(0))
        floor = 0.2 * float(others[layer])
        scored += [(float(both[j]), layer, int(j)) for j in (both > floor).nonzero()[:, 0]]
    candidates = [(layer, j) for _, layer, j in sorted(scored, reverse=True)][:16]

    def height(neurons: list[tuple[int, int]]) -> float:
        """Return the norm of repeats after the stage with these neurons silenced; the word with the largest counts."""
        if not neurons:
            return max(float(n[end, -1]) for n in residual_norms(base, repeats, end))
        with SinkEdit(SinkConfig(neurons=tuple(neurons)), {}).apply(base.model, root=base.root):
            return max(float(n[end, -1]) for n in residual_norms(base, repeats, end))

    start = height([])
    if start < ABOVE * ordinary:
        return (), ()  # repeats do not reach this stage
    chosen: list[tuple[int, int]] = []
    low = start
    for neuron in candidates:  # forward selection, strongest first, until repeats have an ordinary norm
        chosen.append(neuron)
        low = height(chosen)
        if low < 2.0 * ordinary:
            break
    for neuron in list(reversed(chosen)):  # backward elimination: keep a neuron only if the norm rises without it
        rest = [n for n in chosen if n != neuron]
        if rest and height(rest) < max(1.25 * low, 2.0 * ordinary):
            chosen = rest
    if low >= 0.5 * start:
        return (), ()
    echoes: list[tuple[int, int]] = []
    loud = _echoes(base, group, chosen, repeats, others) if low >= 2.0 * ordinary else []
    for neuron in loud:
        if low < 2.0 * ordinary:
            break
        if (now := height([*chosen, *echoes, neuron])) < 0.9 * low:
            echoes, low = [*echoes, neuron], now
    return tuple(chosen), tuple(echoes)


def _echoes(
    base: Base, group: list[int], silent: list[tuple[int, int]], repeats: list[Tensor], others: Tensor
) -> list[tuple[int, int]]:
    """Return the strongest neurons of these layers on repeats while `silent` neurons are silenced, strongest first."""
    scored: list[tuple[float, int, int]] = []
    with SinkEdit(SinkConfig(neurons=tuple(silent)), {}).apply(base.model, root=base.root):
        for layer in group:
            down = base.model.get_submodule(llm.site("neurons", layer)).weight.norm(dim=0).cpu()
            loud = activations(base, layer, repeats, LAST).abs().amax(0) * down
            scored += [(float(loud[j]), layer, int(j)) for j in (loud > 0.2 * float(others[layer])).nonzero()[:, 0]]
    return [(layer, j) for _, layer, j in sorted(scored, reverse=True)][:8]


def _neighbours(layers: list[int]) -> list[list[int]]:
    """Group consecutive layer numbers."""
    out: list[list[int]] = []
    for i in layers:
        if out and i == out[-1][-1] + 1:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def forward(base: Base, ids: Tensor, layer: int | None = None) -> None:
    """Run one text through the model, up to and including `layer`, or all of it."""
    inputs = {"input_ids": ids[None].to(base.device), "use_cache": False}
    if layer is None:
        base.model.get_submodule(base.root)(**inputs)
    else:
        upto(base.model, [llm.site("block", layer)], **inputs)


def residual_norms(base: Base, texts: list[Tensor], last: int | None = None) -> list[Tensor]:
    """Compute residual norms (layers, T) after each layer (up to `last`), one tensor per text."""
    layers = base.model.config.num_hidden_layers if last is None else last + 1
    sites = [llm.site("block", i) for i in range(layers)]
    out = []
    for ids in texts:
        with record(base.model, sites, keep=lambda x: x[0].float().norm(dim=-1).cpu()) as acts:
            forward(base, ids, last)
        out.append(torch.stack([acts[s][0] for s in sites]))
    return out


def _embedding_norm(base: Base, docs: list[Tensor]) -> Tensor:
    """Return the mean norm of the documents' first tokens' embeddings."""
    table = base.model.get_input_embeddings().weight
    return torch.stack([table[int(d[0])].float().norm().cpu() for d in docs]).mean()


def activations(base: Base, layer: int, texts: list[Tensor], at: slice) -> Tensor:
    """Return a layer's neuron activations (n, m) at the positions `at`, all texts stacked."""
    site = llm.site("neurons", layer)
    with record(base.model, [site], "input", keep=lambda x: x[0, at].float().cpu()) as acts:
        for ids in texts:
            forward(base, ids, layer)
    return torch.cat(acts[site])


def _floats(x: Tensor) -> tuple[float, ...]:
    return tuple(round(float(v), 3) for v in x)
