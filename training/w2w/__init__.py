"""w2w: a linear space of customised diffusion models: sample it, edit in it, find the point that draws one picture.

Paper: Dravid, Gandelsman, Wang, Abdal, Wetzstein, Efros, Aberman, "Interpreting the Weight Space of Customized
Diffusion Models", arXiv 2406.09413. Claim: the weights of models customised to one person each span a space in which
attributes are linear directions; moving along one changes that attribute in pictures and keeps the person, and fitting
coefficients to one picture finds the person better than fitting weights does.

    patchbay fit w2w/tiny      # a random base and 14 adapters: seconds on a CPU
    patchbay fit w2w/lab       # lab:faces, 420 adapters of 2,048 numbers, trained 60 at a time: about 2 CPU minutes
    patchbay fit w2w/lab population=adapters:/folder/of/peft/adapters form=canonical
    patchbay fit w2w/paper population=published:/folder/with/V.pt
    patchbay eval w2w@... --full     # every table of docs/systems/w2w.md, with baselines, controls and intervals

The population is sealed by itself under home()/populations and is the patch's parent; a run that was killed goes on
where it stopped. Components and kind of direction are chosen on val people, numbers are told of held people.
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

from patches.mechanisms.subspace import SubspaceEdit
from patches.subject import Subject
from registry.measure import Measure
from training.w2w import measure
from training.w2w.config import RECIPES, Config, promises
from training.w2w.draw import read
from training.w2w.figures import figures
from training.w2w.fit import HELD, fit
from training.w2w.measure import Lab, identity
from training.w2w.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]


def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """Reverse each binary attribute of held-out people: in their weights (patched), or in the base's prompt (base).

    quality: whether pictures show the person, before anything is edited; target: flips by the judge; offtarget: other
    attributes that flipped, and pixels. Raises nothing for a space without held people: its metrics are of its spread.
    """
    assert subject.folder is not None
    space = subject.arms["patch"]
    assert isinstance(space, SubspaceEdit)
    if not (subject.folder / HELD).is_file():
        on, models = 0.0 if arm is None else 1.0, len(space.tensors["members"])
        return {
            "quality/components": Measure(space.components * on, n=models),
            "target/reach": Measure(float(space.tensors["std"].sum()) * on, n=models),
        }
    held = load_file(subject.folder / HELD)
    lab = Lab.open(config, subject.base, space, (held["theta"], held["labels"]), "held")
    per, n = config.pictures, len(lab.labels)
    if arm is None:
        image = lab.draw(None, per, 3).repeat(n, 1, 1, 1)
        told: dict[str, Any] = dict(measure.prompted(lab, None))
    else:
        image = lab.draw(lab.theta, per, 3)
        told = measure.edits(lab, [config.strength], control=False)[config.strength]
    shown = identity(read(lab.judge, image, per), lab.labels)
    return {
        "quality/identity_top1": shown["top1"], "quality/identity_top5": shown["top5"],
        "quality/attributes_right": shown["binary_right"], "target/flip_of_the_person": told["kept_flip"],
        "target/flip": told["flip"],
        "offtarget/other_flip": told["other_flip"], "offtarget/pixels": told["change"],
        "quality/others_top5": told["top5"],
    }  # fmt: skip
