"""attention_sink: why a language model fails to repeat a word, and the patch that fixes it.

Paper: Yona, Shumailov, Hayes, Barbero, Gandelsman, "Interpreting the Repeated Token Phenomenon in Large Language
Models", arXiv 2503.08908. Claim: the first attention layer marks the first token, a few MLP neurons read the mark and
turn it into an attention sink; a long run of one word looks like a first token to that layer, fires the same neurons,
and derails the model; silencing them away from the first token repairs it.

    patchbay fit attention_sink/smollm      # SmolLM2-135M: 2 minutes on 2 cores
    patchbay fit attention_sink/paper       # Llama-2-7b by hub id or folder: minutes on one GPU
    python -m training.attention_sink FOLDER REPORT.json    # a sealed patch in full, with controls: half an hour

Found here (docs/LOG.md has the table): on SmolLM2 the paper's patch removes the sinks and does not restore repeating;
damping repeated keys in the first attention does, 512 copies 0.50 -> 0.96 of words, at a perplexity ratio of 1.000.

`find` needs no hints: stages are layers whose MLP raises the first token's norm far above everybody's; their neurons
are ranked by |a_j| |W_d[:, j]| with the true activation, at the first token and on repeats; a causal filter keeps
those whose silencing brings the norm of repeats down. It also tells a sink bound to the first position from one bound
to the BOS token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from patches import artifact
from patches.engine.read import record, upto
from patches.families import llm
from patches.families.base import Base, load_base
from patches.families.llm.worker import Decoder, Row
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from registry import config as configs
from registry.config import STRICT
from registry.errors import PatchError
from registry.manifest import Manifest, canonical
from training.data import text
from training.tasks.intervals import ratio_interval, wilson

Context = Literal["chat", "prefix", "bos"]
RISE = 2.0
"""a stage multiplies the first token's norm by this much within one layer"""
ABOVE = 2.5
"""and leaves it this far above the other tokens' mean"""


