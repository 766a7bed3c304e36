"""The lab world: pictures that people drew, everything else rendered from them, with the truth for free.

`atlas` holds the sprites, `renderer` draws scenes, `worlds` are the twins of the papers' data sets, `clip` trains the
checkpoint that ships as `lab:clip`. Numbers measured here are lab numbers and are always labelled so.
"""
