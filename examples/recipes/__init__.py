"""Small programs, a task each, to start one's own from: python -m examples.recipes.NAME.

`train()` of each trains, and returns a score on held-out data beside what the score is without learning: that of the
commonest answer, or of yesterday's values. They share the loop, `fit`, and `pad` of examples.training.
"""