@dataclass(frozen=True)
class Config:
    """What to fit and how to measure it."""

    __pydantic_config__ = STRICT

    base: str = "pypi:smollm2"
    """reference of a decoder language model with Llama's layout"""
    device: str = "cpu"
    seed: int = 0
    method: Literal["auto", "paper", "damp"] = "auto"
    """paper: silence the last stage's neurons away from the first token, or at repeats these and their echoes.
    damp: repeated-key damping alone.
    auto: whatever repeats best on the fitting words, among all combinations that keep perplexity"""
    limits: tuple[float, ...] = (4.0, 8.0)
    """copies that may weigh in full; tried in this order"""
    run_limits: tuple[float, ...] = (8.0,)
    """the same within one run, in every later layer"""
    fit_words: int = 8
    fit_contexts: tuple[Context, ...] = ("chat", "prefix")
    fit_copies: int = 512
    """longest run the candidates are judged on; what it is worth beyond, the test says"""
    test_words: int = 50
    copies: tuple[int, ...] = (4, 16, 64, 256, 512, 1024)
    """lengths at which the next token is judged; one forward over the longest serves all"""
    contexts: tuple[Context, ...] = ("chat", "prefix", "bos")
    continue_after: int = 200
    continue_tokens: int = 32
    """greedy continuation: a word counts if all of these are right; 0 skips it"""
    documents: int = 8
    """per source of text"""
    document_tokens: int = 512
    perplexity_bound: float = 1.002
    """a candidate's perplexity on fitting text, as a multiple of the base's"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:planted", fit_words=6, test_words=8, copies=(4, 16, 64, 128), contexts=("prefix", "bos"),
        fit_contexts=("prefix", "bos"), continue_after=100, continue_tokens=4, documents=2, document_tokens=48,
        limits=(4.0,), run_limits=(),
    ),
    "smollm": Config(),
    "demo": Config(
        limits=(4.0,), run_limits=(), fit_words=3, fit_contexts=("prefix",), test_words=10, copies=(4, 64, 256, 512),
        contexts=("prefix",), continue_tokens=16, documents=3, document_tokens=256,
    ),
    "gemma": Config(base="pypi:gemma3"),
    "paper": Config(
        base="hf-hub:meta-llama/Llama-2-7b-hf", device="cuda", method="paper", copies=(64, 256, 1024, 2048)
    ),
}  # fmt: skip


# ---- finding the circuit -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circuit:
    """What `find` found."""

    bound_to: Literal["position", "bos", "none"]
    """what makes a token a sink: being first, being the BOS token, or there is no sink"""
    stages: tuple[tuple[tuple[int, int], ...], ...]
    """per stage (neighbouring layers): its neurons (layer, neuron), strongest first"""
    first_norms: tuple[float, ...]
    """after each layer, of the first token"""
    other_norms: tuple[float, ...]
    """of all others, mean"""
    repeat_norms: tuple[float, ...]
    """of the last of many repeats, median over words"""
    bos_norms: tuple[float, ...]
    """of a BOS token in the middle of a text, mean; empty without a BOS token"""
    plain_norms: tuple[float, ...]
    """of an ordinary first token, without BOS"""
    echoes: tuple[tuple[int, int], ...] = ()
    """neurons of the stages' layers that are no part of the sink and answer on repeats once it is silent; ordinary text
    needs them, so only repeats may lose them"""

    @property
    def neurons(self) -> tuple[tuple[int, int], ...]:
        return tuple(n for stage in self.stages for n in stage)


@torch.inference_mode()
def find(base: Base, words: Iterable[int], copies: int = 500, documents: int = 12) -> Circuit:
    """Sink stages and neurons of a decoder, without hints.

    words: token ids to repeat; copies: how often. Nothing is changed.
    """
    layers = base.model.config.num_hidden_layers
    docs = text.documents("prose", base.processor, documents, 80)
    norms = _norms(base, docs)  # per document (layers, T)
    first = torch.stack([n[:, 0] for n in norms]).mean(0)
    others = torch.cat([n[:, 1:] for n in norms], 1).mean(1)
    bos = base.processor.bos_token_id
    lead = [bos] if bos is not None else []
    repeats = [torch.tensor([*lead, *[w] * copies]) for w in words]
    repeated = torch.stack([n[:, -1] for n in _norms(base, repeats)]).median(0).values
    plain = torch.stack([n[:, 0] for n in _norms(base, [d[len(lead) :] for d in docs])]).mean(0)
    middle = (
        torch.stack([n[:, 20] for n in _norms(base, [torch.cat([d[1:21], d[:1], d[21:]]) for d in docs])]).mean(0)
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
"""positions"""


def _neurons(
    base: Base, group: list[int], docs: list[Tensor], repeats: list[Tensor], others: Tensor
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """The neurons of one stage and their echoes: candidates by contribution, then the causal filter."""
    end, ordinary = group[-1], float(others[group[-1]])
    scored: list[tuple[float, int, int]] = []
    for layer in group:
        down = base.model.get_submodule(llm.site("neurons", layer)).weight.norm(dim=0).cpu()
        at_first = _activations(base, layer, docs, FIRST).abs() * down
        at_last = _activations(base, layer, repeats, LAST).abs() * down
        # both must agree: a neuron of the sink fires on the first token and on repeats; ordinary tokens are as loud as
        # the residual they live in
        both = torch.minimum(at_first.mean(0), at_last.amax(0))
        floor = 0.2 * float(others[layer])
        scored += [(float(both[j]), layer, int(j)) for j in (both > floor).nonzero()[:, 0]]
    candidates = [(layer, j) for _, layer, j in sorted(scored, reverse=True)][:16]

    def height(neurons: list[tuple[int, int]]) -> float:
        """Norm of repeats after the stage, with these silenced; the loudest word counts."""
        if not neurons:
            return max(float(n[end, -1]) for n in _norms(base, repeats, end))
        with SinkEdit(SinkConfig(neurons=tuple(neurons)), {}).apply(base.model, root=base.root):
            return max(float(n[end, -1]) for n in _norms(base, repeats, end))

    start = height([])
    if start < ABOVE * ordinary:
        return (), ()  # repeats do not reach this stage
    chosen: list[tuple[int, int]] = []
    low = start
    for neuron in candidates:  # strongest first, until repeats are ordinary again
        chosen.append(neuron)
        low = height(chosen)
        if low < 2.0 * ordinary:
            break
    for neuron in list(reversed(chosen)):  # then without each: keep it only if the norm needs it
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
    """With `silent` silenced, the neurons that are loudest on repeats, loudest first."""
    scored: list[tuple[float, int, int]] = []
    with SinkEdit(SinkConfig(neurons=tuple(silent)), {}).apply(base.model, root=base.root):
        for layer in group:
            down = base.model.get_submodule(llm.site("neurons", layer)).weight.norm(dim=0).cpu()
            loud = _activations(base, layer, repeats, LAST).abs().amax(0) * down
            scored += [(float(loud[j]), layer, int(j)) for j in (loud > 0.2 * float(others[layer])).nonzero()[:, 0]]
    return [(layer, j) for _, layer, j in sorted(scored, reverse=True)][:8]


def _neighbours(layers: list[int]) -> list[list[int]]:
    out: list[list[int]] = []
    for i in layers:
        if out and i == out[-1][-1] + 1:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def _run(base: Base, ids: Tensor, layer: int | None = None) -> None:
    """One forward over a text; it ends after `layer`, for most questions are about the first layers."""
    inputs = {"input_ids": ids[None].to(base.device), "use_cache": False}
    if layer is None:
        base.model.get_submodule(base.root)(**inputs)
    else:
        upto(base.model, [llm.site("block", layer)], **inputs)


def _norms(base: Base, texts: list[Tensor], last: int | None = None) -> list[Tensor]:
    """Residual norms (layers, T) after each layer (up to `last`), one tensor per text."""
    layers = base.model.config.num_hidden_layers if last is None else last + 1
    sites = [llm.site("block", i) for i in range(layers)]
    out = []
    for ids in texts:
        with record(base.model, sites, keep=lambda x: x[0].float().norm(dim=-1).cpu()) as acts:
            _run(base, ids, last)
        out.append(torch.stack([acts[s][0] for s in sites]))
    return out


def _embedding_norm(base: Base, docs: list[Tensor]) -> Tensor:
    table = base.model.get_input_embeddings().weight
    return torch.stack([table[int(d[0])].float().norm().cpu() for d in docs]).mean()


def _activations(base: Base, layer: int, texts: list[Tensor], at: slice) -> Tensor:
    """(n, m) true neuron activations of a layer at these positions of every text, one after the other."""
    site = llm.site("neurons", layer)
    with record(base.model, [site], "input", keep=lambda x: x[0, at].float().cpu()) as acts:
        for ids in texts:
            _run(base, ids, layer)
    return torch.cat(acts[site])


def _floats(x: Tensor) -> tuple[float, ...]:
    return tuple(round(float(v), 3) for v in x)


# ---- what the paper measures around it ---------------------------------------------------------------------------


@torch.inference_mode()
def sink_attention(base: Base, texts: list[Tensor]) -> list[float]:
    """Share of attention on the first token, per layer, mean over heads, later tokens and texts."""
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
            _run(base, ids)
    finally:
        for h in hooks:
            h.remove()
        base.model.set_attn_implementation(before)
    return [round(sum(got[s]) / len(got[s]), 4) for s in sites]


@torch.inference_mode()
def convergence(base: Base, words: Iterable[int], copies: Iterable[int]) -> dict[int, float]:
    """Cosine of the first attention's output at the N-th repeat with that of the word alone (Theorem 4.1)."""
    site, copies = llm.site("attn", 0), sorted(copies)
    lead = base.processor("Here is a word:", add_special_tokens=True)["input_ids"]
    out = dict.fromkeys(copies, 0.0)
    words = list(words)
    for w in words:
        with record(base.model, [site], keep=lambda x: x[0].float().cpu()) as acts:
            _run(base, torch.tensor([w]), 0)
            _run(base, torch.tensor([*lead, *[w] * copies[-1]]), 0)
        alone, run = acts[site][0][0], acts[site][1][len(lead) :]
        for n in copies:
            out[n] += float(torch.cosine_similarity(run[n - 1], alone, dim=0)) / len(words)
    return {n: round(v, 4) for n, v in out.items()}


