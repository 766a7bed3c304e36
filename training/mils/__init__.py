"""mils: captions, prompts and arithmetic without training (Ashutosh et al., arXiv 2501.18096).

The claim: a language model that only proposes and a scorer that only ranks describe pictures, clips and sounds they
were never trained to describe. Here it is a number: exact objects on scenes of two things, for the best line of a fixed
bank, for random lines at as many scorer calls, for mutation without a language model, and for the language model.

    patchbay fit mils/lab                  # seals a configuration with the bank, the trace of 12 val items and a curve
    patchbay eval runs/mils-...            # base (the best line of the bank) beside the search, 100 test scenes
    patchbay eval runs/mils-... --full     # baselines at equal calls, typographic pictures, how=official
    patchbay fit mils/typographic patch=clip_sae@champion      # the scorer carries a patch
    patchbay fit mils/crops                # the scorer looks for each thing a text says in crops of the picture
    patchbay fit mils/video | audio | prompt | style | arithmetic | minus | both | smollm
    patchbay fit mils/company              # on the scenes lab:vlm captions, its captions and vlm_erasure's beside

What a fit finds is how long to search: scores rise for as long as one looks, right objects do not, because a scorer has
blind spots; the rounds with the best F1 on val are sealed. docs/log/mils.md has what was tried.
"""

from training.mils.config import RECIPES, Config, promises
from training.mils.figures import figures
from training.mils.fit import fit
from training.mils.measure import evaluate
from training.mils.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
