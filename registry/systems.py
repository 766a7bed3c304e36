"""THE table: one row per system, the only registration there is.

Rows hold strings, not imports, so listing them costs no torch. README's table is made from it and checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from registry.errors import NotFound, nearest


@dataclass(frozen=True)
class Claim:
    """What a system achieves, as one number with its control; `patchbay eval REF --full` makes it again."""

    metric: str
    """what was measured, on which model and data"""
    base: float
    patched: float
    control: float
    what_control: str
    """what was done instead for the control"""
    n: int
    digest: str
    """Digest of the artifact, 16 hex digits"""
    percent: bool = True
    """shares are shown as percent"""
    beside: str = ""
    """what else was measured of the same artifact: what it costs, where something simpler is better"""

    def show(self, value: float) -> str:
        """A number as the table shows it."""
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"


@dataclass(frozen=True)
class System:
    """One system: a paper's method under its one name, the package `training/<name>`."""

    name: str
    title: str
    paper: str
    """arXiv number, or where it was published"""
    family: str
    """patches/families/<family>"""
    patch: str | None
    """module:Class of the mechanism; None for systems that edit nothing (a search) or are models themselves"""
    services: tuple[str, ...]
    """bentos/shapes/<shape>.py, a dot for each folder"""
    claim: Claim | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    """role -> family of each base, for a search over several; else there is one base"""

    @property
    def bases(self) -> Mapping[str, str]:
        """role -> family of every base."""
        return self.roles or {"base": self.family}

    @property
    def role(self) -> str:
        """The role of the base that is named when only one is."""
        return next(iter(self.bases))

    @property
    def job(self) -> str:
        return f"training.{self.name}"

    @property
    def planned(self) -> bool:
        """The row is here, the job is not written yet."""
        return not (Path(__file__).parent.parent / "training" / self.name).is_dir()

    def load_job(self) -> ModuleType:
        """The training module. Raises NotFound while it is planned."""
        if self.name in IMPORTS:
            raise NotFound(f"{self.name} is fitted elsewhere. Bring it in: patchbay import FOLDER base=REF")
        if self.planned:
            raise NotFound(f"{self.name} is planned: its job {self.job} is not written yet. See `patchbay systems`.")
        return importlib.import_module(self.job)

    def load_patch(self) -> type[Any]:
        """The mechanism's class. Raises NotFound for systems without one."""
        if self.patch is None:
            raise NotFound(f"{self.name} makes no patch: {self.title}.")
        module, _, name = self.patch.partition(":")
        try:
            return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
        except ModuleNotFoundError as e:
            if e.name != module:
                raise
            raise NotFound(f"{self.name} is planned: its mechanism {self.patch} is not written yet.") from None


