"""Scorers: how well texts fit an item. One contract; features of texts are kept, so that a text is encoded once.

    CLIP on a picture, or over the frames of a clip      Clip, inputs {"pixels": (T, 3, H, W)}
    CLIP on a picture and, part by part, on its crops    Cropped, the same
    sums of pictures and words in CLIP's space           Clip, inputs {"plus": [...], "minus": [...]}
    CLAP on a sound                                      Clap, inputs {"sound": (samples,)}
    a picture and a sound together                       Both
    how well what a prompt draws fits another prompt     Preference, inputs {"goal": text}
    how much an edited picture looks like another        Style, inputs {"style": pixels, "content": pixels}

Texts are encoded in batches of one shape, whatever is asked for, so that a text's features do not depend on which texts
came with it; products with targets are formed in float64. Both make a trace independent of how items were batched.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator as Slices
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patches.engine.patch import Applied
from patches.families.base import Base
from patches.families.search.bank import things
from registry.errors import Invalid

BATCH = 32
"""texts in one forward, always"""
MAX_PICTURES = 4096
"""pictures whose embeddings are kept; a base beside a challenger, and the arms of an evaluation, see the same ones"""
MAX_TEXTS = 200_000
"""texts whose features are kept; beyond that the older half is forgotten"""


@dataclass(frozen=True, eq=False)
class Target:
    """What the texts of one item are scored against."""

    vector: Tensor
    """(k,) float32 on the CPU"""
    scope: str = ""
    """features of texts belong to this item alone (edits of its picture); "" if they are everybody's"""
    content: Tensor | None = None
    """Style: what is edited"""
    crops: Tensor | None = None
    """(n, k) float32: Cropped, the picture's crops"""


