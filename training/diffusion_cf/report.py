"""The full comparison: the shipped direction against controls, other inversions, baselines, few examples, and the
smallest change.

All on test, none of it chosen there. Every row of the main table is over the same pictures, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.families.diffusion import Condition, levels
from patches.mechanisms.direction import DirectionEdit
from patches.subject import Subject
from registry import manifest
from registry.measure import Better, Measure
from training.diffusion_cf import find, judges
from training.diffusion_cf.config import Config
from training.diffusion_cf.domains import Pictures
from training.diffusion_cf.edit import Editor, How, smallest
from training.diffusion_cf.equal import Curve, at_flip
from training.diffusion_cf.figures import strips
from training.diffusion_cf.rows import how, learned, pictures
from training.evidence import Draft

WAYS = {
    "ddim": "DDIM", "o_belm": "O-BELM", "edit_friendly": "edit-friendly noise, twice the levels", "edict": "EDICT",
}  # fmt: skip
TOP = 3.0
"""class gaps up to which the smallest change is looked for"""
ROUNDS = 3
NEIGHBOURS = 5
"""pictures of each class behind the paper's neighbour means"""
EQUAL = (0.3, 0.5, 0.7)
"""shares of flips at which changes are compared"""
CONTROL = "control: another class"
SPHERE = "control: the sphere"
DIRECTIONS = {"direction": "directions", CONTROL: "elsewhere", SPHERE: "sphere"}
"""name -> the field of a Bench that holds it"""
Say = Callable[[str, dict[str, Any]], None]
Put = Callable[[str, str, dict[str, Any]], None]


class Bench:
    """Test pictures of a subject with judges, directions and inverted states: what every row of the tables starts
    from."""

    def __init__(self, subject: Subject, config: Config) -> None:
        self.config, self.base = config, subject.base
        if config.denoiser == "bfloat16":
            in_bfloat16(subject.base.model)
        arm = subject.arms.get(subject.only) if subject.only else None
        tuned = subject.only if isinstance(arm, DirectionEdit) and arm.tuned else None
        self.editor, self.how = Editor(subject, arm=tuned), how(config, subject.base)
        self.untuned = Editor(subject) if tuned is not None else None
        self.train, self.bank = learned(config, self.editor, subject.base)
        self.test = pictures(config, subject.base, "test", config.report_images)
        self.judges = (
            judges.own_judges(config, self.test) if config.data else judges.lab_judges(self.test.classes, config.judges)
        )
        self.amount: float = arm.config.amount if arm is not None else 1.0  # type: ignore[union-attr]
        self.conditions = self.editor.conditions(self.test.x)
        self.states = self.inverted(self.how)
        self._aim()

    def _aim(self) -> None:
        self.target = self.test.partner()
        self.directions = self.bank.directions(self.test.label, self.target)
        self.elsewhere = find.elsewhere(self.bank, self.test.label, self.target, self.directions, self.config.seed)
        self.sphere = find.isotropic(self.directions, self.config.seed)
        self.seen: dict[tuple[str, float], judges.Judged] = {}

    def of(self, test: Pictures) -> Bench:
        """The same bench over other pictures."""
        out = copy(self)
        out.test = test
        out.conditions = self.editor.conditions(test.x)
        out.states = out.inverted(self.how)
        out._aim()
        return out

    def few(self, count: int) -> Bench:
        """The first `count` pictures of each class, their states taken along."""
        keep = [i for c in range(len(self.test.classes)) for i in torch.where(self.test.label == c)[0][:count].tolist()]
        out = copy(self)
        out.test = self.test.take(torch.tensor(keep))
        out.conditions, out.states = [self.conditions[i] for i in keep], [self.states[i] for i in keep]
        out._aim()
        out.elsewhere, out.sphere = self.elsewhere[keep], self.sphere[keep]
        return out

    def judge(self, made: Tensor) -> judges.Judged:
        """Measures of what was made of the test pictures."""
        return judges.judged(self.judges, self.test, self.target, made)

    def inverted(self, h: How) -> list[Tensor]:
        """States of the test pictures."""
        return self.editor.invert(self.test.x, self.conditions, h, self.config.seed)

    def along(
        self,
        directions: Tensor,
        h: How | None = None,
        states: list[Tensor] | None = None,
        amount: float | None = None,
    ) -> Tensor:
        """Test pictures moved by the shipped amount, or another."""
        states = self.states if states is None else states
        size = self.amount if amount is None else amount
        return self.editor.along(states, self.conditions, directions, size, h or self.how)

    def moved(self, name: str, amount: float) -> judges.Judged:
        """What a direction of DIRECTIONS did by an amount; made once."""
        if (name, amount) not in self.seen:
            self.seen[name, amount] = self.judge(self.along(getattr(self, DIRECTIONS[name]), amount=amount))
        return self.seen[name, amount]

    def told(self, words: Sequence[Condition], h: How | None = None) -> Tensor:
        """Test pictures regenerated under other conditions, one each, from the states of the shipped inversion."""
        return self.editor.regenerate(self.states, self.conditions, words, h or self.how)

    def same(self, h: How, states: list[Tensor]) -> Tensor:
        """Test pictures inverted and given back."""
        return self.editor.regenerate(states, self.conditions, self.conditions, replace(h, guidance=1.0))


