"""What a fit of w2w is told, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, field

from patches.families.diffusion.identity import Inversion
from registry import gate
from registry.config import STRICT
from registry.gate import Promise


@dataclass(frozen=True)
class Config:
    """Which base, which population, how large a space, and how it is measured."""

    __pydantic_config__ = STRICT

    base: str = "lab:faces"
    """reference of a diffusion model: `lab:faces`, `hf-hub:org/name@revision`, `local-dir:path`"""
    device: str = "cpu"
    seed: int = 0
    population: str = ""
    """empty: adapters are trained here. `adapters:<folder>`: a folder of peft or diffusers adapters, with labels.json.
    `published:<folder>`: the authors' V, mean, std, proj and weight_dimensions, with labels.json"""
    data: str = ""
    """folder of people, a folder of pictures each, with labels.json; empty: faces drawn by the lab"""
    prompt: str = "sks person"
    """Prompt of every picture, for people from a folder"""
    form: str = "raw"
    """what the space is made of: factors as trained (`raw`), their `canonical` form, or the dense `update`"""
    people: int = 300
    """whose adapters span the space"""
    val: int = 60
    """further people, on whom components and direction are chosen"""
    held: int = 60
    """further people, for the numbers that are reported"""
    shots: int = 10
    """pictures of each"""
    layers: tuple[str, ...] = ("to_v", "to_out")
    """last names of the modules that are adapted"""
    rank: int = 1
    scale: float = 1.0
    """alpha / r"""
    steps: int = 120
    rows: int = 4
    """pictures of each person in a step"""
    lr: float = 3e-2
    shard: int = 60
    """adapters trained together and sealed in one file"""
    components: tuple[int, ...] = (32, 64)
    """candidates for m; chosen on val"""
    directions: tuple[str, ...] = ("mean", "orthogonal", "partial")
    """candidates for how attributes' directions are found; chosen on val"""
    strengths: tuple[float, ...] = (1.0, 2.0, 3.0)
    """Strengths of the edits, in gaps between those with an attribute and those without"""
    strength: float = 3.0
    """at which candidates are compared and base and patched are measured"""
    guidance: float = 2.0
    """the null half is the unpatched base"""
    denoising_steps: int = 15
    pictures: int = 4
    """drawn of each person when identities are judged"""
    inversion: Inversion = field(default_factory=lambda: Inversion(steps=60))
    slider_steps: int = 100
    own_starts: int = 100
    """people of the control whose adapters have starts of their own"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:faces", people=14, val=4, held=5, shots=3, steps=3, rows=2, shard=12, components=(4,),
        directions=("mean",), strengths=(2.0,), denoising_steps=3, pictures=2, inversion=Inversion(steps=3, rows=2),
        slider_steps=2, own_starts=6,
    ),
    "lab": Config(),
    "paper": Config(
        base="hf-hub:stablediffusionapi/realistic-vision-v51", device="cuda", population="published:w2w",
        layers=("to_q", "to_v"), scale=27.0, components=(1000,), directions=("paper",), guidance=3.0,
        denoising_steps=50, inversion=Inversion(steps=400, rows=8),
    ),
}  # fmt: skip


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """A step along a direction changes what it names in the same person for sure, and the other attributes in at most a
    quarter. Flips alone promise nothing: the base, asked for the opposite, draws anybody, and flips always."""
    del config
    if recipe == "tiny":
        return gate.loss("quality/identity_top5", 0.4), gate.latency(20.0)
    return gate.gain("target/flip_of_the_person"), Promise("offtarget/other_flip", "most", 0.25), gate.latency(2.0)