class Features:
    """Features (n, k) of texts by (scope, text); the newest MAX_TEXTS. Kept in numpy, which no inference mode marks."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], int] = {}
        self.table = np.zeros((0, 0), np.float32)

    def add(self, scope: str, texts: Sequence[str], features: Tensor) -> None:
        if len(self.rows) + len(texts) > MAX_TEXTS:
            self._forget()
        n, k = len(self.rows), features.shape[1]
        if n + len(texts) > len(self.table) or self.table.shape[1] != k:
            grown = np.zeros((max(1024, 2 * len(self.table), n + len(texts)), k), np.float32)
            if n:
                grown[:n] = self.table[:n]
            self.table = grown
        for text, row in zip(texts, features.numpy(), strict=True):
            at = self.rows.setdefault((scope, text), len(self.rows))
            self.table[at] = row

    def get(self, scope: str, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.table[[self.rows[scope, t] for t in texts]])

    def _forget(self) -> None:
        newer = list(self.rows.items())[len(self.rows) // 2 :]
        self.table = self.table[[at for _, at in newer]].copy()
        self.rows = {key: i for i, (key, _) in enumerate(newer)}

    def clear(self) -> None:
        self.rows.clear()


class Scorer(ABC):
    """Scores texts against targets; higher is better. One belongs to one thread."""

    def __init__(self) -> None:
        self.kept = Features()
        self.encoded = 0
        """texts that went through the encoder, ever"""

    @abstractmethod
    def target(self, inputs: Mapping[str, Any]) -> Target:
        """What an item's texts are scored against. Raises Invalid for inputs of another kind, naming them."""

    def aiming(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Slices of work after which `target` is quick. Raises as `target`."""
        yield

    @abstractmethod
    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        """Features (n, k) float32, on the CPU, of at most BATCH texts."""

    def missing(self, target: Target, texts: Sequence[str]) -> list[str]:
        """The texts that were not encoded yet, each once."""
        return [t for t in dict.fromkeys(texts) if (target.scope, t) not in self.kept.rows]

    def fill(self, target: Target, texts: Sequence[str]) -> None:
        """Encode and keep at most BATCH texts: one bounded slice of work."""
        self.kept.add(target.scope, texts, self.encode(texts, target))
        self.encoded += len(texts)

    def filling(self, target: Target, texts: Sequence[str]) -> Iterator[None]:
        """`fill` for any number of texts, in bounded slices."""
        for i in range(0, len(texts), BATCH):
            self.fill(target, texts[i : i + BATCH])
            yield

    def score(self, target: Target, texts: Sequence[str]) -> list[float]:
        """Scores of texts whose features are kept; what was forgotten meanwhile is encoded again."""
        if not texts:
            return []
        for _ in self.filling(target, self.missing(target, texts)):
            pass
        made: list[float] = self.compare(self.kept.get(target.scope, texts).double(), target).tolist()
        return made

    def compare(self, features: Tensor, target: Target) -> Tensor:
        """(n,) float64 scores of features (n, k) float64."""
        return features @ target.vector.double()

    def __call__(self, target: Target, texts: Sequence[str]) -> list[float]:
        """`score`, for those who do not cut their work into slices."""
        return self.score(target, texts)


def _tensors(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else ()


class Clip(Scorer):
    """Cosine of a text and a picture, of a text and the mean of a clip's frames, or of a text and a sum."""

    def __init__(self, base: Base, applied: Applied | None = None, arm: str | None = None) -> None:
        super().__init__()
        self.base, self.applied, self.arm = base, applied, arm
        self.looked: dict[bytes, Tensor] = {}
        """hash of one frame or crop -> its embedding (1, k)"""

    def target(self, inputs: Mapping[str, Any]) -> Target:
        if "pixels" in inputs:
            return Target(self.images(inputs["pixels"]))
        if "plus" in inputs:
            total = sum(self._part(p) for p in inputs["plus"]) - sum(self._part(p) for p in inputs.get("minus", ()))
            if float(torch.as_tensor(total).norm()) < 1e-4:
                raise Invalid("The sum of these parts is nothing: what is added is taken away again.")
            return Target(F.normalize(torch.as_tensor(total), dim=0))
        raise Invalid(
            f"This scorer looks at pictures and clips; it was given {', '.join(sorted(inputs)) or 'nothing'}."
        )

    def _part(self, part: Any) -> Tensor:
        return self.encode([part], Target(torch.zeros(0)))[0] if isinstance(part, str) else self.images(part)

    def aiming(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        for part in (*_tensors(inputs.get("pixels")), *inputs.get("plus", ()), *inputs.get("minus", ())):
            for x in () if isinstance(part, str) else self._checked(part):
                self._look(x)
                yield
        yield

    def images(self, pixels: Tensor) -> Tensor:
        """(k,) of unit norm: the mean of the embeddings of frames (T, 3, H, W), one at a time."""
        return F.normalize(torch.cat([self._look(x) for x in self._checked(pixels)]).mean(0), dim=0)

    def _checked(self, pixels: Tensor) -> Tensor:
        want = (3, *self.base.processor.size)
        if pixels.ndim != 4 or not len(pixels) or tuple(pixels.shape[1:]) != want or not bool(pixels.isfinite().all()):
            raise Invalid(f"Frames must be finite numbers of shape (T, {want[0]}, {want[1]}, {want[2]}), "
                          f"not {tuple(pixels.shape)}.")  # fmt: skip
        return pixels

    @torch.inference_mode()
    def _look(self, x: Tensor) -> Tensor:
        """(1, k) of unit norm, of one picture (3, H, W), embedded alone."""
        key = hashlib.sha256(x.contiguous().cpu().numpy().tobytes()).digest()
        if key not in self.looked:
            while len(self.looked) >= MAX_PICTURES:
                self.looked.pop(next(iter(self.looked)))
            self.looked[key] = self._forward(image=x[None].to(self.base.device, self.base.model.visual.proj.dtype))
        return self.looked[key]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        padded = [*texts, *[texts[0]] * (BATCH - len(texts))]
        return self._forward(text=self.base.processor.text(padded).to(self.base.device))[: len(texts)]

    def _forward(self, **inputs: Tensor) -> Tensor:
        key = next(iter(inputs))
        if self.applied is None:
            out = self.base.model(**inputs)
        else:
            with self.applied.rows([self.arm] * len(inputs[key])):
                out = self.base.model(**inputs)
        features: Tensor = out[f"{key}_features"].float().cpu()
        return features


class Cropped(Clip):
    """The mean of two cosines: the whole text and the whole picture, and the text's parts with the crop each fits best.

    A CLIP that was trained on pictures of one thing ranks texts about two by what stands out; cut apart, "a picture of
    a cat and a dog" is "a picture of a cat" and "a picture of a dog" (`bank.things`), each looked for where it may be.
    The part's maximum over crops is the late interaction of Khattab and Zaharia (2020), with crops for tokens.
    """

    SIDE = 7 / 12
    """Side of a crop, as a share of the picture's"""

    def __init__(self, base: Base, applied: Applied | None = None, arm: str | None = None, grid: int = 3) -> None:
        """grid: crops in a row and in a column, spread evenly."""
        super().__init__(base, applied, arm)
        self.grid = grid

    def target(self, inputs: Mapping[str, Any]) -> Target:
        whole = super().target(inputs)
        if "pixels" not in inputs:
            raise Invalid("Crops are of one picture or clip; sums are scored by crops=0.")
        return replace(whole, crops=torch.cat([self._look(x) for x in self.cut(inputs["pixels"])]))

    def aiming(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        yield from super().aiming(inputs)
        for x in self.cut(inputs["pixels"]) if "pixels" in inputs else ():
            self._look(x)
            yield

    def cut(self, pixels: Tensor) -> Tensor:
        """(grid^2 * T, 3, H, W): the crops of frames (T, 3, H, W), at the size of the whole."""
        size = tuple(self.base.processor.size)
        high, wide = (round(self.SIDE * s) for s in size)
        ys, xs = (torch.linspace(0, s - c, self.grid).round().long().tolist() for s, c in zip(size, (high, wide),
                                                                                           strict=True))  # fmt: skip
        cut = torch.cat([pixels[:, :, y : y + high, x : x + wide] for y in ys for x in xs])
        return F.interpolate(cut.float(), size, mode="bilinear", antialias=True)

    def missing(self, target: Target, texts: Sequence[str]) -> list[str]:
        return super().missing(target, [x for text in texts for x in (text, *things(text))])

    def score(self, target: Target, texts: Sequence[str]) -> list[float]:
        if not texts:
            return []
        whole = super().score(target, texts)
        assert target.crops is not None
        parts = [things(text) for text in texts]
        each = list(dict.fromkeys(p for some in parts for p in some))
        best = (self.kept.get(target.scope, each).double() @ target.crops.double().T).amax(1).tolist()
        of = dict(zip(each, best, strict=True))
        return [(w + sum(of[p] for p in some) / len(some)) / 2 for w, some in zip(whole, parts, strict=True)]


class Both(Scorer):
    """The sum of two scorers' cosines for one item, weighted; such as a picture and a sound."""

    def __init__(self, first: Scorer, second: Scorer, weights: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__()
        self.parts, self.weights = (first, second), weights

    def target(self, inputs: Mapping[str, Any]) -> Target:
        """inputs: {"both": (inputs of the first, inputs of the second)}."""
        if "both" not in inputs:
            raise Invalid("This scorer wants two inputs, such as a picture and a sound.")
        made = [w * p.target(x).vector for w, p, x in zip(self.weights, self.parts, inputs["both"], strict=True)]
        return Target(torch.cat(made))

    def aiming(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        for part, given in zip(self.parts, inputs.get("both", ()), strict=False):
            yield from part.aiming(given)
        yield

    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        return torch.cat([part.encode(texts, target) for part in self.parts], 1)


class Renderer(ABC):
    """Draws what a text says, or changes a picture as it says; the same text and seed draw the same picture."""

    batch = 8
    """texts drawn in one slice"""

    @abstractmethod
    def draw(self, texts: Sequence[str], picture: Tensor | None = None) -> Tensor:
        """(n, 3, H, W) uint8 of at most `batch` texts. picture (3, H, W) uint8: what is changed, for editors. Every
        text is drawn from the same noise, so that scores compare texts."""

    def drawing(self, texts: Sequence[str], picture: Tensor | None = None) -> Slices[None, None, Tensor]:
        """`draw` in slices that end within a second."""
        yield
        return self.draw(texts, picture)


class Drawn(Scorer):
    """A scorer of what candidates draw: features of a text are features of its picture, made in the renderer's
    slices."""

    renderer: Renderer

    @abstractmethod
    def described(self, pictures: Tensor, target: Target) -> Tensor:
        """Features (n, k) float32 of uint8 pictures (n, 3, H, W)."""

    def filling(self, target: Target, texts: Sequence[str]) -> Iterator[None]:
        n = self.renderer.batch
        for some in (texts[i : i + n] for i in range(0, len(texts), n)):
            pictures = yield from self.renderer.drawing(some, target.content)
            self.kept.add(target.scope, some, self.described(pictures, target))
            self.encoded += len(some)
            yield

    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        n = self.renderer.batch
        drawn = [self.renderer.draw(texts[i : i + n], target.content) for i in range(0, len(texts), n)]
        return torch.cat([self.described(x, target) for x in drawn])


class Preference(Drawn):
    """How well the picture drawn from a candidate fits the prompt that is being rewritten (CLIP cosine)."""

    def __init__(
        self, base: Base, renderer: Renderer, applied: Applied | None = None, arm: str | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.sees, self.renderer = Clip(base, applied, arm), renderer

    def target(self, inputs: Mapping[str, Any]) -> Target:
        if not str(inputs.get("goal", "")).strip():
            raise Invalid("Say the prompt that is to be rewritten: goal.")
        return Target(self.sees.encode([inputs["goal"]], Target(torch.zeros(0)))[0])

    def described(self, pictures: Tensor, target: Target) -> Tensor:
        return torch.stack([self.sees.images(x[None]) for x in self.sees.base.processor.image(pictures)])


class Style(Drawn):
    """Minus (the mean over blocks of the relative squared error of Gram matrices, plus WEIGHT times that of the
    content's features).

    Gram = F^T F of the patch tokens of an image tower's blocks, the content the tokens of one deep block: the measure
    of Gatys et al. on a transformer's features, for a CLIP has no VGG, which the paper uses. Errors are relative
    because the paper's 1000 is a number of VGG's scale: with it the content drowns the style here.
    """

    GRAMS, CONTENT = (0.0, 0.25, 0.5), 0.75
    """depths, as shares of the tower's blocks"""
    WEIGHT = 0.1

    def __init__(self, base: Base, renderer: Renderer) -> None:
        super().__init__()
        self.base, self.renderer = base, renderer

    def target(self, inputs: Mapping[str, Any]) -> Target:
        if "style" not in inputs or "content" not in inputs:
            raise Invalid("Style transfer wants two pictures: content and style.")
        grams, _ = self.describe(inputs["style"][None])
        _, content = self.describe(inputs["content"][None])
        scope = str(inputs.get("key", hash(inputs["content"].numpy().tobytes())))
        return Target(torch.cat([grams[0].flatten(), content[0]]), scope, inputs["content"])

    @torch.inference_mode()
    def describe(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Gram matrices (n, blocks, G) and content features (n, C) of uint8 pictures."""
        blocks = self.base.model.visual.transformer.resblocks
        at = [int(d * len(blocks)) for d in (*self.GRAMS, self.CONTENT)]
        seen: dict[int, Tensor] = {}
        hooks = [
            blocks[i].register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out[:, 1:].float().cpu()))
            for i in at
        ]
        try:
            x = self.base.processor.image(pictures)
            self.base.model(image=x.to(self.base.device, self.base.model.visual.proj.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        grams = []
        for i in at[:-1]:
            grams.append((seen[i].mT @ seen[i] / seen[i].shape[1]).flatten(1))
        return torch.stack(grams, 1), seen[at[-1]].flatten(1)

    def described(self, pictures: Tensor, target: Target) -> Tensor:
        """(n, 2): both relative errors, so that little is kept of a text."""
        grams, content = self.describe(pictures)
        style, same = target.vector.split([grams[0].numel(), content.shape[1]])
        style = style.unflatten(0, grams.shape[1:])
        far = ((grams - style).square().sum(2) / style.square().sum(1).clamp_min(1e-12)).mean(1)
        return torch.stack([far, (content - same).square().sum(1) / same.square().sum().clamp_min(1e-12)], 1)

    def compare(self, features: Tensor, target: Target) -> Tensor:
        return -(features[:, 0] + self.WEIGHT * features[:, 1])
