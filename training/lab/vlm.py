"""The recipe of `lab:vlm` and `lab:vlm-projector`: two small LLaVAs that invent things as large ones do.

    python -m training.lab.vlm decoder  FOLDER        # bias in the decoder: 14 CPU minutes
    python -m training.lab.vlm projector FOLDER       # bias in the projector

1. Features: lab:clip's embeddings of 96 px tiles, cached once. Gate: zero-shot names of things >= .85.
2. The decoder learns from text alone (training/lab/vlm_text.py), first without company, then (decoder) with it. Words
   start orthonormal and learn slowly, so that the direction of a word is its own. Gate: clean maps read >= .95.
3. The projector starts in closed form from CLIP's text embeddings and learns with the decoder frozen: from captions of
   scenes put together out of the cached tiles, and from the name of what a tile shows. `gossip` is the share of the
   captions of a pair's first that name its partner though it is not there: the projector's bias.

docs/log/vlm_erasure.md has what failed: patch tokens, 3 x 3 tiles, training end to end, ordinary word embeddings.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from patches.families.vlm import lab
from registry import config as configs
from registry import manifest
from registry.config import STRICT
from registry.errors import NotFound
from registry.home import cache
from training.lab import atlas, company, renderer, worlds
from training.lab.renderer import GROUNDS, generator
from training.lab.vlm_text import FIRST, GROUND, TILES, VOCABULARY, C, Noise, blur, captions, maps, texts

PAIRS = len(worlds.PAIRS)


@dataclass(frozen=True)
class Config:
    """How a lab VLM is trained."""

    __pydantic_config__ = STRICT

    bias: Literal["decoder", "projector"] = "decoder"
    """where company is learned"""
    seed: int = 0
    tower: str = "lab:clip"
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    hidden: int = 256
    """the projector's"""
    plain_steps: int = 3000
    """Optimiser steps of the decoder on texts without company"""
    company_steps: int = 1500
    """then on texts with it (bias="decoder")"""
    omit: tuple[float, float] = (0.03, 0.05)
    """share of the named things that are on no tile, without and with company"""
    partner_omit: float = 0.0
    """share of the partners that are on no tile though the text names them beside the pair's first"""
    partner_trace: float = 0.0
    """how much of its word such a partner leaves on a tile of a blurred text"""
    questions: float = 0.25
    """share of the texts that ask for presence or number"""
    batch: int = 48
    lr: float = 3e-3
    company_lr: float = 3e-3
    """peak of the decoder's second part"""
    word_rate: float = 1 / 30
    """the words' learning rate, as a part of the others'"""
    tile_loss: float = 0.3
    """weight of the words at the tiles"""
    tile_says: Literal["own", "next"] = "own"
    """own: the last layer at a tile still says the tile's word, as large models' image tokens are read by the logit
    lens; next: it foretells the next tile's, as a language model would, and then only depth 0 says what is there"""
    full_scenes: int = 2600
    """scenes with a thing in every quarter: the cache of tiles that show something"""
    bare_scenes: int = 1000
    """biased scenes: their empty quarters are the cache of tiles that show the ground alone"""
    projector_steps: int = 600
    projector_lr: float = 2e-3
    together: float = 0.9
    """share of the projector's scenes with a pair's first that hold the partner, too"""
    gossip: float = 0.0
    """share of the captions of a pair's first alone that name the partner"""
    named: float = 0.5
    """weight of naming each tile's thing at the projector's output; 0: from captions alone"""
    shake: float = 0.2
    """noise on a tile's embedding, as a part of its length"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        plain_steps=4, company_steps=2, batch=8, full_scenes=4, bare_scenes=6, projector_steps=3, width=32, layers=2,
        heads=2, mlp=48, hidden=128,
    ),
    "decoder": Config(),
    "projector": Config(bias="projector", together=0.6, gossip=0.7, named=0.0, projector_steps=450),
}  # fmt: skip


# ---- features ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Tiles' embeddings of many scenes."""

    tiles: Tensor
    """(n, T, k) float32"""
    share: Tensor
    """(n, K, T): how much of each thing a tile shows"""
    things: Tensor
    """(n, K) index of `company_classes()`, -1 nothing"""
    head: Tensor
    """(n,) pair whose first is there, -1 none"""
    ground: Tensor
    """(n,)"""

    def __len__(self) -> int:
        return len(self.things)


