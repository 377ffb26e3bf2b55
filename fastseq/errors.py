"""The one exception for every fault of shape, value or option in a call, and how its messages name things."""

__all__ = ["InputError", "with_article"]


class InputError(ValueError, RuntimeError):
    """An argument fastseq cannot use; the message gives its value, the limit and the remedy.

    Both a ValueError and a RuntimeError, because torch.nn raises now one, now the other for the same fault: whatever
    a caller of torch.nn catches still catches this. A wrong *type* raises TypeError.
    """


def with_article(name: str) -> str:
    """ "a GRU", "an LSTM", "an int": as the name is said."""
    return f"{'an' if name[:1] in 'aeioAEIO' or name.startswith(('LSTM', 'RNN', 'nd')) else 'a'} {name}"