@torch.inference_mode()
def cluster_attack(
    base: Base, circuit: Circuit, sizes: Iterable[int] = (2, 4, 8), length: int = 512, seed: int = 0
) -> dict[int, tuple[float, float]]:
    """Sinks without immediate repeats: k tokens whose lone first-attention outputs are nearest, mixed at random.

    Returns k -> (share of late tokens above the stage's threshold, the same for k random tokens).
    """
    if not circuit.stages:
        return {}
    end = circuit.stages[0][-1][0]
    threshold = (circuit.first_norms[end] * circuit.other_norms[end]) ** 0.5
    pool = text.words(base.processor, 400, seed)
    site = llm.site("attn", 0)
    with record(base.model, [site], keep=lambda x: x[0, 0].float().cpu()) as acts:
        for w in pool:
            _run(base, torch.tensor([w]), 0)
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
            norms = _norms(base, [torch.tensor([*([bos] if bos is not None else []), *ids])], end)[0][end]
            shares.append(round(float((norms[-128:] > threshold).float().mean()), 4))
        out[k] = (shares[0], shares[1])
    return out


# ---- measuring a model -------------------------------------------------------------------------------------------


def prompt(base: Base, word: int, context: Context) -> list[int]:
    """What stands before the copies. chat: the user asks, the assistant has begun; bos: nothing but BOS."""
    tokenizer = base.processor
    if context == "chat":
        said = f"Repeat the word{tokenizer.decode([word])} over and over, separated by spaces."
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(chat, add_special_tokens=False)["input_ids"])
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    more = tokenizer("Here is the word repeated many times:", add_special_tokens=False)["input_ids"]
    return [*bos, *more] if context == "prefix" else bos