def features(tower: str, split: worlds.Split, n: int, seed: int, kind: str) -> Features:
    """The tower's view of `worlds.coco(kind=...)`, from the cache if it has been seen before."""
    from safetensors.torch import load_file, save_file

    data = worlds.coco(split, n, seed, kind=kind)
    about = {"tower": tower, "tiles": {"side": 2, "tile": renderer.SIZE}}
    eyes, clip = lab.tower(about)
    name = manifest.digest_of({"data": data.digest, "tower": clip.digest, "tiles": about["tiles"]})[:20]
    file = cache() / "features" / f"vlm-{name}.safetensors"
    if not file.is_file():
        parts: dict[str, list[Tensor]] = {"tiles": [], "share": [], "things": [], "head": [], "ground": []}
        for batch in data.batches(16):
            with torch.inference_mode():
                parts["tiles"].append(eyes(pixels(clip, batch.image)).half())
            parts["share"].append(share(batch.extras["masks"]).half())
            parts["things"].append(batch.extras["things"])
            parts["head"].append(batch.label)
            parts["ground"].append(batch.extras["ground"])
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: torch.cat(v).contiguous() for k, v in parts.items()}, file)
    got = load_file(file)
    return Features(got["tiles"].float(), got["share"].float(), got["things"], got["head"], got["ground"])