def report(folder: Path, config: Config, say: Say | None = None) -> dict[str, Any]:
    """{name: {row: {measure: Measure}}, "strips": Figure}. say: told each row when it is there."""
    subject = Subject.load(folder, config.base, config.device)
    tables = Draft(manifest.read(folder))

    def put(table: str, row: str, value: dict[str, Any]) -> None:
        tables.keep(table, row, value={k: _measure(k, v) for k, v in value.items() if v})
        if say is not None:
            say(f"{table}: {row}", value)

    try:
        bench = Bench(subject, config)
        shown = _main(bench, put)
        few = bench.few(config.report_few)
        for part in (_controls, _directions, _baselines, _equal, _inversions, _smallest, _examples):
            part(few, put)
        _held(bench, put)
    finally:
        subject.close()
    return {**tables, "strips": strips(bench.test, bench.target, shown)}


def _main(b: Bench, put: Put) -> dict[str, Tensor]:
    """The direction at the shipped amount; steps of its length towards a class of another domain, and to a point drawn
    from the sphere."""
    shown: dict[str, Tensor] = {}
    judged: dict[str, judges.Judged] = {}
    for name, field in DIRECTIONS.items():
        shown[name] = b.along(getattr(b, field))
        judged[name] = b.judge(shown[name])
        put("main", name, judged[name].summary())
        put("by domain", name, judged[name].by_domain("flip_both"))
    put("main", "originals", b.judge(b.test.x).summary())
    keys = [k for k in ("flip_both", "top1_cnn", "l1") if k in judged["direction"].values]
    for name in (CONTROL, SPHERE):
        pair = {k: judges.paired(judged["direction"].values[k], judged[name].values[k], b.test.sprite) for k in keys}
        put("main", f"direction - {name}", pair)
    return shown


def _controls(b: Bench, put: Put) -> None:
    """Inversion alone, and the direction and its controls at every amount that was tried on val."""
    put("amounts", "inversion alone", b.judge(b.same(b.how, b.states)).summary())
    for amount in sorted({*b.config.amounts, b.amount}):
        for name in DIRECTIONS:
            put("amounts", f"{name}, {amount:g}", b.moved(name, amount).summary())
    if b.untuned is not None:
        plain = copy(b)
        plain.editor = b.untuned
        plain.states = plain.inverted(b.how)
        put("amounts", "without the tuning, inversion alone", b.judge(plain.same(b.how, plain.states)).summary())
        for amount in b.config.amounts:
            made = b.judge(plain.along(b.directions, amount=amount))
            put("amounts", f"without the tuning, direction, {amount:g}", made.summary())


def _directions(b: Bench, put: Put) -> None:
    """The shipped direction beside finer ones, at the shipped amount: means of the pictures most like the edited one,
    what decides between the classes alone, and each picture as far as it needs."""
    source, e = b.test.label, F.normalize(b.editor.vectors(b.conditions).flatten(1), dim=-1)
    near = b.bank.directions(source, b.target, k=NEIGHBOURS, near=e)
    alone = find.decided(b.bank, b.directions, source, b.target)
    far = find.needed(b.bank, e, source, b.target)
    put("directions", "class means", b.moved("direction", b.amount).summary())
    for name, d in {f"means of the {NEIGHBOURS} nearest": near, "less what varies within the classes": alone}.items():
        row = b.judge(b.along(d)).summary()
        row["cosine"] = judges.interval(F.cosine_similarity(d, b.directions), b.test.sprite)
        row["length"] = judges.interval(d.norm(dim=1) / b.directions.norm(dim=1), b.test.sprite)
        put("directions", name, row)
    row = b.judge(b.editor.along(b.states, b.conditions, b.directions, b.amount * far, b.how)).summary()
    row["amount"] = judges.interval(b.amount * far, b.test.sprite)
    put("directions", "each as far as it needs", row)


def _examples(b: Bench, put: Put) -> None:
    """Class means from few pictures: the mean over several draws, each picture's own, intervals over drawings."""
    for count in b.config.few:
        made: list[dict[str, Tensor]] = []
        for draw in range(b.config.draws):
            d = b.bank.few(count, b.config.seed + draw).directions(b.test.label, b.target)
            values = dict(b.judge(b.along(d)).values)
            made.append({**values, "cosine": F.cosine_similarity(d, b.directions)})
        each = {k: torch.stack([m[k] for m in made]) for k in made[0]}
        row = {k: judges.interval(v.mean(0), b.test.sprite) for k, v in each.items()}
        for word, value in (("lowest", torch.Tensor.amin), ("highest", torch.Tensor.amax)):
            row[f"flip_both, {word} draw"] = [float(value(each["flip_both"].mean(1)))]
        put("examples a class", f"{count}, {b.config.draws} draws", row)


