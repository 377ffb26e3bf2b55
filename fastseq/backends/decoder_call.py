"""What a backend is asked to compute of attention: one value a call, checked before any backend sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, device, dtype

from ..spec import AttentionParams, DecoderParams, DecoderSpec, DecoderState, DropoutMasks, Keys
from .call import GATES, kind_of

__all__ = ["AttentionCall", "DecoderCall", "mapped"]

Tree = TypeVar("Tree")


@dataclass(slots=True)
class AttentionCall:
    """One attention: T queries for each of N rows; row n reads keys n // k, N = B * k.

    A backend answers (context [N, T, D], weights [N, T, S] or None), in the query's dtype.
    """

    OPERATOR: ClassVar[str] = "attention"

    query: Tensor  # [N, T, Q]
    keys: Keys
    params: AttentionParams
    window: int | None = None  # D of Luong et al. 2015, eq. 10
    need_weights: bool = False

    @property
    def device(self) -> device:
        return self.query.device

    @property
    def dtype(self) -> dtype:
        return self.query.dtype

    @property
    def hidden_size(self) -> int:
        """A, the units that keys and queries meet in."""
        return 0 if self.keys.keys is None else self.keys.keys.shape[-1]

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def steps(self) -> int:
        return self.query.shape[1]

    def kind(self) -> tuple[Any, ...]:
        """What calls of one kind share: options, shapes, dtypes, devices."""
        return self.window, self.need_weights, _kinds((self.query, self.keys, self.params))


@dataclass(slots=True)
class DecoderCall:
    """One teacher-forced decoder over T steps, or with T = 1 one step of it.

    Row n of N = B * k reads keys n // k. State leaves are in y's dtype, or all in fp32 beside an fp16 or bf16 y; they
    come back in the dtype they came in. A backend answers a DecoderOutput with the dimension T.
    """

    OPERATOR: ClassVar[str] = "decoder"

    spec: DecoderSpec
    y: Tensor  # [N, T, I]
    keys: Keys
    state: DecoderState  # complete: feed is given where spec.feed is
    params: DecoderParams
    masks: DropoutMasks = DropoutMasks()  # noqa: RUF009  (a tuple of None)
    need_weights: bool = False

    @property
    def device(self) -> device:
        return self.y.device

    @property
    def dtype(self) -> dtype:
        return self.y.dtype

    @property
    def batch(self) -> int:
        return self.y.shape[0]

    @property
    def steps(self) -> int:
        return self.y.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.params.layers[0][0].shape[0] // GATES[self.spec.cell]

    def kind(self) -> tuple[Any, ...]:
        """What calls of one kind share: options, shapes, dtypes, devices."""
        return self.spec, self.need_weights, _kinds((self.y, self.keys, self.state, self.params, self.masks))


def _kinds(tree: Any) -> Any:
    """The kinds of the tensors in nested tuples."""
    if isinstance(tree, tuple):
        return tuple([_kinds(branch) for branch in tree])
    return None if tree is None else kind_of(tree)


def mapped(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Nested tuples of the same make with every leaf but None replaced by function(leaf)."""
    if isinstance(tree, tuple):
        branches = [mapped(function, branch) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    return tree if tree is None else function(tree)
