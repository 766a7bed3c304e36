"""ProjectAway: erase objects from a vision-language model's image tokens (Jiang, Kachinthaya, Petryk, Gandelsman,
"Interpreting and Editing Vision-Language Representations to Mitigate Hallucinations", arXiv 2410.02762).

Each request names its own objects, so rows of one batch erase different things. An object's direction t is what the
decoder holds of its word read alone; from every image token k, the positive part of its projection is taken away:

    k <- k - weight * relu(<k, t> / <t, t>) * t            (paper, Algorithm 1, one object after the other)

at chosen depths of the decoder (0: what the projector gives; l: the output of layer l), in the prefill only. Rows
without a picture have no image tokens and are never touched.

    {"patchbay": {"ask": {"erase": ["egg", "fire truck"]}}}     these
    {"patchbay": {"ask": {"erase": "auto"}}}                    what the caption names and the tokens do not show

`auto` captions once as the base, asks the logit lens how sure the tokens are of each object named, erases those below
`limit` and captions again, up to `rounds` times; the caption with the fewest such objects stands. What was named, how
sure, what was erased and how goes into `job.told`.

Shapes: B rows, T tokens, n image tokens of a row, K objects of a row, J depths, D the decoder's width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from patches.engine.edits import Act, Edit, Inputs
from patches.engine.patch import Patch
from patches.families import pictures
from patches.families.vlm import lens
from patches.families.vlm.base import site, word_states
from patches.families.vlm.layouts import image_token, image_tokens
from registry.config import STRICT
from registry.errors import ConfigError, Invalid, PatchError

MAX_OBJECTS = 64
"""objects of one request"""
How = Literal["last", "mean", "each"]
"""how a word of several tokens becomes a direction: the state of its last token (the paper), the mean of its tokens'
states (its code's alternative), or every token a direction of its own"""
ROW, ALONG = "erase", "along"
"""row parameters: (K, J, D) directions; and, for controls, what is taken away in their place"""


@dataclass(frozen=True)
class EraseConfig:
    """Where and how strongly is erased, and what the automatic mode believes."""

    __pydantic_config__ = STRICT

    sites: tuple[tuple[str, Literal["input", "output"]], ...]
    """per depth: module path and side, "input" or "output" """
    depths: tuple[int, ...]
    """the paper's l_I, one or several"""
    text_depths: tuple[int, ...]
    """per depth: where the word's direction is taken from (the paper's l_T)"""
    image_token: int
    weight: float = 1.0
    """the paper's alpha: 1 makes tokens orthogonal to the direction, more overshoots"""
    own: bool = False
    """take the mean over `objects` out of a direction: what this word has that others have not"""
    how: How = "last"
    objects: tuple[str, ...] = ()
    """what the automatic mode looks for in captions: a name, then "|" and its synonyms"""
    limit: float = 0.1
    """a named object whose confidence is below is taken for invented"""
    lens_depths: tuple[int, ...] = (0,)
    """depths over which confidence is the maximum"""
    normed: bool = True
    """whether the lens passes states through the final norm"""
    rounds: int = 3
    """edited captions that the automatic mode looks at, at most"""

    def __post_init__(self) -> None:
        if not self.depths or not len(self.depths) == len(self.text_depths) == len(self.sites):
            raise ConfigError(f"depths={self.depths} needs as many text_depths and sites, and at least one.")
        if len(set(self.depths)) < len(self.depths):
            raise ConfigError(f"depths={self.depths} names one depth twice.")


class EraseAsk(BaseModel):
    """What a request may say."""

    model_config = ConfigDict(strict=True, extra="forbid")
    erase: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=60)]], Field(min_length=1, max_length=MAX_OBJECTS)]
        | Literal["auto", "off"]
    ) = "off"
    """objects; auto: what is named and not seen; off: the base's own answer"""
    how: How | None = None
    """How words of several tokens are erased; by default the patch's own way"""
    show: Annotated[list[Annotated[str, Field(min_length=1, max_length=60)]], Field(max_length=8)] = []
    """words whose heat-maps the answer shall hold, as PNG data URLs"""


def project_away(x: Tensor, t: Tensor, weight: float, mask: Tensor, along: Tensor | None = None) -> Tensor:
    """x (B, T, D) with the positive part along each of t (B, K, D) taken from tokens where mask (B, T) holds.

    A direction of zeros does nothing. along (B, K, D): take as much of these instead (a control).
    """
    out, on = x, mask.to(x.dtype)[..., None]
    for k in range(t.shape[1]):
        d = t[:, k].to(x)
        share = (out @ d[:, :, None]) / d.pow(2).sum(-1).clamp_min(1e-12)[:, None, None]  # (B, T, 1)
        taken = d if along is None else along[:, k].to(x)
        out = out - weight * share.relu() * on * taken[:, None]
    return out


