"""What a vision-language model says of scenes, what its tokens show, and what erasing does: the paper's numbers.

Everything runs `PictureDecoder` rows on features that were made once. A caption's objects are found as the mechanism
finds them (`erase.mentioned`). Shapes: N pictures, C classes, n image tokens, L + 1 depths, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.families.vlm import Picture, PictureDecoder, lens
from patches.families.vlm.base import depth, embeddings, states
from patches.families.vlm.layouts import layout
from patches.mechanisms.erase import ALONG, ROW, EraseEdit, mentioned
from patches.subject import Subject
from registry.errors import Invalid
from registry.measure import Measure
from training.vlm_erasure.chair import area, auroc, average_precision, chair, ratio
from training.vlm_erasure.data import Seen, words

SLOTS = 128


@dataclass(frozen=True)
class Said:
    """Captions of N pictures and what they name."""

    texts: list[str]
    mask: Tensor
    """(N, C) bool"""
    sure: Tensor
    """(N, C) the probability its name was said with, 0 where it was not"""
    order: Tensor
    """(N, C) place among the caption's things, -1 where it was not named"""
    rows: list[Picture] = field(repr=False, default_factory=list)


def captions(
    subject: Subject, seen: Seen, rows: Sequence[int] | None = None, arm: str | None = None,
    params: Sequence[Mapping[str, Tensor]] | None = None, watch: tuple[int, ...] = (),
) -> Said:  # fmt: skip
    """Greedy captions of the pictures `rows` (default all) under an arm, each row with its own parameters."""
    which = list(range(len(seen))) if rows is None else list(rows)
    jobs = [
        seen.row(
            i, arm=arm, max_tokens=seen.length, logprobs=0, watch=watch, params=params[k] if params is not None else {}
        )
        for k, i in enumerate(which)
    ]  # fmt: skip
    PictureDecoder(subject.base, subject.applied, SLOTS).run(jobs)
    objects, names = seen.scenes.objects, seen.scenes.names
    column = {n: c for c, n in enumerate(names)}
    first = beginnings(subject.base, objects)
    mask = torch.zeros(len(jobs), len(names), dtype=torch.bool)
    sure, order = torch.zeros(mask.shape), torch.full(mask.shape, -1)
    texts = []
    for i, job in enumerate(jobs):
        texts.append(subject.base.processor.decode(job.out, skip_special_tokens=True))
        for place, name in enumerate(mentioned(texts[-1], objects)):
            mask[i, column[name]], order[i, column[name]] = True, place
        for token, (logp, _) in zip(job.out, job.scores, strict=True):
            for c in first.get(token, ()):
                if mask[i, c] and not float(sure[i, c]):
                    sure[i, c] = float(torch.tensor(logp).exp())
    return Said(texts, mask, sure, order, jobs)


