"""Backends: one module for each family of operators, all with the same names, imported when first needed.

NAME: str
unavailable() -> str | None       why this machine cannot run it; None: it can
refuses(call) -> str | None       why it cannot run this call. Answers are cached, so only cell, options, shapes,
                                  dtypes, devices and the presence of states, lengths and resets may decide
rnn(call), rnn_cell(call)         run it; `call` is an `RnnCall`, already checked

Those for attention, decoder_*.py, have instead of the last: decoder(call), of a `DecoderCall`; attention(call) and
refuses_attention(call), of an `AttentionCall`.
"""
