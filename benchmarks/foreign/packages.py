"""The programs by name. Each is imported by itself, within the virtual environment that has its package."""

from importlib import import_module

from .program import Program

__all__ = ["PROGRAMS", "program"]

PROGRAMS = {
    "forecasting-lstm": ("forecasting", "LSTM"),
    "forecasting-gru": ("forecasting", "GRU"),
    "deepar": ("deepar", "PROGRAM"),
    "tagging": ("tagging", "PROGRAM"),
    "reinforcement": ("reinforcement", "PROGRAM"),
    "privacy": ("privacy", "FUNCTIONAL"),
    "privacy-sampler": ("privacy", "SAMPLER"),
    "molecules": ("molecules", "PROGRAM"),
}  # name -> (module, attribute)


def program(name: str) -> Program:
    """Imports the package."""
    module, attribute = PROGRAMS[name]
    return getattr(import_module(f"{__package__}.{module}"), attribute)
