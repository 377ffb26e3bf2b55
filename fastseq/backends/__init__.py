"""Backends: one module each, with the same four names, imported when first needed.

NAME: str
unavailable() -> str | None       why this machine cannot run it; None: it can
refuses(call) -> str | None       why it cannot run this call. Answers are cached, so only cell, options, shapes,
                                  dtypes, devices and the presence of states and lengths may decide
rnn(call), rnn_cell(call)         run it; `call` is an `RnnCall`, already checked
"""
