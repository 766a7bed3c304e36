"""Neuron cards: texts that describe neurons by their second-order effects, sealed with a patch, and their uses.

Per neuron (arXiv 2406.04341): its direction r, the variance of its effects along r, the norm from which an effect is
significant, the later heads that carry it, r as a sparse sum of texts, and its strongest images. Applications:

- `attributes`: texts that describe an image: each neuron with a significant effect adds x_n times its texts'
  coefficients;
- `text_maps`: where an image shows a text: patch activations of the neurons whose directions are nearest to it;
- `mine`: unrelated words that shift an image from one class to another.

Files of a sealed folder: neurons.safetensors and neurons.json. Made by `training/second_order/__init__.py`. Shapes: B
images, T tokens, N neurons, G later heads, r coordinates, k joint space, M texts, m texts per neuron, K images per
neuron.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor

from patches.evidence import content, tensors
from patches.families.base import Base
from patches.families.clip.second_order import Directions, NeuronLens, Norms, by_token, lens, look, reading, scalars
from registry.errors import BadArtifact, Invalid, NotFound

TENSORS, ABOUT = "neurons.safetensors", "neurons.json"
SEGMENT_NEURONS, MINE_NEURONS, SYNONYM = 200, 100, 0.6
"""Published settings: number of neurons that vote on a mask; number of neurons mined for a pair of classes; cosine of
texts above which a word is a synonym of a class name"""
Vote = Literal["raw", "signed", "weighted", "effect"]


@dataclass(frozen=True, eq=False)
class Layer:
    """Text descriptions of the neurons of one layer."""

    known: Directions
    """Directions, thresholds and strongest images"""
    text: Tensor
    """(N, m) int64 rows of the text pool, in the order in which they were found; -1 for none"""
    coefficient: Tensor
    """(N, m) coefficients: r is approximately the sum of coefficient * text"""
    told: Tensor
    """(N,) fraction of r's energy that the texts explain"""
    rest: Tensor
    """(N,) mean activation over tokens and images"""


