"""videomae: a video encoder pre-trained on synthetic clips, and how much of natural pre-training's gain they give.

Paper: Yu, Wang, Li et al., "Learning Video Representations without Natural Videos", arXiv 2410.24213; VideoMAE: Tong et
al., arXiv 2203.12602. Claim: a VideoMAE pre-trained on a progression of generated videos closes 97 % of the gap between
training from scratch and pre-training on natural videos (UCF101, fine-tuned; 41 % by linear probe); the largest step is
motion. docs/systems/videomae.md has what was measured here, docs/log/videomae.md how.

    patchbay fit videomae/tiny          # seconds
    patchbay fit videomae/lab           # one checkpoint: minutes of one core
    patchbay fit videomae/lab stage=moving_circles steps=16000
    patchbay fit videomae/paper device=cuda data=/folder/of/UCF101
    python -m training.videomae.progression FOLDER      # every stage, 3 seeds, both controls: hours of two cores
    python -m training.videomae.table FOLDER            # its table, share of the gap closed, correlations, figure

What is sealed is a checkpoint (kind `model`): encoder and decoder, the attentive probe of the frozen encoder, and a
fine-tuned copy. `evaluate` measures the base it is compared with by the same metrics, from its own folder.
"""

from training.videomae.config import RECIPES, Config, promises
from training.videomae.figures import figures
from training.videomae.fit import fit
from training.videomae.measure import evaluate
from training.videomae.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