def _inversions(b: Bench, put: Put) -> None:
    """The same direction through every inversion."""
    few, many = (levels(b.base.model, n * b.config.levels) for n in (1, 2))
    for method in b.config.beside:
        h = replace(b.how, method=method, levels=many if method == "edit_friendly" else few)
        name = WAYS[method]
        before = b.editor.evaluations
        states = b.inverted(h)
        row = b.judge(b.along(b.directions, h, states)).summary()
        row["evaluations"] = [(b.editor.evaluations - before) / len(b.test)]
        row["reconstruction"] = judges.interval((b.same(h, states) - b.test.x).abs().flatten(1).mean(1), b.test.sprite)
        put("inversions", name, row)
    null = replace(b.how, guidance=4.0, against="null")
    put("inversions", "fixed point, guidance 4 from nothing", b.judge(b.along(b.directions, null)).summary())


def _baselines(b: Bench, put: Put) -> None:
    """A class-name prompt instead of the direction, and the nearest real picture of the target class."""
    if "text" in b.editor.pipe.conditions:
        for name, words in _prompts(b).items():
            put("baselines", name, b.judge(b.told(words)).summary())
    vectors = b.editor.vectors(b.editor.conditions(b.train.x))
    near = judges.nearest_real(b.train, vectors, b.editor.vectors(b.conditions), b.target)
    put("baselines", "nearest real picture", b.judge(near).summary())


def _prompts(b: Bench) -> dict[str, list[Condition]]:
    """Conditions that name the target class, with the picture's own embedding or without."""
    words = b.editor.pipe.text([f"a picture of a {name}" for name in b.test.classes])
    rows = b.target.tolist()
    return {
        "class-name prompt beside the embedding": [
            {**c, "text": words[t]["text"]} for c, t in zip(b.conditions, rows, strict=True)
        ],
        "class-name prompt instead of it": [words[t] for t in rows],
    }


def _equal(b: Bench, put: Put) -> None:
    """What equal flips cost in pixels: the direction and plain DDIM by their amount, the class-name prompt by its
    guidance; straight lines between what was measured."""
    still = b.judge(b.same(b.how, b.states))
    amounts = sorted({*b.config.amounts, b.amount})
    curves = {"direction": Curve.of([still, *(b.moved("direction", a) for a in amounts)])}
    plain = replace(b.how, method="ddim")
    states = b.inverted(plain)
    curves["DDIM"] = Curve.of(
        [b.judge(b.same(plain, states))]
        + [b.judge(b.along(b.directions, plain, states, a)) for a in [*amounts, 2 * amounts[-1]]]
    )
    if "text" in b.editor.pipe.conditions:
        words = _prompts(b)["class-name prompt instead of it"]
        weights = (1.0, 2.0, 4.0, 6.0)
        made = [b.judge(b.told(words, replace(b.how, guidance=w))) for w in weights]
        curves["class-name prompt"] = Curve.of([still, *made])
    for flip in EQUAL:
        for name, curve in curves.items():
            put(f"L1 at {100 * flip:.0f} % of both flips", name, at_flip(curve, curves["direction"], flip))


def _held(b: Bench, put: Put) -> None:
    """The style that no model of the lab was trained on."""
    if b.config.data:
        return
    other = b.of(pictures(b.config, b.base, "held", b.config.held_images))
    for name in DIRECTIONS:
        put("held style", name, other.moved(name, b.amount).summary())
    put("held style", "originals", other.judge(other.test.x).summary())


def _smallest(b: Bench, put: Put) -> None:
    """Bisection for the smallest amount at which the CNN flips, judged by CLIP; along the direction and along the
    control."""
    cnn = b.judges[0]
    columns = torch.tensor([cnn.column(name) for name in b.test.classes])

    def flipped(at: Tensor, made: Tensor) -> Tensor:
        scores, r = cnn.scores(made), torch.arange(len(at))
        return scores[r, columns[b.target[at]]] > scores[r, columns[b.test.label[at]]]

    for name, d in (("direction", b.directions), (CONTROL, b.elsewhere)):

        def make(at: Tensor, amounts: Tensor, d: Tensor = d) -> Tensor:
            rows = at.tolist()
            states, conditions = [b.states[i] for i in rows], [b.conditions[i] for i in rows]
            return b.editor.along(states, conditions, d[at], amounts, b.how)

        amounts, made = smallest(make, flipped, len(b.test), TOP, ROUNDS)
        row = b.judge(made).summary()
        found = ~amounts.isnan()
        row["amount"] = judges.interval(amounts[found], b.test.sprite[found]) if bool(found.any()) else []
        put("smallest change that flips the CNN", name, row)


def in_bfloat16(pipe: Any) -> None:
    """Put what is evaluated at every level in bfloat16, encoders and judges left as they are; twice as fast where the
    processor has the instructions."""
    pipe.denoiser.bfloat16()
    if hasattr(pipe, "projection"):
        pipe.projection.bfloat16()


def _measure(name: str, value: list[float]) -> Measure:
    """[value, low, high, n], or [value] alone, as a Measure."""
    better: Better = "higher" if name.startswith(("flip", "top1", "cosine")) else "lower"
    if len(value) < 4:
        return Measure(float(value[0]))
    return Measure(value[0], value[1], value[2], int(value[3]), better)
