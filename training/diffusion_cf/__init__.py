"""diffusion_cf: counterfactual pictures by moving a diffusion model's conditioning from one class to another.

Paper: "DIFFusion", arXiv 2504.08046. Claim: with a few unpaired pictures of two classes that differ subtly, adding
the difference of their mean image embeddings to a picture's own embedding, while its inverted noise is kept, turns
it into the other class with little else changed; no text, no classifier in the loop. The paper's tables could not be
read, so its numbers are not quoted.

    patchbay fit diffusion_cf/tiny      # a random model: seconds on a CPU
    patchbay fit diffusion_cf/lab       # lab:diffusion, six domains of drawings
    patchbay fit diffusion_cf/paper data=/folder/with/train,val,test base=local-dir:/kandinsky-2-2-decoder device=cuda
    patchbay eval REF --full            # controls, baselines, inversions, few examples, the smallest change that flips

Class means come from train. The amount is chosen on val by the model's own encoder: the smallest one at which enough
pictures, embedded again, lie nearer to the target's mean than to the source's. The judges of `evaluate` are asked by
nothing else.
"""

from __future__ import annotations

from training.diffusion_cf.config import RECIPES, Config, promises
from training.diffusion_cf.figures import figures
from training.diffusion_cf.fit import fit
from training.diffusion_cf.measure import evaluate
from training.diffusion_cf.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
