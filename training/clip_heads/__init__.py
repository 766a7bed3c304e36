"""clip_heads: CLIP's attention heads named by texts, and patches that ablate the heads of a named property.

Papers: Madasu, Gandelsman, Lal, Howard, "Quantifying and enabling the interpretability of CLIP-like models", arXiv
2409.06579; TextSpan and mean-ablation: Gandelsman, Efros, Steinhardt, arXiv 2310.05916. Claim: heads specialise on
properties (places, colours, letters) that texts name, and ablating the heads of a spurious property corrects the
predictions that relied on it: Waterbirds' worst group 47.7 -> 72.9 % on ViT-L/14 (from memory of the paper's table).

    patchbay fit clip_heads/tiny        # a random tower: seconds on a CPU
    patchbay fit clip_heads/lab         # lab:clip: heads of background, text, colour, people, food
    patchbay fit clip_heads/waterbirds  # ablate background heads, chosen on val
    patchbay fit clip_heads/paper data=/folder/of/waterbirds pool=texts.txt taxonomy=taxonomy.json
    patchbay eval clip_heads@challenger --full    # on test, beside random heads; each property's heads ablated, against
                                                  # each property's own probe

find.py accumulates second moments of the heads' contributions to the embedding over train images
(training/tasks/textspan.py); texts and labels follow from these alone (names.py). The heads of each property of
`ablate` are ordered by that property's score; (property, number, mode) is chosen on val. Nothing is chosen on test.
"""

from training.clip_heads.config import RECIPES, Config
from training.clip_heads.figures import figures
from training.clip_heads.fit import fit
from training.clip_heads.report import report
from training.tasks.recognition import evaluate, promises

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