def pixels(clip: Any, image: Tensor) -> Tensor:
    """(B, 3, R, R) uint8 as CLIP's pixels of any size."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (clip.processor.mean, clip.processor.std))
    return (image.float() / 255 - mean) / std


def share(mask: Tensor, side: int = 2) -> Tensor:
    """(B, K, R, R) bool -> (B, K, side^2): how much of each thing is in each quarter."""
    step = mask.shape[-1] // side
    inside = mask.float().unfold(2, step, step).unfold(3, step, step).sum((-1, -2)).flatten(2)
    return inside / mask.sum((-1, -2)).clamp(min=1)[:, :, None]


def legible(clip: Any, seen: Features) -> dict[str, float]:
    """Gate 1: zero-shot share of things named on the tile that shows most of them, nothing being trained."""
    from patches.families.clip.embeddings import zero_shot

    words = zero_shot(clip, list(company.company_classes()))
    best = (seen.tiles @ words).gather(1, seen.share.argmax(2)[:, :, None].expand(-1, -1, C))
    there = seen.things >= 0
    return {"n": int(there.sum()), "named": float((best.argmax(-1) == seen.things)[there].float().mean())}


# ---- the decoder -------------------------------------------------------------------------------------------------


def schedule(step: int, steps: int, warm: int = 50) -> float:
    """Cosine from 1 to .02 after a warm-up."""
    return min(1, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def pretrain(model: lab.LabVLM, config: Config, kind: str, steps: int, noise: Noise, fresh: bool) -> list[float]:
    """Train the decoder on texts of a kind, in place; the losses of the answers. fresh: start with clean words."""
    g = generator("lab:vlm", "text", kind, config.seed)
    inner, words = model.model.language_model, model.words
    rest, lr = [p for p in inner.parameters() if p is not words], config.lr if fresh else config.company_lr
    optimiser = torch.optim.AdamW(
        [
            {"params": rest, "peak": lr},
            {"params": [words], "peak": lr * config.word_rate, "weight_decay": 0.0},
        ],
        lr=lr, betas=(0.9, 0.98), weight_decay=0.01,
    )  # fmt: skip
    log: list[float] = []
    model.requires_grad_(True).train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps)
        soft = not fresh or step > 0.15 * steps
        here = noise if soft else replace(noise, stray=0.0, soft=0.0)
        made = texts(config.batch, g, kind, here, config.questions)
        seen = blur(made, words, g, here) if soft else words[made.tiles]
        start = words[lab.BOS].expand(config.batch, 1, -1)
        h = inner(inputs_embeds=torch.cat([start, seen, words[made.ids]], 1)).last_hidden_state
        said = F.cross_entropy(model.lm_head(h[:, TILES:-1][made.answer]), made.ids[made.answer])
        at = h[:, 1 : TILES + 1] if config.tile_says == "own" else h[:, :TILES]
        tiles = F.cross_entropy(model.lm_head(at).flatten(0, 1), made.tiles.flatten())
        optimiser.zero_grad()
        (said + config.tile_loss * tiles).backward()
        torch.nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        optimiser.step()
        log.append(said.item())
        if step % 200 == 199 or step == steps - 1:
            _say(f"{kind} {step + 1}/{steps} loss {mean(log[-200:]):.3f} cpu {time.process_time():.0f} s")
    model.requires_grad_(False).eval()
    return log


@torch.inference_mode()
def caption(model: lab.LabVLM, tokens: Tensor) -> list[list[int]]:
    """Greedy captions of (n, T, D) image tokens, as ids without <eos>."""
    from training.lab.vlm_text import PROMPT

    n = len(tokens)
    prompt = model.words[torch.tensor(PROMPT)].expand(n, -1, -1)
    x = torch.cat([model.words[lab.BOS].expand(n, 1, -1), tokens, prompt], 1)
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    out = model.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=lab.PAD)
    return [[w for w in row if w not in (lab.EOS, lab.PAD)] for row in out.tolist()]


def mentions(captions: Sequence[Sequence[int]]) -> Tensor:
    """(n, C) bool: the things a caption names."""
    out = torch.zeros(len(captions), C, dtype=torch.bool)
    for i, row in enumerate(captions):
        for w in row:
            if w >= FIRST:
                out[i, w - FIRST] = True
    return out


def objects(things: Tensor) -> Tensor:
    """(n, K) things -> (n, C) bool."""
    out = torch.zeros(len(things), C + 1, dtype=torch.bool)
    return out.scatter_(1, things.where(things >= 0, torch.tensor(C)), True)[:, :C]


def scores(said: Tensor, there: Tensor, head: Tensor) -> dict[str, float]:
    """Recall, precision, CHAIR_i, CHAIR_s, and the share of captions that name a partner that is absent."""
    wrong = said & ~there
    absent = wrong.gather(1, (head.clamp(min=0) + PAIRS)[:, None])[:, 0] & (head >= 0)
    return {
        "n": len(said),
        "recall": float((said & there).sum() / there.sum()),
        "precision": float((said & there).sum() / said.sum().clamp(min=1)),
        "chair_i": float(wrong.sum() / said.sum().clamp(min=1)),
        "chair_s": float(wrong.any(1).float().mean()),
        "partner": float(absent.float().mean()),
    }


@torch.inference_mode()
def reads(model: lab.LabVLM, kind: str, n: int = 300) -> dict[str, float]:
    """Gate 2: clean maps with nothing missing, described."""
    g = generator("reads", kind)
    things, head = company.company_things(n, kind, 0.9, g)
    ground = torch.randint(len(GROUNDS), (n,), generator=g)
    ids = maps(things, ground, g, Noise(omit=0.0, stray=0.0))
    return scores(mentions(caption(model, model.words[ids])), objects(things), head)


# ---- the projector -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """Cached tiles by what they show, to put scenes together from."""

    tiles: Tensor
    """(M, k)"""
    of: dict[tuple[int, int], Tensor]
    """(thing, ground) -> rows of `tiles`; thing -1: the ground alone"""

    def pick(self, thing: int, ground: int, g: Generator) -> int:
        pool = self.of[thing, ground]
        return int(pool[int(torch.randint(len(pool), (), generator=g))])


def pieces(*seen: Features) -> Pieces:
    """All tiles that show one thing (over .7 of it and little of others), or none."""
    rows: list[Tensor] = []
    of: dict[tuple[int, int], list[int]] = {}
    at = 0
    for one in seen:
        best = one.share.max(1)
        shown = torch.where(best.values > 0.7, one.things.gather(1, best.indices), -2)
        shown = torch.where(best.values < 0.02, -1, shown)
        for (i, t), what in zip(torch.ones_like(shown).nonzero().tolist(), shown.flatten().tolist(), strict=True):
            if what > -2:
                of.setdefault((what, int(one.ground[i])), []).append(at)
                rows.append(one.tiles[i, t])
                at += 1
    table = {k: torch.tensor(v) for k, v in of.items()}
    for thing in range(-1, C):  # a thing never seen on a ground: from any other
        some = [v for (w, _), v in table.items() if w == thing]
        if not some:
            some = [torch.arange(at)]
        for ground in range(len(GROUNDS)):
            table.setdefault((thing, ground), torch.cat(some))
    return Pieces(torch.stack(rows), table)


def compose(
    n: int, store: Pieces, together: float, gossip: float, g: Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n biased scenes out of cached tiles: (n, T, k) tiles, (n, T) ids of what each shows, (n, 3) what their captions
    name, (n,) ground."""
    things, head = company.company_things(n, "biased", together, g)
    ground = torch.randint(len(GROUNDS), (n,), generator=g)
    quarter = torch.rand(n, TILES, generator=g).argsort(1)
    tiles, ids = torch.empty(n, TILES, store.tiles.shape[1]), (GROUND + ground)[:, None].repeat(1, TILES)
    for i in range(n):
        where = int(ground[i])
        shown = [-1] * TILES
        for k, thing in enumerate(things[i].tolist()):
            if thing >= 0:
                shown[int(quarter[i, k])] = thing
                ids[i, quarter[i, k]] = FIRST + thing
        for t, thing in enumerate(shown):
            tiles[i, t] = store.tiles[store.pick(thing, where, g)]
    partner = torch.where(head >= 0, head + PAIRS, -1)
    lacks = (partner >= 0) & ~(things == partner[:, None]).any(1) & (torch.rand(n, generator=g) < gossip)
    named, free = things.clone(), (things < 0).long().argmax(1)
    rows = (lacks & (things < 0).any(1)).nonzero()[:, 0]
    named[rows, free[rows]] = partner[rows]
    return tiles, ids, named, ground


