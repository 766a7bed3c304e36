"""vlm_erasure: find what a vision-language model invents, and erase it from the picture's tokens.

Paper: Jiang, Kachinthaya, Petryk, Gandelsman, "Interpreting and Editing Vision-Language Representations to Mitigate
Hallucinations", arXiv 2410.02762 (ICLR 2025). Claim: read through the logit lens, image tokens are surer of things that
are there than of things a caption invents; taking a word's direction out of the image tokens takes the thing out of the
caption; doing both by itself lowers CHAIR by a quarter.

    patchbay fit vlm_erasure/lab            # lab:vlm, bias in the decoder: under 5 minutes on 2 cores
    patchbay fit vlm_erasure/projector      # lab:vlm-projector, bias in the projector
    patchbay fit vlm_erasure/paper          # LLaVA-1.5-7b and COCO2014 by folder: hours on one GPU
    patchbay eval vlm_erasure --full        # every control, baseline and depth

docs/systems/vlm_erasure.md says what was found here and what not.
"""

from training.vlm_erasure.config import RECIPES, Config, promises
from training.vlm_erasure.evaluate import evaluate
from training.vlm_erasure.figures import figures
from training.vlm_erasure.fit import fit
from training.vlm_erasure.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
