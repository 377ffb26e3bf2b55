"""fastseq beside what a user would pick instead: `python -m benchmarks run`. Every case is in `registry`."""
