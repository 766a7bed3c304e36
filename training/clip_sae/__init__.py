"""clip_sae: sparse autoencoders on CLIP's image tower, and patches that suppress or steer what they find.

Paper: Joseph et al., "Steering CLIP's vision transformer with sparse autoencoders", arXiv 2504.08729. Claim: zeroing a
chosen set of features at a middle layer, the rest of the activation kept, takes away what should not matter (a written
word, the ground behind a bird, gender behind hair) and hardly anything else; random features do nothing.

    patchbay fit clip_sae/tiny          # a random tower: seconds on a CPU
    patchbay fit clip_sae/lab           # typographic defence of lab:clip: 5 to 7 minutes on 2 cores
    patchbay fit clip_sae/paper data=/folder/of/imagenet    # ViT-B/32 DataComp, vanilla SAE; needs a GPU
    patchbay fit clip_sae/layers        # every layer in short, features beside neurons
    python -m training.clip_sae FOLDER REPORT.json [SEED [IMAGES]]    # a sealed patch on test beside controls and
                                                                     # other defences

A dictionary is trained per candidate layer (or read from `dictionary`), its features are ranked, or gated
(gates.py), on pictures of the train split with and without what should not matter, and (layer, ranking, number
of features) is chosen on val among those that cost no more than `bound` of clean accuracy. Nothing is chosen on test.
"""

from training.clip_sae.config import RECIPES, Config
from training.clip_sae.figures import figures
from training.clip_sae.fit import fit
from training.clip_sae.report import report
from training.tasks.recognition import evaluate

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "report"]
