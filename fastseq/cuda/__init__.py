"""The CUDA C++ kernels of csrc/cuda: `rnn` and `rnn_cell` call them, `plan` decides how they are laid out.

Nothing here imports Triton, and nothing needs a GPU but to run a kernel.
"""