@dataclass(frozen=True)
class Repeats:
    """Does the model predict the word once more, after N copies of it?"""

    right: dict[int, list[bool]]
    """N -> one per word"""
    log_p: dict[int, list[float]]
    """N -> log-probability of the word, one per word"""


def repeats(
    model: Subject,
    words: list[int],
    context: Context,
    copies: tuple[int, ...],
    arm: str | None,
    quiet: bool = False,
) -> Repeats:
    """One forward per word over the longest run: the model is causal, so every shorter run is in it."""
    out = Repeats({n: [] for n in copies}, {n: [] for n in copies})
    for w in tqdm(words, f"{context} x {max(copies)}", disable=None if not quiet else True, leave=False):
        lead = prompt(model.base, w, context)
        ids = torch.tensor([[*lead, *[w] * max(copies)]], device=model.base.device)
        at = torch.tensor([len(lead) + n - 1 for n in copies], device=model.base.device)
        logits = model(rows=[arm], input_ids=ids, use_cache=False, logits_to_keep=at).logits[0].float()
        scores = logits.log_softmax(-1)[:, w].tolist()
        best = logits.argmax(-1).tolist()
        for n, score, token in zip(copies, scores, best, strict=True):
            out.right[n].append(token == w)
            out.log_p[n].append(score)
    return out


