"""The Triton kernels, installed as `fastseq.kernels`. Only `fastseq/ops` imports this, and only when a call needs it.

cells.py, scores.py   element math, handed to the drivers as constexpr functions
blocks.py             what drivers share: products of tiles, the barrier of a grid
rnn.py                layers: rnn_sequence.py and rnn_steps.py are the kernels, rnn_cell.py has one step's
attention.py          attention of all steps at once: attention_scores.py, attention_backward.py
decoder.py            a decoder's loop: decoder_plan.py, decoder_forward.py, decoder_backward.py
devices.py            what a GPU offers
configs.py, .json     tile sizes by shape class and device
launch.py             the one way to start a kernel, or to record that it would be started
"""