@dataclass(frozen=True)
class EraseEdit(Patch):
    """Rows erase the objects they name. tensors: `mean` (J, D), the mean direction of `objects`, if config.own."""

    Config: ClassVar[type[Any]] = EraseConfig
    Ask: ClassVar[type[BaseModel] | None] = EraseAsk

    def edits(self) -> Sequence[Edit]:
        c, mask = self.config, functools.partial(image_tokens, token=self.config.image_token)
        return [
            Act(path, self._at(j, mask), side, alike=("erase", j, c.image_token, c.weight), prefill=True)
            for j, (path, side) in enumerate(c.sites)
        ]  # rows bring their directions, so that nothing else of a patch tells one edit from another

    def _at(self, j: int, mask: Callable[[Inputs], Tensor]) -> Callable[[Tensor, Inputs], Tensor]:
        def erase(x: Tensor, inputs: Inputs) -> Tensor:  # x (B, T, D)
            t = inputs.row(ROW)
            if t is None:
                return x
            along = inputs.row(ALONG)
            return project_away(
                x, t[:, :, j], self.config.weight, inputs.once(mask), None if along is None else along[:, :, j]
            )

        return erase

    def __post_init__(self) -> None:
        if self.config.own and "mean" not in self.tensors:
            raise PatchError("own=True needs a tensor 'mean' with one direction per depth.")

    # ---- requests ------------------------------------------------------------------------------------------------

    def params(self, ask: Any, base: Any) -> dict[str, Tensor]:
        """Row parameters of a given list. Raises Invalid for a word outside the vocabulary; auto needs `prepare`."""
        if ask.erase == "off":
            return {}
        if ask.erase == "auto":
            raise Invalid('erase: "auto" looks at the picture first; prepare the job with it.')
        return {ROW: self.directions(base, ask.erase, ask.how)}

    def directions(self, base: Any, words: Sequence[str], how: How | None = None) -> Tensor:
        """(K, J, D) float32: K is the number of words, or of their tokens if each token is erased by itself."""
        parts = [_direction(base, w.strip().lower(), self.config.text_depths, how or self.config.how) for w in words]
        out = torch.cat(parts)
        return out - self.tensors["mean"].to(out) if self.config.own else out

    def prepare(self, job: Any, ask: Any, base: Any, run: Callable[[Sequence[Any]], Any]) -> None:
        """Fill job.params and job.told. Runs other captions first in automatic mode.

        Raises Invalid for an erasure without a picture, or for a word the model does not know.
        """
        if not job.shows:
            if ask.erase != "off" or ask.show:
                raise Invalid("erase: there is no picture in this request, so there is nothing to erase from.")
            return
        if ask.erase == "off" and not ask.show:
            return
        looked = self._look(job, run)
        names: list[str] = []
        if ask.erase == "auto":
            names = self._auto(job, looked, base, run)
        elif ask.erase != "off":
            names = [w.strip().lower() for w in ask.erase]
            sure = self._sure(base, looked.seen, names)
            job.told["objects"] = [{"object": w, "confidence": round(c, 4)} for w, c in zip(names, sure, strict=True)]
        if names:
            job.params = {**job.params, ROW: self.directions(base, names, ask.how)}
        how = ask.how or self.config.how
        job.told["erased"] = [_told(base, w, how, self.config) for w in names]
        if ask.show:
            job.told["heatmaps"] = {w: self._heat(base, looked, w) for w in ask.show}

    def _look(self, job: Any, run: Callable[[Sequence[Any]], Any]) -> Any:
        """The base's own greedy answer to the same prompt, its image tokens' states kept."""
        first = _twin(job, arm=None, params={}, watch=self.config.lens_depths)
        run([first])
        if first.seen is None:
            raise first.error or PatchError("The picture could not be read; its row failed.")
        job.features, job.positions, job.delta = first.features, first.positions, first.delta
        return first

    def _auto(self, job: Any, looked: Any, base: Any, run: Callable[[Sequence[Any]], Any]) -> list[str]:
        """What to erase: named objects the tokens are not sure of, in up to `rounds` captions; of these the one that
        names the fewest such objects, since erasing one thing may bring another."""
        c = self.config
        order = [o.split("|")[0] for o in c.objects]
        flagged: list[str] = []
        sure: dict[str, float] = {}
        tried: list[tuple[tuple[int, int, bool], list[str]]] = []
        answer = looked
        for turn in range(c.rounds + 1):
            named = mentioned(base.processor.decode(answer.out, skip_special_tokens=True), c.objects)
            fresh = [o for o in named if o not in sure]
            sure |= dict(zip(fresh, self._sure(base, looked.seen, fresh), strict=True))
            doubted = [o for o in named if sure[o] < c.limit]
            tried.append(((len(doubted), len(doubted) - len(named), turn == 0), list(flagged)))
            more = [o for o in doubted if o not in flagged]
            if not more or turn == c.rounds:
                break
            flagged = sorted((*flagged, *more), key=order.index)  # erasures do not commute
            answer = _twin(job, params={ROW: self.directions(base, flagged)}, watch=())
            run([answer])
        job.told["base"] = base.processor.decode(looked.out, skip_special_tokens=True)
        job.told["objects"] = [
            {"object": o, "confidence": round(v, 4), "believed": v >= c.limit} for o, v in sure.items()
        ]
        return min(tried, key=lambda one: one[0])[1]

    def _sure(self, base: Any, seen: Tensor, words: Sequence[str]) -> list[float]:
        ids = [base.processor.word(w) for w in words]
        return lens.confidence(base, seen, ids, normed=self.config.normed).tolist()

    def _heat(self, base: Any, looked: Any, word: str) -> str:
        heat = lens.heat(base, looked.seen, [base.processor.word(word)], normed=self.config.normed)[0]
        return pictures.png(lens.picture(base, looked, heat))


