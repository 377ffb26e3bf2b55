"""The one exception for every fault of shape, value or option in a call."""

__all__ = ["InputError"]


class InputError(ValueError, RuntimeError):
    """An argument fastseq cannot use; the message gives its value, the limit and the remedy.

    Both a ValueError and a RuntimeError, because torch.nn raises now one, now the other for the same fault: whatever
    a caller of torch.nn catches still catches this. A wrong *type* raises TypeError.
    """
