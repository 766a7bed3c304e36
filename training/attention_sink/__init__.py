"""attention_sink: why a language model fails to repeat a word, and the patch that repairs it.

Paper: Yona, Shumailov, Hayes, Barbero, Gandelsman, "Interpreting the Repeated Token Phenomenon in Large Language
Models", arXiv 2503.08908. Claim: the first attention layer marks the first token, a few MLP neurons read the mark and
turn it into an attention sink; a long run of one word looks like a first token to that layer, fires the same neurons,
and derails the model; silencing them away from the first token repairs it.

    patchbay fit attention_sink/smollm      # SmolLM2-135M: 2 minutes on 2 cores
    patchbay fit attention_sink/paper       # Llama-2-7b by hub id or folder: minutes on one GPU
    patchbay eval attention_sink@challenger --full    # with its parts and controls: half an hour

Found here (docs/log/attention_sink.md has the table): on SmolLM2 the paper's patch removes the sinks and does not
restore repeating; damping repeated keys in the first attention does, 512 copies 0.54 -> 0.96 of words, at a perplexity
ratio of 1.000.

find.py needs no hints: stages are layers whose MLP raises the first token's norm far above everybody's; their neurons
are ranked by |a_j| |W_d[:, j]| with the true activation, at the first token and on repeats; a causal filter keeps
those whose silencing brings the norm of repeats down. It also tells a sink bound to the first position from one bound
to the BOS token. phenomena.py measures the rest of the paper: attention shares, convergence, the cluster attack.
"""

from training.attention_sink.config import RECIPES, Config, promises
from training.attention_sink.figures import figures
from training.attention_sink.fit import fit
from training.attention_sink.measure import evaluate
from training.attention_sink.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