# ---- words -------------------------------------------------------------------------------------------------------


def _direction(base: Any, word: str, depths: tuple[int, ...], how: How) -> Tensor:
    """(1 or tokens, J, D) of one word; kept, for words come again."""
    key = (base.digest, word, depths, how)
    found = _KNOWN.get(key)
    if found is None:
        states = word_states(base, base.processor.word(word), depths).float().cpu()  # (J, tokens, D)
        made = {"last": lambda: states[:, -1:], "mean": lambda: states.mean(1, keepdim=True), "each": lambda: states}
        found = made[how]().transpose(0, 1).contiguous()
        if len(_KNOWN) >= 4096:
            _KNOWN.clear()
        _KNOWN[key] = found
    return found


_KNOWN: dict[tuple[Any, ...], Tensor] = {}


def _told(base: Any, word: str, how: How, config: EraseConfig) -> dict[str, Any]:
    """How a word was erased, for people."""
    ids = base.processor.word(word)
    ways = {"last": "the state of its last token", "mean": "the mean of its tokens", "each": "each token by itself"}
    return {
        "object": word,
        "tokens": len(ids),
        "as": "its one token" if len(ids) == 1 else ways[how],
        "depths": list(config.depths),
        "weight": config.weight,
    }


@functools.lru_cache(64)
def _forms(objects: tuple[str, ...]) -> Mapping[str, str]:
    """word or synonym, singular and plural -> object."""
    out: dict[str, str] = {}
    for entry in objects:
        name, *others = entry.split("|")
        for form in (name, *others):
            for one in (form, *plurals(form)):
                out.setdefault(one, name)
    return out


def plurals(word: str) -> tuple[str, ...]:
    """Regular plurals of a word's last part."""
    if word.endswith(("s", "x", "ch", "sh")):
        return (word + "es",)
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return (word[:-1] + "ies",)
    if word.endswith("fe"):
        return (word + "s", word[:-2] + "ves")
    return (word + "s",)


def mentioned(text: str, objects: tuple[str, ...]) -> list[str]:
    """The objects a caption names, in order, longest names first where they overlap ("hot dog" is no dog)."""
    forms, words = _forms(objects), _words(text)
    longest = max((f.count(" ") + 1 for f in forms), default=1)
    out: list[str] = []
    i = 0
    while i < len(words):
        for n in range(min(longest, len(words) - i), 0, -1):
            name = forms.get(" ".join(words[i : i + n]))
            if name is not None:
                out += [name] if name not in out else []
                i += n - 1
                break
        i += 1
    return out


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c in "'-" else " " for c in text.lower()).split()


def _twin(job: Any, **more: Any) -> Any:
    """A row that shows what `job` shows, decoded greedily and for nobody to hear."""
    fresh: dict[str, Any] = {
        "out": [],
        "scores": [],
        "finished": None,
        "error": None,
        "told": {},
        "on_step": None,
        "seen": None,
    }
    plain = {"temperature": 0.0, "logprobs": None, "generator": None}
    return replace(job, **{**fresh, **plain, **more})


def make(base: Any, depths: Sequence[int], text_depths: Sequence[int] | None = None, **more: Any) -> EraseEdit:
    """An erasure on `base` at these depths; text_depths: by default the same. Computes `mean` if own=True."""
    where = tuple(text_depths if text_depths is not None else depths)
    config = EraseConfig(
        sites=tuple(site(base, d) for d in depths), depths=tuple(depths), text_depths=where,
        image_token=image_token(base.model), **more,
    )  # fmt: skip
    if not config.own:
        return EraseEdit(config, {})
    names = [o.split("|")[0] for o in config.objects]
    if not names:
        raise ConfigError("own=True needs objects, whose mean is taken out of each direction.")
    plain = EraseEdit(replace(config, own=False), {})
    return EraseEdit(config, {"mean": plain.directions(base, names, "last").mean(0)})


def describe(config: EraseConfig) -> dict[str, Any]:
    """What the patch is, for people and tags."""
    return {
        "op": "erase",
        "depths": ", ".join(map(str, config.depths)),
        "weight": config.weight,
        "direction": "word less the mean word" if config.own else "word",
        "auto": f"below {config.limit:.3g}, {config.rounds} rounds, {len(config.objects)} objects",
    }
