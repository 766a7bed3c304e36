"""Small models and a synthetic image world ("the lab"), so that every system trains and is measured without downloads.

The foreground objects are sprites from open icon sets; scenes are rendered from them, so labels, masks and boxes are
exact. `atlas` loads the sprites, `renderer` draws scenes, `worlds` defines the twins of the papers' data sets, and
`clip` trains the checkpoint that ships as `lab:clip`. Numbers measured here are always labelled as lab numbers.
"""
