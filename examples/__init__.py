"""Recipes on real data; each package is one, run with `python -m examples.NAME`."""
