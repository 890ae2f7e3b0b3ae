"""Array shapes as types, for readers and type checkers; checked while the tests run.

The tests import jaxtyping before `gaf`; then the annotations are real and every call is checked
against them. Otherwise they are plain tensors.
"""

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Float64, Int
else:

    class _Unchecked:
        def __getitem__(self, item: Any) -> Any:
            return Tensor

    Bool = Float = Float64 = Int = _Unchecked()

__all__ = ["Bool", "Float", "Float64", "Int"]