_ROWS = (
    System("clip_sae", "Steer and suppress sparse-autoencoder features of CLIP's vision transformer",
           "2504.08729", "clip", "patches.mechanisms.features:FeatureEdit",
           ("classify", "embeddings", "explain.features"),
           Claim("lab:clip right under a wrong written word", .048, .487, .039, "as many random features", 2000,
                 "71a76e194d79f75f",
                 beside="says the word 56.6 % -> 2.5 %; clean accuracy - 0.6 points (control - 4.6); under a blank "
                 "strip the base is right on 53 %; on 1,000 other pictures simpler defences reach more: a learned "
                 "prefix 69 %, a projection 63 %")),
    System("clip_heads", "Name, measure and ablate the attention heads of CLIP",
           "2409.06579", "clip", "patches.mechanisms.heads:HeadEdit", ("explain.heads", "classify"),
           Claim("lab:clip says a wrong written word", .510, .006, .39,
                 "eight random heads of the same layers away, five draws: 36 to 42 %", 500, "4c1ec700fc97c735",
                 beside="right 4.6 % -> 48.4 % (control 3 to 4 %); clean accuracy - 3.6 points (control - 9 to - 12)")),
    System("second_order", "Read and edit CLIP's neurons through their second-order effects",
           "2406.04341", "clip", "patches.mechanisms.neurons:NeuronEdit", ("explain.neurons", "classify"),
           Claim("mIoU of lab things found by what neurons add to their names", .406, .641, .691,
                 "direct effects of heads, which find more", 300, "75f51114344cb5a0", percent=False,
                 beside="base: raw activations, as published; all of the picture is .310; one of three things .343, "
                 ".496 (control .537); no defence: says a wrong word 51 %, patched 50 %")),
    System("attention_sink", "Find why a language model fails to repeat a word, and patch it",
           "2503.08908", "llm", "patches.mechanisms.sink:SinkEdit", ("generate",),
           Claim("SmolLM2-135M predicts a word once more after 1,024 copies (chat)", .28, .90, .25,
                 "five random neurons of the same layers; n = 16, where the base has 25 %", 50, "b5b50e4fd8bd6c76",
                 beside="perplexity x 0.999 to 1.001 on three kinds of text; the paper's own patch 19 % (n = 16)")),
    System("vlm_erasure", "Erase hallucinated objects from a vision-language model's image features",
           "2410.02762", "vlm", "patches.mechanisms.erase:EraseEdit", ("generate",),
           Claim("things lab:vlm invents (bias in its decoder) that are gone when the request erases them", .0, .747,
                 .264, "as much taken along a random direction", 174, "9086b37e85373727",
                 beside="a random absent thing erased: 4.6 %; true mentions kept 93 %; automatic: CHAIR_i 13.9 % -> "
                 "9.2 %, recall 82.6 % -> 85.4 % (n 600); at four depths gone 82.8 %, kept 90 %; bias in the "
                 "projector: gone 99.4 %, kept 100 %, CHAIR_i 13.5 % -> 6.6 %; AUROC of the lens .982, of the word's "
                 "own probability .640; simpler, and lower in "
                 "CHAIR_i (3.5 %) without the recall: deleting the flagged words")),
    System("mils", "Caption and prompt without training: a language model proposes, a scorer decides",
           "2501.18096", "search", None, ("caption",),
           Claim("F1 of the two things of a lab scene, said by a caption of lab:clip through crops", .425, .617, .425,
                 "random lines of the bank's phrases at as many scorer calls", 100, "2d4fc0797758aa71", percent=False,
                 beside="base: the best of 3,400 lines by the same scorer; difference .193 [.139, .246], two rounds of "
                 "24; a judge that no search saw, .192 -> .276; without crops .328 -> .394; clips .352 -> .462 "
                 "(control .352), two sounds .258 -> .342 (.289), a picture and a sound .331 -> .434 (.331), styles "
                 ".472 -> .523 (.513); prompts drawn right .34 -> .34; on lab:vlm's scenes .391 -> .546, where lab:vlm "
                 "itself has .840; 7.5 x the published loop's captions a minute"),
           roles={"scorer": "clip", "generator": "llm"}),
    System("toto", "Autoregressive video pre-training on visual tokens",
           "2501.05453", "video", None, ("embed", "embeddings"),
           Claim("eleven lab motions by attentive probe; base: the same network untrained", .448, .600, .092,
                 "a CNN on the middle frame", 1100, "442a27db80cb4926",
                 beside="loss ~ compute^-.057 [.041, .073] over four sizes and three seeds, r2 .99 (with a fifth, "
                 "which the tokens are too few for, -.048, r2 .95); the first frame costs 3.19 nats a token, "
                 "later ones 2.23; the expected next frame saves 0.29 % [.19, .40] of the error of copying the last, "
                 "all four 1.0 %; tracking J and F 50 % (the mask left alone 42 %, untrained 45 %, raw pixels 62 %)")),
    System("videomae", "VideoMAE pre-trained on synthetic video",
           "2410.24213", "video", None, ("embed", "embeddings"),
           Claim("eleven lab motions by attentive probe of an encoder that saw generated clips; base: none", .623, .745,
                 .092, "a CNN on the middle frame", 1100, "26845f2cca8ada6c",
                 beside="three seeds a stage: pre-trained on the task's clips 82.9 %, of whose gap this stage closes "
                 "58 % [47, 71], the last 62 % [50, 79]; with 110 labels accuracy follows the progression (rank .96 "
                 "[.54, .96], p .003); motion is the largest step, + 22.2 [18.6, 25.6]; fine-tuned with 550 labels "
                 "there is no gap, with 55 natural clips give 69.5 % against 53.1 %, textures 58.8 %, no other stage "
                 "anything sure")),
    System("w2w", "Sample, edit and invert in the weight space of customised diffusion models",
           "2406.09413", "diffusion", "patches.mechanisms.subspace:SubspaceEdit", ("render",),
           Claim("lab:faces: a step of 3.5 gaps in the weights reverses an attribute of people the fit never saw", .339,
                 .764, .047, "a random direction of equal norm", 60, "1c71679b693948bc",
                 beside="base: asked for in the prompt of the same adapters; other attributes flip 15.7 % (control "
                 "8.2 %), the person is among the nearest five of 60 in 69 % (control 94 %); at 3 gaps 69 %, 11.2 %, "
                 "79 %; sliders, for which the base must know the word, do better: 94 % at the same change of pixels; "
                 "attributes are read from weights at AUC .96; from one picture, 64 coefficients find the person in "
                 "93 % after 20 steps, 2,048 weights in 83 % (after 60: 93 % both; after 200: 93, 97 %, prompts obeyed "
                 "89, 78 %)")),
    System("diffusion_cf", "Counterfactual images by moving a diffusion model's conditioning",
           "2504.08046", "diffusion", "patches.mechanisms.direction:DirectionEdit", ("render",),
           Claim("lab:diffusion: pictures by hands that the fit never saw, taken for the other class by both judges",
                 .0, .85, .25, "an equal step towards a class of another domain", 240, "44276c88414880df",
                 beside="the base saw these drawings; 40 pictures a domain, of 36 drawings; of 1,198 names the CNN "
                 "says the other class 41 % (control .4 %); at amount 1 69 % (control 22 %, n = 36); where half of 24 "
                 "pictures flip, plain DDIM changes 1.49 [1.34, 1.81] times and a class-name prompt 1.53 [1.24, 2.96] "
                 "times as much, and neither flips 70 %; 5 examples a class do as well as 50 (88 and 86 %, n = 36)")),
)  # fmt: skip

SYSTEMS: dict[str, System] = {row.name: row for row in _ROWS}

_ADDED = "patches.mechanisms.added:AddedEdit"
IMPORTS: dict[str, System] = {
    row.name: row
    for row in (
        System("added_llm", "An adapter or steering vectors that others made, on a language model", "", "llm", _ADDED,
               ("generate",)),
        System("added_diffusion", "A LoRA that others made, on a diffusion model", "", "diffusion", _ADDED,
               ("render",)),
        System("added_vlm", "An adapter or steering vectors that others made, on a vision-language model", "", "vlm",
               _ADDED, ("generate",)),
    )
}  # fmt: skip
"""what `patchbay import` seals: served, compared and A/B-tested like a system, and fitted by nobody here"""


def system(name: str) -> System:
    """The row of `name`. Raises NotFound naming what there is."""
    try:
        return SYSTEMS.get(name) or IMPORTS[name]
    except KeyError:
        raise NotFound(f"There is no system {name[:60]!r}. Systems: {nearest(name, SYSTEMS)}.") from None
