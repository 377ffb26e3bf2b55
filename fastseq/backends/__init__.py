"""Backends: one module for each family of operators, all with the same names, imported when first needed.

NAME: str
unavailable() -> str | None       why this machine cannot run it; None: it can
refuses(call) -> str | None       why it cannot run this call. Answers are cached, so only cell, options, shapes,
                                  dtypes, devices and the presence of states, lengths and resets may decide
never(call) -> str | None         what of that lies in the layer's own options, whatever it is called with: asked when a
                                  layer is built for this backend. It may look at cell, proj_size, noise and norms alone
rnn(call), rnn_cell(call)         run it; `call` is an `RnnCall`, already checked

Those for attention, decoder_*.py, have instead of the last: decoder(call), of a `DecoderCall`; attention(call) and
refuses_attention(call), of an `AttentionCall`.
"""