def losses(model: Subject, docs: list[Tensor], arm: str | None) -> list[tuple[float, int]]:
    """Per document: summed negative log-likelihood in nats, tokens judged."""
    out = []
    for ids in docs:
        x = ids[None].to(model.base.device)
        logits = model(rows=[arm], input_ids=x, use_cache=False).logits[0, :-1].float()
        out.append((float(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum")), len(ids) - 1))
    return out


def perplexity(parts: list[tuple[float, int]]) -> float:
    return float(torch.tensor(sum(p[0] for p in parts) / sum(p[1] for p in parts)).exp())


def continuations(model: Subject, words: list[int], config: Config, arm: str | None) -> list[bool]:
    """Per word: is every token of a greedy continuation of many copies the word again? Through the running batch."""
    rows = []
    for w in words:
        lead = prompt(model.base, w, config.contexts[0])
        rows.append(
            Row([*lead, *[w] * config.continue_after], arm=arm, max_tokens=config.continue_tokens, ignore_eos=True)
        )
    Decoder(model.base, model.applied, slots=8).run(rows)
    return [row.out == [w] * config.continue_tokens for row, w in zip(rows, words, strict=True)]


@torch.inference_mode()
def norm_ratio(model: Subject, words: list[int], copies: int, arm: str | None) -> float:
    """How much louder the last of many repeats is than ordinary text, at its loudest layer; median of words."""
    base = model.base
    bos = [base.processor.bos_token_id] if base.processor.bos_token_id is not None else []
    with model.applied.rows([arm]):
        ordinary = torch.cat([n[:, 1:] for n in _norms(base, text.documents("prose", base.processor, 6, 80))], 1).mean(
            1
        )
        loud = [
            float((n[:, -1] / ordinary).max())
            for n in _norms(base, [torch.tensor([*bos, *[w] * copies]) for w in words])
        ]
    return float(torch.tensor(loud).median())


def evaluate(model: Subject, config: Config, arm: str | None) -> dict[str, float]:
    """The paper's question as numbers, on test words; the same names for base and patched."""
    words = _test_words(model.base, config)
    out: dict[str, float] = {}
    for context in config.contexts:
        got = repeats(model, words, context, config.copies, arm)
        for n in config.copies:
            out[f"quality/repeat_{context}_{n}"] = sum(got.right[n]) / len(words)
        out[f"quality/logp_{context}_{max(config.copies)}"] = sum(got.log_p[max(config.copies)]) / len(words)
    if config.continue_tokens:
        right = continuations(model, words, config, arm)
        out[f"quality/continue_{config.continue_after}"] = sum(right) / len(right)
    for source in text.SOURCES:
        docs = _documents(model.base, config, source)
        out[f"quality/perplexity_{source}"] = perplexity(losses(model, docs, arm))
    out["target/repeat_norm_ratio"] = norm_ratio(model, words[:6], min(500, max(config.copies)), arm)
    return {k: round(v, 6) for k, v in out.items()}


def _fit_words(base: Base, config: Config) -> list[int]:
    return text.words(base.processor, config.fit_words, config.seed + 1)


def _test_words(base: Base, config: Config) -> list[int]:
    return text.words(base.processor, config.test_words, config.seed + 2, set(_fit_words(base, config)))


def _documents(base: Base, config: Config, source: str) -> list[Tensor]:
    """Documents that no choice was made on: fitting reads the first ones of a source, measuring those after."""
    return text.documents(source, base.processor, config.documents, config.document_tokens, skip=4)


# ---- fitting -----------------------------------------------------------------------------------------------------


def candidates(config: Config, circuit: Circuit) -> dict[str, SinkConfig]:
    """Every patch worth trying on this model, by name."""
    out: dict[str, SinkConfig] = {}
    if circuit.stages:
        out["paper"] = SinkConfig(neurons=circuit.stages[-1])
        last = {layer for layer, _ in circuit.stages[-1]}
        if mine := tuple(n for n in circuit.echoes if n[0] in last):
            out["paper with echoes, at repeats"] = SinkConfig(neurons=circuit.stages[-1] + mine, only_repeats=True)
    later = tuple(range(1, len(circuit.first_norms)))
    for limit in config.limits:
        damped = SinkConfig(damp_layers=(0,), damp_limit=limit)
        out[f"damp {limit:g}"] = damped
        if circuit.stages:
            mended = replace(damped, neurons=circuit.neurons, only_repeats=True)
            out[f"damp {limit:g} + stages at repeats"] = mended
            for run in config.run_limits:
                both = replace(mended, run_layers=later, run_limit=run)
                out[f"damp {limit:g} + runs {run:g} + stages at repeats"] = both
    if config.method == "paper":
        return {k: v for k, v in out.items() if k.startswith("paper")}
    return {k: v for k, v in out.items() if config.method == "auto" or (k.startswith("damp") and "+" not in k)}


def fit(config: Config, folder: Path) -> Manifest:
    """Find the circuit, try the candidates on fitting words and text, seal the best with its evidence.

    Raises PatchError if the model has no sink at the first position: there is nothing to patch then.
    """
    base = load_base(config.base, "llm", config.device)
    words = _fit_words(base, config)
    top = max(config.copies)
    circuit = find(base, words[:4], min(500, top))
    if circuit.bound_to == "bos":
        raise PatchError(
            f"{base.name} has a sink, but it is bound to its BOS token and not to the first position (an ordinary "
            f"first token reaches norm {max(circuit.plain_norms):.0f}, BOS {max(circuit.first_norms):.0f}): repeats "
            "cannot look like it, so the model is immune and there is nothing to patch."
        )
    tried = candidates(config, circuit)
    if circuit.bound_to == "none" or not tried:
        raise PatchError(f"{base.name} has no attention sink at its first token; there is nothing to patch.")
    model = Subject(base, {name: SinkEdit(c, {}) for name, c in tried.items()})
    docs = [d for s in text.SOURCES for d in text.documents(s, base.processor, 2, config.document_tokens)]
    lengths = tuple(n for n in config.copies if 16 <= n <= config.fit_copies) or config.copies
    table = {}
    for name in tqdm((None, *tried), "candidates", disable=None, leave=False):
        row: dict[str, Any] = {"perplexity": round(perplexity(losses(model, docs, name)), 4)}
        for context in config.fit_contexts:
            got = repeats(model, words, context, lengths, name, quiet=True)
            row[context] = {str(n): sum(got.right[n]) / len(words) for n in lengths}
            row[f"{context} log p"] = round(sum(got.log_p[lengths[-1]]) / len(words), 4)
        table[name or "base"] = row
    model.close()

    def worth(name: str) -> tuple[float, float]:
        mean = sum(sum(table[name][c].values()) / len(lengths) for c in config.fit_contexts)
        return round(mean, 6), sum(table[name][f"{c} log p"] for c in config.fit_contexts)

    bound = config.perplexity_bound * table["base"]["perplexity"]
    allowed = [n for n in tried if table[n]["perplexity"] <= bound] or list(tried)
    best = max(allowed, key=worth)
    near = convergence(base, words[:4], [n for n in (1, 4, 16, 64, 256) if n <= top])
    report = {
        "chosen": best, "circuit": asdict(circuit), "candidates": table,
        "words": [base.processor.decode([w]) for w in words],
        "attention_to_first": sink_attention(base, docs[:2]),
        "convergence": {str(k): v for k, v in near.items()},
    }  # fmt: skip
    (folder / "report.json").write_bytes(canonical(json.loads(json.dumps(report))))
    return artifact.save(SinkEdit(tried[best], {}), "attention_sink", folder, base=base.label)


# ---- pictures ----------------------------------------------------------------------------------------------------


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Norms through the layers, accuracy against copies, candidates as a heat map, convergence."""
    from matplotlib.figure import Figure

    report = json.loads((folder / "report.json").read_text())
    circuit, out = report["circuit"], {}

    def figure(title: str, x: str, y: str) -> tuple[Any, Any]:
        f = Figure(figsize=(7, 4.2), layout="constrained")
        a = f.subplots()
        a.set(title=title, xlabel=x, ylabel=y)
        a.grid(alpha=0.25)
        return f, a

    f, a = figure("Residual norm after each layer", "layer", "norm (log)")
    for key, label in (
        ("first_norms", "first token"),
        ("repeat_norms", "last of many repeats"),
        ("other_norms", "other tokens"),
    ):
        a.semilogy(circuit[key], marker=".", label=label)
    for layer, neuron in [n for stage in circuit["stages"] for n in stage]:
        a.annotate(f"{layer}.{neuron}", (layer, circuit["first_norms"][layer]), fontsize=7, rotation=60)
    a.legend()
    out["norms"] = f
    contexts = sorted({k.split("_")[1] for k in results["base"] if k.startswith("quality/repeat_")})
    f = Figure(figsize=(3.6 * len(contexts), 3.6), layout="constrained")
    for a, context in zip(f.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
        for side, values in results.items():
            points = sorted(
                (int(k.split("_")[2]), v) for k, v in values.items() if k.startswith(f"quality/repeat_{context}_")
            )
            a.semilogx(*zip(*points, strict=True), marker="o", label=side)
        a.set(title=context, xlabel="copies", ylabel="next token right", ylim=(-0.03, 1.03))
        a.grid(alpha=0.25)
    a.legend()
    out["repeats"] = f
    names = list(report["candidates"])
    columns = [(c, n) for c in contexts if c in report["candidates"]["base"] for n in report["candidates"]["base"][c]]
    grid = [[report["candidates"][name][c][n] for c, n in columns] for name in names]
    f = Figure(figsize=(1.2 + 0.6 * len(columns), 1.6 + 0.4 * len(names)), layout="constrained")
    a = f.subplots()
    a.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    a.set_xticks(range(len(columns)), [f"{c} {n}" for c, n in columns], rotation=60, fontsize=7)
    a.set_yticks(range(len(names)), [f"{n} *" if n == report["chosen"] else n for n in names], fontsize=7)
    for i, row in enumerate(grid):
        for j, v in enumerate(row):
            a.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=6, color="white" if v < 0.6 else "black")
    a.set_title("Candidates on fitting words (* chosen)")
    out["candidates"] = f
    f, a = figure("First attention: the N-th repeat becomes a lone token", "copies", "cosine with the lone token")
    a.semilogx(
        *zip(*((int(k), v) for k, v in sorted(report["convergence"].items(), key=lambda i: int(i[0]))), strict=True),
        marker="o",
    )
    out["convergence"] = f
    f, a = figure("Attention on the first token, ordinary text", "layer", "share")
    a.bar(range(len(report["attention_to_first"])), report["attention_to_first"])
    out["attention_to_first"] = f
    return out


# ---- the whole table ---------------------------------------------------------------------------------------------


def report(folder: Path, out: Path, few: int = 16) -> dict[str, Any]:
    """A sealed patch against its base on all test words in every context, and every part and control on the first
    `few` words; shares with intervals. docs/LOG.md's tables. Writes JSON as it goes."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "llm", config.device)
    about, patch = artifact.load(folder, base=base.digest, device=base.device)
    found = json.loads((folder / "report.json").read_text())["circuit"]
    stages = [tuple((int(layer), int(j)) for layer, j in stage) for stage in found["stages"]]
    circuit = Circuit(**{**found, "stages": tuple(stages), "echoes": tuple(tuple(e) for e in found.get("echoes", ()))})
    neurons = circuit.neurons
    words, top = _test_words(base, config), max(config.copies)
    rng = torch.Generator().manual_seed(config.seed)
    m = base.model.config.intermediate_size
    random = tuple((layer, int(torch.randint(m, (1,), generator=rng))) for layer, _ in neurons)
    parts = {
        **{k: c for k, c in candidates(config, circuit).items() if k.startswith("paper")},
        "damping alone": replace(patch.config, neurons=(), only_repeats=False, run_layers=()),
        "stages at repeats alone": SinkConfig(neurons=neurons, only_repeats=True),
        "control: random neurons": SinkConfig(neurons=random),
        "control: last stage everywhere": SinkConfig(neurons=stages[-1], keep_first=False),
    }
    model = Subject(base, {"sealed": patch, **{k: SinkEdit(c, {}) for k, c in parts.items()}})
    docs = {s: _documents(base, config, s) for s in text.SOURCES}
    plain = {s: losses(model, d, None) for s, d in docs.items()}
    results: dict[str, Any] = {"digest": about.digest, "patch": asdict(patch.config), "variants": {}}
    results["cluster"] = {str(k): v for k, v in cluster_attack(base, circuit).items()}
    for name in ("base", "sealed", *parts):
        arm = None if name == "base" else name
        many = name in ("base", "sealed")
        row: dict[str, Any] = {}
        for context in config.contexts if many else config.fit_contexts:
            some = words if many and context != "bos" else words[:few]
            got = repeats(model, some, context, config.copies, arm)
            row[context] = {str(n): wilson(got.right[n]) for n in config.copies}
            row[f"{context} log p"] = {str(n): round(sum(got.log_p[n]) / len(some), 3) for n in config.copies}
        row["perplexity"] = {s: ratio_interval(losses(model, d, arm), plain[s]) for s, d in docs.items()}
        row["norm_ratio"] = round(norm_ratio(model, words[:6], min(500, top), arm), 3)
        if many:
            row["continue"] = wilson(continuations(model, words, config, arm))
        results["variants"][name] = row
        out.write_text(json.dumps(results, indent=1))
        tqdm.write(f"{name}: {json.dumps(row)}")
    model.close()
    return results


if __name__ == "__main__":
    report(Path(sys.argv[1]), Path(sys.argv[2]))
