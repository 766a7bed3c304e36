"""second_order: CLIP neurons described by texts through what later attention makes of them, and patches ablating them.

Paper: Gandelsman, Efros, Steinhardt, "Interpreting the second-order effects of neurons in CLIP", arXiv 2406.04341.
Claim: the second-order effects of a neuron lie along one direction (48 % of their variance for ViT-B/32, layer 9),
count for fewer than 2 % of pictures, and name it: a sparse sum of texts finds attributes, masks and spurious words.

    patchbay fit second_order/tiny       # a random tower: seconds on a CPU
    patchbay fit second_order/lab        # written words out of lab:clip, layers 4 to 6: minutes on 2 cores
    patchbay fit second_order/paper data=/folder/of/imagenet pool=words.txt    # ViT-B/32, layers 8 to 10
    patchbay eval second_order@challenger --full    # on test: arms, masks, pictures that mislead

find.py takes directions, thresholds and texts of all neurons of a layer from pictures of the train split (texts by
omp.py), and ranks neurons there by what they add to the wrong class where something that should not matter is in the
picture. What becomes of them (effects, or the activation itself, at their mean over clean pictures), how many and of
which layer is chosen on val, among what costs no more than `bound`. A control takes as many other neurons of the same
spread. Nothing is chosen on test. questions.py answers the paper's open questions on val: how much one direction
explains, what holding attention and norms still costs, which heads carry a neuron.
"""

from training.second_order.config import RECIPES, Config
from training.second_order.figures import figures
from training.second_order.fit import fit
from training.second_order.report import report
from training.tasks.recognition import evaluate

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "report"]
