"""Programs that nobody here wrote: packages of PyPI that use torch's recurrent modules, by their own public API.

    make foreign                                     # all of them, in build/foreign-venv; ARGS="--only tagging"
    python -m benchmarks.foreign --write-docs        # the table of docs/replace.md, from the newest results

A module in `packages` is one program: `build(convert)` makes its model, `run` trains it and gives what it learned.
child: one side of it (stock, fastseq, ...) in a process of its own. measure: both sides in turns, held to each other.
results: their JSON. docs: the table.
"""
