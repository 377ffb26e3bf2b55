"""Dialogue: replies to what was said last from what was said before, by attention over the whole conversation.

python -m examples.recipes.chatbot      # generated small talk about people and what they like
"""

import random

import torch

import fastseq

from ..training.batches import BOS, EOS, PAD, pad
from .fit import command, exact_match, fit, samples

NAMES = "anna ben clara david emma felix greta hugo ida jonas kira leo mia noah olga paul".split()
LIKED = "tea chess books rain music trains cats dogs maths films bread snow".split()
TOPICS = {  # what a person says, its reply; what they ask later, its reply
    "name": (NAMES, "my name is {}", "nice to meet you {}", "what is my name", "your name is {}"),
    "friend": (NAMES, "my friend is {}", "say hello to {}", "who is my friend", "your friend is {}"),
    "like": (LIKED, "i like {}", "tell me about {}", "what do i like", "you like {}"),
}
LACKING = "you have not told me"
FIXED = {word for topic in TOPICS.values() for text in topic[1:] for word in text.split()} - {"{}"}
WORDS = ["<pad>", "<bos>", "<eos>", "|", *sorted(FIXED | {*LACKING.split(), *NAMES, *LIKED})]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def talk() -> tuple[str, str]:
    """A conversation, of turns between |, and the next reply."""
    said = {topic: random.choice(TOPICS[topic][0]) for topic in random.sample(list(TOPICS), random.randint(0, 3))}
    turns, asked = [TOPICS[topic][1].format(value) for topic, value in said.items()], random.choice(list(TOPICS))
    if said and random.random() < 0.3:
        return " | ".join(turns), TOPICS[list(said)[-1]][2].format(list(said.values())[-1])
    return " | ".join([*turns, TOPICS[asked][3]]), TOPICS[asked][4].format(said[asked]) if asked in said else LACKING


def train(steps: int = 500, seed: int = 0, hidden: int = 64) -> tuple[fastseq.Seq2Seq, float, float]:
    """A model, the share of unseen conversations with the right reply, to the word, and that of the commonest reply."""
    random.seed(seed)
    torch.manual_seed(seed)
    talks = random.sample(each := list(dict.fromkeys(talk() for _ in range(12000))), len(each))  # once, in any order
    src, lengths = pad([ids(text) for text, _ in talks])
    tgt, replies = pad([[BOS, *ids(reply), EOS] for _, reply in talks])[0], [reply for _, reply in talks]
    encoder = fastseq.Encoder(32, hidden // 2, bidirectional=True, embedding=torch.nn.Embedding(len(WORDS), 32))
    decoder = fastseq.Decoder.bahdanau(32, hidden, memory_size=hidden)
    model = fastseq.Seq2Seq(encoder, decoder, len(WORDS), bos_id=BOS, eos_id=EOS, pad_id=PAD)
    rest = torch.arange(1000, len(talks))
    fit(model, lambda i: model.loss(src[i], tgt[i], lengths[i]), samples(rest, 64), steps=steps, rate=1e-2)
    found = model.generate(src[:1000], lengths[:1000], max_new_tokens=6).sequences[:, 0]
    return model, exact_match(found, tgt[:1000, 1:]), max(map(replies[:1000].count, set(replies))) / 1000


if __name__ == "__main__":
    model, *scores = command(train)
    print("replies right: {:.1%}; with the commonest one: {:.1%}".format(*scores))
    src = torch.tensor([ids("my name is ida | my friend is leo | who is my friend")])
    print(*(WORDS[i] for i in model.generate(src, max_new_tokens=6).sequences[0, 0]))
