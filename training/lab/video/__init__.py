"""Clips drawn by the lab: the synthetic progression, the natural stand-in, corruptions and frame statistics.

`stages` draws the seven synthetic stages, `actions` the clips whose motion is the class, `corruptions` the twins of
UCF101-P, `statistics` what the progression's stages are compared by. Clips are (n, T, 3, R, R) uint8 throughout.
"""
