"""German to English: four papers' models learn to translate the captions of Multi30k (Elliott et al. 2016).

    python -m examples.translate train --data DIR                       # Bahdanau et al. 2014, an hour
    python -m examples.translate train --data DIR --model luong         # or sutskever, cho
    python -m examples.translate train --data DIR --library torch       # the same model from torch.nn
    python -m examples.translate curve build/translate/*                # development BLEU over minutes, a picture
    python -m examples.translate say "Ein Hund läuft." --beams 5        # or sentences from standard input

DIR has train, val and test_2016_flickr, each .de.gz and .en.gz: https://github.com/multi30k/dataset, data/task1/raw. No
package has them. Scores are BLEU of lower-cased tokens, as of `sacrebleu -tok none -lc`.

`train` leaves model.safetensors, the model that was best on val, and log.json, in build/translate/MODEL-LIBRARY. Until
it has ended there is training.safetensors too: whenever it is killed, the same command goes on from there.

data: files, tokens, vocabularies. model: the four as fastseq.Seq2Seq. stock: the same from torch.nn. recipe: both, as
`examples.training` trains them. score: BLEU. curve: the picture.
"""