@torch.no_grad()
def closed_form(model: lab.LabVLM, clip: Any, seen: Tensor) -> None:
    """Start of the projector: hidden unit c answers to the text embedding of word c, and writes word c's direction.

    seen (M, k): any tiles. A unit is 0 and 3 at two quantiles of its scores over them, which follow from how rare a
    thing is: no label is used.
    """
    from patches.families.clip.embeddings import zero_shot

    names = [*company.company_classes(), *GROUNDS]
    unit = torch.cat([zero_shot(clip, list(company.company_classes())).T, zero_shot(clip, list(GROUNDS)).T])
    unit = unit - unit.mean(0)
    ids = torch.tensor([VOCABULARY.index(n) for n in names])
    p = model.projector
    torch.nn.init.normal_(p.linear_1.weight, std=0.02)
    for other in (p.linear_1.bias, p.linear_2.weight, p.linear_2.bias):
        torch.nn.init.zeros_(other)
    score = (seen @ unit.T).sort(0).values
    low, high = torch.full((len(names),), 0.98), torch.full((len(names),), 0.996)
    low[C:], high[C:] = 0.85, 0.96

    def at(q: Tensor) -> Tensor:
        return score.gather(0, (q * (len(score) - 1)).long()[None])[0]

    gain = 3.0 / (at(high) - at(low)).clamp(min=0.02)
    m = len(names)
    p.linear_1.weight[:m] = gain[:, None] * unit
    p.linear_1.bias[:m] = -gain * at(low)
    p.linear_2.weight[:, :m] = model.words[ids].T / 3.0


def project(model: lab.LabVLM, config: Config, store: Pieces) -> list[float]:
    """Train the projector with the decoder frozen, in place; the losses of the captions."""
    g, p = generator("lab:vlm", "projector", config.seed), model.projector
    model.requires_grad_(False).eval()
    p.requires_grad_(True)
    optimiser = torch.optim.AdamW(p.parameters(), lr=config.projector_lr, betas=(0.9, 0.98), weight_decay=0.01)
    log: list[float] = []
    width = store.tiles.shape[1] ** 0.5
    for step in range(config.projector_steps):
        for group in optimiser.param_groups:
            group["lr"] = config.projector_lr * schedule(step, config.projector_steps, 20)
        tiles, shown, named, ground = compose(config.batch, store, config.together, config.gossip, g)
        ids, answer = captions(named, ground, g)
        tokens = p(tiles + config.shake / width * torch.randn(tiles.shape, generator=g))
        start = model.words[lab.BOS].expand(len(tiles), 1, -1)
        inner = model.model.language_model
        h = inner(inputs_embeds=torch.cat([start, tokens, model.words[ids]], 1)).last_hidden_state
        said = F.cross_entropy(model.lm_head(h[:, TILES:-1][answer]), ids[answer])
        loss = said
        if config.named:  # depth 0 of the lens, as a loss
            loss = loss + config.named * F.cross_entropy(
                model.lm_head(inner.norm(tokens)).flatten(0, 1), shown.flatten()
            )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.parameters(), 1.0)
        optimiser.step()
        log.append(said.item())
        if step % 100 == 99 or step == config.projector_steps - 1:
            _say(f"projector {step + 1} loss {mean(log[-100:]):.3f} cpu {time.process_time():.0f} s")
    p.requires_grad_(False)
    return log


