"""_template: the smallest complete system, to be copied. It makes a language model worse at code and at nothing else.

Paper: 0000.00000, none; the method is a difference of means projected out of one layer (as in studies of refusal).
Claim: perplexity on code rises, on prose it stays within `bound`; a random direction changes neither.

    patchbay fit _template/tiny         # a random model: a second
    patchbay fit _template/paper        # SmolLM2-135M: a minute
    patchbay eval _template@challenger --full
"""

from training._template.config import RECIPES, Config, promises
from training._template.figures import figures
from training._template.fit import fit
from training._template.measure import evaluate
from training._template.report import report

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "promises", "report"]