def beginnings(base: Any, objects: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """token id -> columns of the objects one of whose words (name, synonyms) begins with it."""
    out: dict[int, tuple[int, ...]] = {}
    for c, entry in enumerate(objects):
        for form in entry.split("|"):
            with contextlib.suppress(Invalid):  # a synonym this vocabulary cannot say is never said
                token = base.processor.word(form)[0]
                out[token] = tuple(dict.fromkeys((*out.get(token, ()), c)))
    return out


# ---- the lens ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def lens_field(subject: Subject, seen: Seen, normed: bool = True) -> Tensor:
    """(N, L + 1, n, C) float16: probability of each class's name at each depth and image token; 0 beyond a picture's
    own tokens, where others have more."""
    base, L = subject.base, depth(subject.base)
    ids = words(base, seen.scenes.names)
    n, D = max(len(x) for x in seen.features), seen.features[0].shape[1]
    batch = max(1, min(64, 400_000_000 // ((L + 1) * n * D)))
    out = []
    for i in range(0, len(seen), batch):
        some = range(i, min(i + batch, len(seen)))
        jobs = [seen.row(k, max_tokens=1, watch=tuple(range(L + 1))) for k in some]
        PictureDecoder(base, subject.applied, SLOTS).run(jobs)
        for job in jobs:
            assert job.seen is not None
            field = lens.per_word(base, job.seen, ids, normed).permute(1, 2, 0).half().cpu()  # (L + 1, n, C)
            out.append(F.pad(field, (0, 0, 0, n - field.shape[1])))
            job.seen = None
    return torch.stack(out)


@dataclass(frozen=True)
class Mentions:
    """M named things of all captions: is each there, and who says how sure."""

    true: Tensor
    """(M,) bool"""
    place: Tensor
    """(M,) place in its caption"""
    scores: dict[str, Tensor]
    """detector -> (M,)"""
    partner: Tensor
    """(M,) bool: it is the absent partner of what is there"""


def mentions(said: Said, seen: Seen, lensed: Tensor, plain: Tensor, more: Mapping[str, Tensor]) -> Mentions:
    """All mentions with the lens at every depth (with and without the final norm) and further detectors (N, C)."""
    at = said.mask
    tops, bare = lensed.float().amax(2), plain.float().amax(2)  # (N, L + 1, C)
    scores = {f"lens depth {d}": tops[:, d][at] for d in range(tops.shape[1])}
    scores |= {"lens, max over depths": tops.amax(1)[at], "lens, max over depths, no norm": bare.amax(1)[at]}
    scores |= {"probability of the word": said.sure[at]}
    scores |= {name: value[at] for name, value in more.items()}
    partner = torch.zeros_like(at)
    rows = (seen.scenes.partner >= 0).nonzero()[:, 0]
    partner[rows, seen.scenes.partner[rows]] = True
    return Mentions(seen.scenes.there[at], said.order[at], scores, (partner & ~seen.scenes.there)[at])


def detection(found: Mentions) -> dict[str, dict[str, Any]]:
    """Per detector: AUROC of true against invented mentions, the same among mentions at one place of their captions,
    against invented partners alone, and average precision of finding the invented ones."""
    out = {}
    for name, score in found.scores.items():
        pairs, held = 0, 0.0
        for place in found.place.unique().tolist():
            here = found.place == place
            p, q = int((here & found.true).sum()), int((here & ~found.true).sum())
            pairs += p * q
            held += p * q * auroc(score[here & found.true], score[here & ~found.true])
        out[name] = {
            "auroc": area(score, found.true),
            "auroc, one place": held / pairs if pairs else 0.5,
            "auroc, partners": auroc(score[found.true], score[~found.true & found.partner]),
            "ap of invented": average_precision(-score, ~found.true),
        }
    return out


def presence(lensed: Tensor, there: Tensor) -> dict[str, float]:
    """mAP over classes of finding the pictures that show it, per depth of the lens."""
    tops = lensed.float().amax(2)
    out = {}
    for d in range(tops.shape[1]):
        some = [average_precision(tops[:, d, c], there[:, c]) for c in range(there.shape[1]) if there[:, c].any()]
        out[f"depth {d}"] = sum(some) / len(some)
    return out


@torch.inference_mode()
def last_states(subject: Subject, seen: Seen, said: Said) -> dict[tuple[int, int], Tensor]:
    """(picture, class) -> (D,) the last depth's state that said the class's name; what a linear probe reads."""
    base = subject.base
    first = beginnings(base, seen.scenes.objects)
    out: dict[tuple[int, int], Tensor] = {}
    T, step = max(len(j.out) for j in said.rows), 64 if seen.alike else 1
    for i in range(0, len(seen), step):
        jobs, prompt = said.rows[i : i + step], seen.prompts[i]
        mask = torch.tensor([token == base.processor.image_token for token in prompt])
        ids = torch.tensor([[*prompt, *j.out, *[0] * (T - len(j.out))] for j in jobs])
        x = embeddings(base, ids.to(base.device)).clone()
        x[:, : len(prompt)][:, mask] = torch.stack(seen.features[i : i + step]).to(x)
        h = states(base, x, (depth(base),), _positions(jobs[0], x.shape[1]))[0].float().cpu()
        for k, job in enumerate(jobs):
            for t, token in enumerate(job.out):
                for c in first.get(token, ()):
                    if said.mask[i + k, c] and (i + k, c) not in out:
                        out[i + k, c] = h[k, len(prompt) + t - 1]
    return out


def _positions(job: Picture, T: int) -> Tensor | None:
    """(3, 1, T) rotary positions of a row's prompt and answer, where its picture bends them."""
    if job.positions is None:
        return None
    later = torch.arange(job.positions.shape[1], T) + job.delta
    return torch.cat([job.positions.cpu(), later.expand(3, -1)], 1)[:, None]


def probe(
    train: Mapping[tuple[int, int], Tensor], true: Tensor, test: Mapping[tuple[int, int], Tensor], shape: Any
) -> Tensor:
    """(N, C) scores of a logistic probe on `last_states`, learned on the mentions of other pictures; 0 elsewhere, and
    everywhere if there were none."""
    if not train:
        return torch.zeros(shape)
    x = torch.stack(list(train.values()))
    y = torch.tensor([bool(true[k]) for k in train]).float()
    middle, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    w = torch.zeros(x.shape[1] + 1, requires_grad=True)
    z = torch.cat([(x - middle) / scale, torch.ones(len(x), 1)], 1)
    optimiser = torch.optim.LBFGS([w], max_iter=100)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(z @ w, y) + 1e-2 * w.pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[arg-type]
    out = torch.zeros(shape)
    for key, state in test.items():
        out[key] = float(torch.cat([(state - middle) / scale, torch.ones(1)]) @ w.detach())
    return out


def localisation(field: Tensor, things: Tensor, share: Tensor) -> dict[str, Measure]:
    """field (N, n, C), things (N, K), share (N, K, n): is the hottest token one that shows most of the thing; and the
    IoU of the token grid's zero-shot segmentation (over half of its maximum) with where the thing is."""
    hit, iou, chance, best = [], [], [], []
    for i, k in (things >= 0).nonzero().tolist():
        heat, where = field[i, :, things[i, k]].float(), share[i, k].float()
        hit.append(float(where[heat.argmax()] >= where.max() - 0.02))
        truth = where > 0.25
        got = heat > 0.5 * heat.max()
        iou.append(float((truth & got).sum() / (truth | got).sum().clamp(min=1)))
        chance.append(float((where >= where.max() - 0.02).float().mean()))
        best.append(float(truth.float().mean()))
    one = torch.ones(len(hit))
    return {
        "hit": ratio(torch.tensor(hit), one, "higher"),
        "iou": ratio(torch.tensor(iou), one, "higher"),
        "chance of a hit": ratio(torch.tensor(chance), one),
        "iou of everything": ratio(torch.tensor(best), one),
    }


@torch.inference_mode()
def attention(subject: Subject, seen: Seen, said: Said) -> tuple[Tensor, Tensor]:
    """Raw attention as a heat-map: (N, L, n, C) what the position that says a class's name gives each image token, mean
    over heads, zeros for what is not said; and (N, C) bool where it was."""
    base, L = subject.base, depth(subject.base)
    column = {next(iter(ids)): c for c, ids in enumerate(words(base, seen.scenes.names))}
    prompt = seen.prompts[0]  # the lab's pictures all have the same
    at = [t for t, i in enumerate(prompt) if i == base.processor.image_token]
    inner = base.model.get_submodule(base.root)
    decoder = base.model.get_submodule(layout(base.model).decoder)
    before = decoder.config._attn_implementation
    n, C = len(at), len(seen.scenes.names)
    out, there = torch.zeros(len(seen), L, n, C), torch.zeros(len(seen), C, dtype=torch.bool)
    decoder.set_attn_implementation("eager")
    try:
        for i, job in enumerate(said.rows):
            ids = torch.tensor([[*prompt, *job.out]], device=base.device)
            x = embeddings(base, ids).clone()
            x[0, at] = seen.features[i].to(x)
            maps = inner(inputs_embeds=x, use_cache=False, output_attentions=True).attentions
            for t, token in enumerate(job.out):
                c = column.get(token)
                if c is not None and not there[i, c]:
                    there[i, c] = True
                    for layer, a in enumerate(maps):
                        out[i, layer, :, c] = a[0, :, len(prompt) + t - 1, at].float().mean(0).cpu()
    finally:
        decoder.set_attn_implementation(before)
    return out, there


# ---- erasing -----------------------------------------------------------------------------------------------------


def rows_of(
    which: Tensor, patch: EraseEdit, subject: Subject, seen: Seen, instead: str = ""
) -> tuple[list[int], list[dict[str, Tensor]]]:
    """Pictures with something to erase, and their row parameters. instead="random": as much is taken along random
    directions of the same norm."""
    names = seen.scenes.names
    used = sorted({c for _, c in which.nonzero().tolist()})
    table = dict(zip(used, patch.directions(subject.base, [names[c] for c in used]), strict=True)) if used else {}
    g = torch.Generator().manual_seed(0)
    rows, params = [], []
    for i in which.any(1).nonzero()[:, 0].tolist():
        t = torch.stack([table[c] for c in which[i].nonzero()[:, 0].tolist()])
        row = {ROW: t}
        if instead:
            other = torch.randn(t.shape, generator=g)
            row[ALONG] = other / other.norm(dim=-1, keepdim=True) * t.norm(dim=-1, keepdim=True)
        rows.append(i)
        params.append(row)
    return rows, params


def again(subject: Subject, seen: Seen, said: Tensor, which: Tensor, patch: EraseEdit, instead: str = "") -> Tensor:
    """(N, C) what is named when each picture erases its `which` (N, C); pictures with nothing to erase stay as said."""
    out = said.clone()
    rows, params = rows_of(which, patch, subject, seen, instead)
    if rows:
        subject.add("tried", patch)
        try:
            out[rows] = captions(subject, seen, rows, "tried", params).mask
        finally:
            subject.remove("tried")
    return out


def effect(
    before: Tensor, after: Tensor, there: Tensor, which: Tensor, edited: Tensor | None = None
) -> dict[str, Measure]:
    """Of the mentions asked for (`which`), the share gone; of the true ones beside them, the share kept; and mentions
    invented instead per one asked for. edited: pictures that were edited, by default those that ask."""
    rows = (which if edited is None else edited).any(1)
    old, new, w, true = before[rows], after[rows], which[rows], there[rows]
    keep, fresh = old & true & ~w, new & ~old & ~true
    return {
        "gone": ratio((w & old & ~new).sum(1), (w & old).sum(1), "higher"),
        "kept": ratio((keep & new).sum(1), keep.sum(1), "higher"),
        "invented instead": ratio(fresh.sum(1), (w & old).sum(1), "lower"),
        "true instead": ratio((new & ~old & true).sum(1), (w & old).sum(1), "higher"),
    }


def automatic(
    subject: Subject, seen: Seen, said: Tensor, sure: Tensor, limit: float, patch: EraseEdit, rounds: int
) -> tuple[Tensor, Tensor]:
    """The automatic mode over all pictures at once: (N, C) what is named in the end, (N, C) what was erased. sure
    (N, C): the lens's confidence. Round by round as `EraseEdit.prepare` does for one row."""
    low = sure < limit
    new, flagged = said, said & low
    best, erased, least = said.clone(), torch.zeros_like(said), worth(said, low) + 0.5
    for _ in range(rounds):
        new = again(subject, seen, said, flagged, patch)
        now = worth(new, low)
        better = now < least
        best[better], erased[better], least[better] = new[better], flagged[better], now[better]
        more = flagged | (new & low)
        if torch.equal(more, flagged):
            break
        flagged = more
    return best, erased


def worth(said: Tensor, low: Tensor) -> Tensor:
    """(N,) what the automatic mode has least of: disbelieved mentions first, then what is missing of the others."""
    return ((said & low).sum(1) * 1000 - (said & ~low).sum(1)).float()


def threshold(score: Tensor, true: Tensor) -> float:
    """The limit below which a mention is taken for invented; a true one flagged costs as much as two inventions."""
    grid = score.sort().values[:: max(1, len(score) // 400)].tolist()
    return max(grid, key=lambda at: int((score[~true] < at).sum()) - 2 * int((score[true] < at).sum()))


__all__ = [
    "Mentions", "Said", "again", "attention", "automatic", "captions", "chair", "detection", "effect", "last_states",
    "lens_field", "localisation", "mentions", "presence", "probe", "threshold",
]  # fmt: skip
