"""The one place of the version: packaging and `fastseq.__version__` read it."""

__version__ = "0.1.0"