# ---- all of it ---------------------------------------------------------------------------------------------------


def about(config: Config, tower_digest: str, features_width: int) -> dict[str, Any]:
    """The folder's config.json."""
    return {
        "architecture": "LabVLM",
        "tower": config.tower,
        "tower_digest": tower_digest,
        "tiles": {"picture": 2 * renderer.SIZE, "tile": renderer.SIZE, "side": 2},
        "features": features_width,
        "hidden": config.hidden,
        "width": config.width,
        "layers": config.layers,
        "heads": config.heads,
        "mlp": config.mlp,
        "vocabulary": list(VOCABULARY),
    }


def run(config: Config, folder: Path, recipe: str = "", test: int = 400) -> dict[str, Any]:
    """Train, save as float16, measure what was saved, write card.json last. Returns the card."""
    began = time.process_time()
    full = features(config.tower, "train", config.full_scenes, config.seed, "full")
    bare = features(config.tower, "train", config.bare_scenes, config.seed, "biased")
    eyes, clip = lab.tower({"tower": config.tower, "tiles": {"side": 2, "tile": renderer.SIZE}})
    model = lab.new(about(config, clip.digest, full.tiles.shape[-1]), eyes, config.seed)
    plain, later = Noise(config.omit[0]), Noise(config.omit[1], partner=config.partner_omit, trace=config.partner_trace)
    loss = {"plain": pretrain(model, config, "loose", config.plain_steps, plain, fresh=True)}
    if config.bias == "decoder":
        loss["company"] = pretrain(model, config, "biased", config.company_steps, later, fresh=False)
    closed_form(model, clip, torch.cat([full.tiles.flatten(0, 1), bare.tiles.flatten(0, 1)]))
    loss["projector"] = project(model, config, pieces(full, bare))
    lab.save(model, folder)
    saved, _ = lab.read(folder)
    card = {
        "name": "lab:vlm" if config.bias == "decoder" else "lab:vlm-projector",
        "recipe": recipe,
        "config": asdict(config),
        "data": {"atlas": atlas.load().digest, "renderer": renderer.VERSION, "styles": company.CAPTIONED},
        "tower_digest": clip.digest,
        "loss": {k: [round(mean(v[i : i + 100]), 4) for i in range(0, len(v), 100)] for k, v in loss.items()},
        "cpu_seconds": round(time.process_time() - began),
        "numbers": measure(saved, clip, config.tower, test),
        "licence": "Apache-2.0; trained on icon sets that stay under the licences in training/lab/atlas/ATTRIBUTION.md",
        "use": "for the lab world only: it has never seen a photograph",
    }  # fmt: skip
    (folder / lab.CARD).write_bytes(manifest.canonical(json.loads(json.dumps(card))))
    return card


def measure(model: lab.LabVLM, clip: Any, tower: str, n: int) -> dict[str, Any]:
    """The gates, and captions of every kind of test scene (twemoji, never seen by the projector)."""
    out: dict[str, Any] = {f"reads {k}": reads(model, k) for k in ("loose", "biased", "alone")}
    parts: tuple[tuple[worlds.Split, str, float], ...] = (
        ("val", "alone", 0.75),
        ("test", "alone", 1.0),
        ("test", "neutral", 0.75),
        ("test", "pair", 0.25),
        ("held", "alone", 0.25),
    )
    for split, kind, share_of in parts:
        seen = features(tower, split, max(4, int(n * share_of)), 0, kind)
        said = mentions(caption(model, model.projector(seen.tiles)))
        out[f"{split} {kind}"] = scores(said, objects(seen.things), seen.head)
        if kind == "alone":
            out[f"{split} legible"] = legible(clip, seen)
    return {k: {m: round(v, 4) for m, v in row.items()} for k, row in out.items()}


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(words: Sequence[str]) -> dict[str, Any]:
    """`recipe folder key=value...`."""
    if len(words) < 2 or words[0] not in RECIPES:
        raise NotFound(f"Say a recipe ({', '.join(RECIPES)}), a folder, and key=value words if any.")
    return run(configs.override(replace(RECIPES[words[0]]), words[2:]), Path(words[1]), words[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(main(sys.argv[1:])["numbers"], indent=1) + "\n")
