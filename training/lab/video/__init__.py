"""Clips rendered by the lab: the synthetic progression, clips with motion classes, corruptions and frame statistics.

`stages` draws the seven synthetic stages, `actions` the clips whose class is their motion, `corruptions` the twins of
UCF101-P, `statistics` the numbers by which the progression's stages are compared. Clips are (n, T, 3, R, R) uint8
throughout.
"""
