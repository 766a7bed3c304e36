"""Measurements of the paper around the circuit: attention on the first token, convergence, cluster attack."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from patches.engine.read import record
from patches.families import llm
from patches.families.base import Base
from training.attention_sink.find import Circuit, forward, residual_norms
from training.data import text


@torch.inference_mode()
def sink_attention(base: Base, texts: list[Tensor]) -> list[float]:
    """Measure the fraction of attention on the first token, per layer, averaged over heads, later tokens and texts."""
    sites = [llm.site("attn", i) for i in range(base.model.config.num_hidden_layers)]
    got: dict[str, list[float]] = {s: [] for s in sites}

    def keep(site: str) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            got[site].append(float(out[1][0, :, 1:, 0].float().mean()))

        return hook

    before = base.model.config._attn_implementation
    base.model.set_attn_implementation("eager")
    hooks = [base.model.get_submodule(s).register_forward_hook(keep(s)) for s in sites]
    try:
        for ids in texts:
            forward(base, ids)
    finally:
        for h in hooks:
            h.remove()
        base.model.set_attn_implementation(before)
    return [round(sum(got[s]) / len(got[s]), 4) for s in sites]


@torch.inference_mode()
def convergence(base: Base, words: Iterable[int], copies: Iterable[int]) -> dict[int, float]:
    """Compute the cosine of the first attention's output at the N-th repeat with the word alone (Theorem 4.1)."""
    site, copies = llm.site("attn", 0), sorted(copies)
    lead = base.processor("Here is a word:", add_special_tokens=True)["input_ids"]
    out = dict.fromkeys(copies, 0.0)
    words = list(words)
    for w in words:
        with record(base.model, [site], keep=lambda x: x[0].float().cpu()) as acts:
            forward(base, torch.tensor([w]), 0)
            forward(base, torch.tensor([*lead, *[w] * copies[-1]]), 0)
        alone, run = acts[site][0][0], acts[site][1][len(lead) :]
        for n in copies:
            out[n] += float(torch.cosine_similarity(run[n - 1], alone, dim=0)) / len(words)
    return {n: round(v, 4) for n, v in out.items()}


@torch.inference_mode()
def cluster_attack(
    base: Base, circuit: Circuit, sizes: Iterable[int] = (2, 4, 8), length: int = 512, seed: int = 0
) -> dict[int, tuple[float, float]]:
    """Try to create sinks without immediate repeats, from tokens that the first attention confuses.

    Mixes, at random, k tokens whose lone first-attention outputs are nearest to each other.

    Returns k -> (fraction of late tokens above the stage's threshold, the same for k random tokens).
    """
    if not circuit.stages:
        return {}
    end = circuit.stages[0][-1][0]
    threshold = (circuit.first_norms[end] * circuit.other_norms[end]) ** 0.5
    pool = text.words(base.processor, 400, seed)
    site = llm.site("attn", 0)
    with record(base.model, [site], keep=lambda x: x[0, 0].float().cpu()) as acts:
        for w in pool:
            forward(base, torch.tensor([w]), 0)
    alone = torch.nn.functional.normalize(torch.stack(acts[site]), dim=1)
    near = alone @ alone.T
    center = int(near.topk(max(sizes), 1).values.mean(1).argmax())
    rng = torch.Generator().manual_seed(seed)
    bos = base.processor.bos_token_id
    out = {}
    for k in sizes:
        shares = []
        for members in (near[center].topk(k).indices, torch.randperm(len(pool), generator=rng)[:k]):
            ids, last = [], -1
            for _ in range(length):
                choices = [int(m) for m in members if int(m) != last]
                last = choices[int(torch.randint(len(choices), (1,), generator=rng))]
                ids.append(pool[last])
            norms = residual_norms(base, [torch.tensor([*([bos] if bos is not None else []), *ids])], end)[0][end]
            shares.append(round(float((norms[-128:] > threshold).float().mean()), 4))
        out[k] = (shares[0], shares[1])
    return out