@dataclass(frozen=True, eq=False)
class NeuronCards:
    """Cards of the neurons of several layers, with their text pool and thumbnails."""

    layers: Mapping[int, Layer]
    texts: tuple[str, ...]
    pool: Tensor
    """(M, k) unit embeddings of the texts"""
    thumbs: Tensor
    """(n, 3, s, s) uint8 thumbnails of the images that were read"""
    ln: Norms = "own"
    """LayerNorm centring of the lens"""

    def to(self, device: torch.device | str) -> NeuronCards:
        """Move the tensors, except the thumbnails, to `device`."""

        def moved(part: Any) -> Any:
            tensors = {f.name: getattr(part, f.name) for f in fields(part)}
            return replace(part, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})

        layers = {number: replace(moved(one), known=moved(one.known)) for number, one in self.layers.items()}
        return replace(self, layers=layers, pool=self.pool.to(device))

    def layer(self, number: int) -> Layer:
        """Return the cards of a layer. Raises NotFound naming the layers there are."""
        if number not in self.layers:
            raise NotFound(f"There are no cards of layer {number}; there are of {', '.join(map(str, self.layers))}.")
        return self.layers[number]

    def card(self, number: int, neuron: int, heads: int, texts: int = 8) -> dict[str, Any]:
        """Return the card of one neuron as plain values, images by index. heads: number per block.

        Raises NotFound naming the range.
        """
        one = self.layer(number)
        known = one.known
        if not 0 <= neuron < len(known.direction):
            raise NotFound(f"There is no neuron {neuron}; layer {number} has 0 to {len(known.direction) - 1}.")
        said = one.coefficient[neuron].abs().argsort(descending=True, stable=True)[:texts].tolist()
        words = [
            {"text": self.texts[int(one.text[neuron, i])], "coefficient": float(one.coefficient[neuron, i])}
            for i in said
            if one.text[neuron, i] >= 0
        ]
        top = known.carriers[neuron].topk(min(5, known.carriers.shape[1]))
        carriers = [
            {"layer": number + 1 + g // heads, "head": g % heads, "share": s}
            for g, s in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        seen = [
            {"picture": p, "projection": x}
            for p, x in zip(known.picture[neuron].tolist(), known.projection[neuron].tolist(), strict=True)
        ]
        return {
            "layer": number, "neuron": neuron, "texts": words, "texts_explain": float(one.told[neuron]),
            "explained": [float(v) for v in known.explained[neuron]], "directions": known.axis.shape[1],
            "explained_all": float(known.explained_all[neuron]), "threshold": float(known.threshold[neuron]),
            "spread": float(known.spread[neuron]), "mean_activation": float(one.rest[neuron]), "carriers": carriers,
            "pictures": seen,
        }  # fmt: skip


def save_neurons(cards: NeuronCards, folder: Path, shown: int = 8) -> None:
    """Write the cards: of each neuron's images the `shown` strongest, and only the thumbnails that some card shows."""
    wanted = torch.cat([one.known.picture[:, :shown].flatten() for one in cards.layers.values()]).unique()
    tensors: dict[str, Tensor] = {"pool": cards.pool, "thumbs": cards.thumbs[wanted]}
    for number, one in cards.layers.items():
        for part, owner in (("known", one.known), ("", one)):
            for f in fields(owner):
                value = getattr(owner, f.name)
                if isinstance(value, Tensor):
                    if f.name in ("picture", "projection"):
                        value = value[:, :shown]
                    if f.name == "picture":
                        value = torch.searchsorted(wanted, value.contiguous())
                    tensors[f"{number}.{part}{'.' if part else ''}{f.name}"] = value
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / TENSORS)
    seen = {str(number): one.known.seen for number, one in cards.layers.items()}
    (folder / ABOUT).write_text(json.dumps({"texts": list(cards.texts), "seen": seen, "ln": cards.ln}))


def load_neurons(folder: Path) -> NeuronCards:
    """Load the cards of an artifact. Raises NotFound if it has none, BadArtifact if they are incomplete."""
    if not (folder / TENSORS).is_file():
        raise NotFound("This artifact carries no neuron cards; fit it again with a recipe that makes them.")
    found, about = tensors(folder, TENSORS), json.loads(content(folder, ABOUT))

    def made(cls: type[Any], prefix: str, **more: Any) -> Any:
        names = [f.name for f in fields(cls) if f.name not in more]
        return cls(**{n: found[prefix + n] for n in names}, **more)

    try:
        layers = {
            int(number): made(Layer, f"{number}.", known=made(Directions, f"{number}.known.", seen=seen))
            for number, seen in about["seen"].items()
        }
        return NeuronCards(layers, tuple(about["texts"]), found["pool"], found["thumbs"], about["ln"])
    except KeyError as e:
        raise BadArtifact(f"The neuron cards in {folder.name} lack {e}.") from None


# ---- what a picture shows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reader:
    """Neuron cards together with the lenses of their layers on one base."""

    base: Base
    cards: NeuronCards
    lenses: Mapping[int, NeuronLens]

    @classmethod
    def of(cls, base: Base, cards: NeuronCards) -> Reader:
        """Build a reader on the base's device.

        The lenses' large bases are dropped, since only norms and projections are read.
        """
        lenses = {number: lens(base, number, cards.ln) for number in cards.layers}
        small = {number: replace(at, basis=at.basis.new_empty(0)) for number, at in lenses.items()}
        return cls(base, cards.to(base.device), small)

    def heads(self) -> int:
        """Number of attention heads of one block."""
        return next(iter(self.lenses.values())).heads


@dataclass(frozen=True)
class Attribute:
    """A text that describes an image, with the neurons that support it."""

    text: str
    weight: float
    neurons: tuple[tuple[int, int, float], ...]
    """(layer, neuron, contribution), largest first"""


@torch.inference_mode()
def attributes(reader: Reader, x: Tensor, top: int = 16, evidence: int = 5) -> tuple[list[list[Attribute]], list[int]]:
    """Describe images (B, 3, h, w) by their top texts; also return the number of significant neurons per image.

    A neuron counts where its effect reaches its threshold; it adds x_n a_nj to text j.
    """
    cards, seen = reader.cards, look(reader.base, x, list(reader.cards.layers))
    M, B = len(cards.texts), len(x)
    weight = torch.zeros(B, M, device=seen.y.device)
    active: dict[int, Tensor] = {}
    for number, one in cards.layers.items():
        s = scalars(seen, number)
        counts = one.known.significant(one.known.centred(reader.lenses[number], s)).T  # (B, N)
        active[number] = one.known.projections(s) * counts
        said = active[number] @ _dense(one, M)
        weight += said
    out = []
    for b in range(B):
        picked = weight[b].abs().topk(min(top, M)).indices.tolist()
        picked.sort(key=lambda j: -float(weight[b, j]))
        row = [
            Attribute(
                cards.texts[j], float(weight[b, j]), _evidence(cards, {n: a[b] for n, a in active.items()}, j, evidence)
            )
            for j in picked
            if weight[b, j] != 0
        ]
        out.append(row)
    return out, [sum(int((a[b] != 0).sum()) for a in active.values()) for b in range(B)]


def _dense(one: Layer, M: int) -> Tensor:
    """Scatter sparse coefficients into (N, M), zero for texts a neuron does not have."""
    out = one.coefficient.new_zeros(len(one.text), M + 1)
    return out.scatter_add_(1, torch.where(one.text < 0, M, one.text), one.coefficient)[:, :M]


def _evidence(
    cards: NeuronCards, amount: Mapping[int, Tensor], j: int, count: int
) -> tuple[tuple[int, int, float], ...]:
    """Return the neurons that contribute most to text j. amount: layer -> (N,) factor of each neuron's coefficients."""
    found = []
    for number, one in cards.layers.items():
        n, i = torch.where(one.text == j)
        adds = amount[number][n] * one.coefficient[n, i]
        found += [(number, int(a), float(v)) for a, v in zip(n, adds, strict=True) if v != 0]
    return tuple(sorted(found, key=lambda e: -abs(e[2]))[:count])


# ---- where a picture shows something -----------------------------------------------------------------------------


def voters(cards: NeuronCards, text: Tensor, count: int = SEGMENT_NEURONS) -> list[tuple[int, Tensor, Tensor]]:
    """Select the `count` neurons with the largest |<r_n, t>| for a text t (k,): (layer, neurons, <r_n, t>)."""
    say = {number: one.known.direction @ text for number, one in cards.layers.items()}
    whole = torch.cat(list(say.values()))
    if not 1 <= count <= len(whole):
        raise Invalid(f"neurons={count}: these cards have {len(whole)}; take 1 to {len(whole)}.")
    chosen = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
    chosen[whole.abs().topk(count).indices] = True
    out, at = [], 0
    for number, values in say.items():
        n = chosen[at : at + len(values)].nonzero()[:, 0]
        out.append((number, n, values[n]))
        at += len(values)
    return [each for each in out if len(each[1])]


@torch.inference_mode()
def text_maps(reader: Reader, x: Tensor, texts: Tensor, count: int = SEGMENT_NEURONS, vote: Vote = "raw") -> Tensor:
    """Compute heat maps (B, n, rows, columns) of where images (B, 3, h, w) show each of `texts` (n, k).

    vote: raw, as published: mean activation of the voters, whatever their sign; signed: times the sign of <r_n, t>;
    weighted: times <r_n, t>; effect: the contributions of all neurons to <y, t> through later heads, by the token at
    which they fire (`count` is unused). Scale and offset are arbitrary: subtracting each neuron's mean would only shift
    the map.
    """
    visual = reader.base.model.visual
    seen = look(reader.base, x, list(reader.cards.layers))
    rows, columns = visual.grid_size
    out = []
    if vote == "effect":
        said = [
            by_token(seen, number, reading(reader.base, number, texts, reader.cards.ln)) for number in reader.lenses
        ]
        return torch.stack(said).sum(0)[..., 1:].unflatten(2, (rows, columns))
    for t in texts:
        total = torch.zeros(len(x), rows * columns, device=seen.y.device)
        for number, n, say in voters(reader.cards, t.to(reader.cards.pool), count):
            p = seen.p[number][:, 1:, n]  # (B, patches, n)
            weight = torch.ones_like(say) if vote == "raw" else say.sign() if vote == "signed" else say
            total += p @ weight
        out.append(total / count)
    return torch.stack(out, 1).unflatten(2, (rows, columns))


# ---- what a class is mistaken for --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mined:
    """A word that is evidence for the wrong class."""

    text: str
    weight: float
    neurons: tuple[tuple[int, int, float], ...]
    """(layer, neuron, contribution), largest first"""


def mine(
    cards: NeuronCards, true: Tensor, wrong: Tensor, count: int = MINE_NEURONS, top: int = 50,
    blocked: Collection[str] = (), synonym: float = SYNONYM, evidence: int = 5,
    neurons: Sequence[tuple[int, Tensor]] | None = None,
) -> tuple[list[Mined], list[str]]:  # fmt: skip
    """Mine words for a pair of classes, largest weight first; also return those left out as synonyms of a class name.

    true, wrong: (k,) unit embeddings of the classes. The `count` neurons with the largest |<r_n, wrong - true>| vote:
    word j has weight sum_n a_nj <r_n, wrong - true>. Left out: words that share a word with `blocked`, or whose centred
    embedding has a cosine of at least `synonym` with a class's. neurons: (layer, rows) to use instead, for controls.
    """
    delta = (wrong - true).to(cards.pool)
    chosen = neurons or [(number, n) for number, n, _ in voters(cards, delta, count)]
    amount = {number: torch.zeros(len(one.text)).to(cards.pool) for number, one in cards.layers.items()}
    for number, n in chosen:
        amount[number][n] = cards.layers[number].known.direction[n] @ delta
    weight = torch.zeros(len(cards.texts)).to(cards.pool)
    for number, one in cards.layers.items():
        weight += amount[number] @ _dense(one, len(cards.texts))
    middle = cards.pool.mean(0)
    classes = nnf.normalize(torch.stack([true, wrong]).to(cards.pool) - middle, dim=1)
    near = (nnf.normalize(cards.pool - middle, dim=1) @ classes.T).amax(1) >= synonym
    taken = {w for b in blocked for w in b.lower().split()}
    out: list[Mined] = []
    left: list[str] = []
    for j in weight.argsort(descending=True, stable=True).tolist():
        if weight[j] <= 0 or len(out) == top:
            break
        text = cards.texts[j]
        if near[j] or set(text.lower().split()) & taken:
            left.append(text)
            continue
        out.append(Mined(text, float(weight[j]), _evidence(cards, amount, j, evidence)))
    return out, left
