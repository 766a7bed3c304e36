"""clip_sae: sparse autoencoders on CLIP's image tower, and patches that suppress or steer the features they find.

Paper: Joseph et al., "Steering CLIP's vision transformer with sparse autoencoders", arXiv 2504.08729. Claim: zeroing a
chosen set of features at a middle layer, the rest of the activation kept, removes a spurious cue (a written word, the
background behind a bird, gender behind hair) and hardly anything else; random features do nothing.

    patchbay fit clip_sae/tiny          # a random tower: seconds on a CPU
    patchbay fit clip_sae/lab           # typographic defence of lab:clip: 5 to 7 minutes on 2 cores
    patchbay fit clip_sae/hands         # also for other sizes, colours and letters without paper: 4 minutes of a core
    patchbay fit clip_sae/paper data=/folder/of/imagenet    # ViT-B/32 DataComp, vanilla SAE; needs a GPU
    patchbay fit clip_sae/layers        # every layer in short, features beside neurons
    patchbay eval clip_sae@challenger --full    # on test, beside controls and other defences; seed=1: other images

find.py ranks a dictionary's features on train images with and without the spurious cue, or learns gates on them
(gates.py). fit.py trains a dictionary per candidate layer (dictionary.py, train.py) and chooses (layer, ranking, number
of features) on val among those that cost at most `bound` of clean accuracy. defences.py holds other methods for the
same task. Nothing is chosen on test.
"""

from training.clip_sae.config import RECIPES, Config
from training.clip_sae.figures import figures
from training.clip_sae.fit import fit
from training.clip_sae.report import report
from training.tasks.recognition import evaluate, promises

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
