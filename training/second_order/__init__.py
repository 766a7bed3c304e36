"""second_order: CLIP neurons described by texts via their effects through later attention, and their ablation.

Paper: Gandelsman, Efros, Steinhardt, "Interpreting the second-order effects of neurons in CLIP", arXiv 2406.04341.
Claim: a neuron's second-order effects lie along one direction (48 % of their variance for ViT-B/32, layer 9), are
significant in fewer than 2 % of images, and identify it: a sparse sum of texts yields attributes, masks and spurious
words.

    patchbay fit second_order/tiny       # a random tower: seconds on a CPU
    patchbay fit second_order/lab        # written words out of lab:clip, layers 4 to 6: minutes on 2 cores
    patchbay fit second_order/paper data=/folder/of/imagenet pool=words.txt    # ViT-B/32, layers 8 to 10
    patchbay eval second_order@challenger --full    # on test: arms, masks, misleading images

find.py computes directions, thresholds and texts (omp.py) of all neurons of a layer from train images, and ranks
neurons by what they add to the wrong class in images with the spurious cue. Which of them are mean-ablated (their
effects, or the activation itself), how many and in which layer is chosen on val, among edits that cost at most `bound`.
A control takes as many other neurons of the same spread. Nothing is chosen on test. questions.py answers the paper's
open questions on val: how much one direction explains, what holding attention and norms fixed costs, and which heads
carry a neuron.
"""

from training.second_order.config import RECIPES, Config
from training.second_order.figures import figures
from training.second_order.fit import fit
from training.second_order.report import report
from training.tasks.recognition import evaluate, promises

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
