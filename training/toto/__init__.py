"""toto: a language model over visual tokens of clips and pictures, trained by next-token prediction alone.

Paper: Rajasegaran, Radosavovic et al., "An Empirical Study of Autoregressive Pre-training from Videos", arXiv
2501.05453. Claims: features for recognition, tracking and robotics come out of next-token prediction, best in the
middle of the network; the loss falls as a power of compute (exponent 0.0378 there); the first frame is the dearest.
docs/systems/toto.md has what was measured here, docs/log/toto.md how.

    patchbay fit toto/tiny          # seconds
    patchbay fit toto/lab           # minutes of one core
    patchbay fit toto/base device=cuda
    python -m training.toto.scaling FOLDER      # five sizes: loss, probes by layer, rollouts, tracking, the power law

The tokenizer is k-means over patches; on the lab's still grounds later frames are tokenised as differences from the
frame before (`residual`). What is sealed is a checkpoint (kind `model`) with an attentive probe of one layer, which is
chosen on val. The base it is compared with is the same network before training.
"""

from training.toto.config import RECIPES, Config, promises
from training.toto.figures import figures
from training.toto.fit import fit
from training.toto.measure import evaluate
from training.toto.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
