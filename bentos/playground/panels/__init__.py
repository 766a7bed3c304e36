"""Panels of the page, one file of script for each shape of API; `bentos.playground` puts them in."""
