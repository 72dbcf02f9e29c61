"""What a leaf of the parameters is: an array, or one of the types that stand for a matrix.

`quantized.py` has what is stored in fewer bits, `adapted.py` what adapters add, `tensors.py` arrays
that products treat in a way of their own, and the array that any leaf stands for. Every leaf has
the shape of the matrix it stands for. What multiplies them is in `dot.py`.
"""

from typing import Any

# jax.Array | QArray | PackedTensor | IntegerTensor | Float8Tensor | QatTensor | DecodingTensor |
# TappedTensor | LoraTensor | StackedLora | SavedTensor
Leaf = Any
# An array, or what stands for one in a tree of shardings, shapes or booleans.
Array = Any


class OfBase:
    """A leaf with the shape and dtype of another that it holds, `base`."""

    base: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype
