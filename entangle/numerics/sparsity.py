"""The sparsity of a pruned matrix, and the names of methods, masks and solvers."""

import dataclasses
from typing import Literal, Self

Mask = Literal["row", "block"]
Method = Literal["sparsegpt", "wanda", "magnitude"]
Solve = Literal["greedy", "exact", "admm"]


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The share of weights that are zero, or n:m: n (``kept``) kept of every m (``group``)."""

    share: float
    kept: int = 0
    group: int = 0  # 0: unstructured

    @classmethod
    def parse(cls, text: str | float) -> Self:
        """Parse ``0.8``, or ``n:m`` with n kept of every m: ``1:4`` is 75% sparse.

        Raises:
            ValueError: the text is neither a share from 0 to 1 nor n:m with 0 <= n <= m.
        """
        try:
            if ":" in str(text):
                kept, group = map(int, str(text).split(":"))
                share = 1 - kept / group
            else:
                kept, group, share = 0, 0, float(text)
        except (ValueError, ZeroDivisionError):
            kept, group, share = 0, 0, -1.0
        if not 0 <= share <= 1 or group < 0:
            raise ValueError(
                f"expected a sparsity from 0 to 1, or n:m as n kept of every m (80% is 0.8), got "
                f"{text!r}"
            )
        return cls(share, kept, group)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else repr(self.share).removesuffix(".0")
