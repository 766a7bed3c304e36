"""What tests of attention_sink share."""

from training.attention_sink import RECIPES

TINY = RECIPES["tiny"]
