"""Models of other toolkits as `fastseq.Seq2Seq`: their checkpoints, read key by key."""

from .fairseq import from_fairseq
from .joeynmt import from_joeynmt
from .opennmt import from_opennmt
from .padding import right_padded

__all__ = ["from_fairseq", "from_joeynmt", "from_opennmt", "right_padded"]
