"""What the recipes of examples/ share: training within a time budget, or a number of steps, that may be killed.

A recipe says what is trained: `examples.g2p.recipe.Recipe`, `examples.translate.recipe.Recipe`. The rest is here, and
serves a benchmark as well as a run:

    recipe = Recipe(data.load(folder), Plan())
    ours, theirs = recipe.models(seed)                          # of fastseq and of torch.nn, with equal parameters
    supply = recipe.batches(torch.Generator().manual_seed(0))   # an epoch, a list
    optimizer = recipe.optimizer(ours)
    loss = recipe.step(ours, optimizer, supply[0])              # one update
    supply[0].tokens                                            # targets: phonemes or words, the end counted
    ours.eval()
    recipe.dev_loss(ours), recipe.evaluate(ours)                # nats per token; the recipe's scores

files: text by line. batches: padded ids by length. recipe: Plan and Recipe. loop: Training. resume: its state in a
file. progress: what is shown. speed: both libraries side by side. stock: what models of torch.nn share. command: the
options of `train`.
"""
