"""A weight as a view: a matrix [out, in] that is a parameter, or a part of one.

The weight of an nn.Linear is a whole parameter. An expert is one entry of a parameter with three axes, a projection may
be a range of rows of a fused parameter, and some models store matrices as [in, out].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from llmq.discovery.parameters import assign


@dataclass(frozen=True)
class View:
    """The position of a weight [out, in] within a block.

    parameter: the parameter's name in the block; index: the weight's index on a leading axis (the expert), None if
    there is no such axis; transposed: whether it is stored as [in, out]; rows: the first row of the weight in the
    matrix and the one after the last, None for all rows. Rows are outputs, also if the matrix is stored transposed;
    count: how many matrices a parameter of two axes holds one below the other, if `index` is among them, else None.
    """

    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    count: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the weight is a whole parameter, stored as [out, in]."""
        return self.index is None and self.rows is None and not self.transposed

    @property
    def name(self) -> str:
        """A unique name within the block: the parameter's name if the weight is a whole parameter."""
        index = "" if self.index is None else f"[{self.index}]"
        rows = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"
        return f"{self.parameter}{index}{'.t()' if self.transposed else ''}{rows}"

    def of(self, stored: Tensor) -> Tensor:
        """The weight [out, in] as a view of a tensor with the parameter's shape.

        Raises ValueError if the tensor has other axes or fewer rows than the view needs.
        """
        if self.count is not None and stored.dim() == 2 and stored.shape[0] % self.count == 0:
            stored = stored.view(self.count, -1, stored.shape[1])
        if stored.dim() != (2 if self.index is None else 3):
            raise ValueError(f"{self.name}: the parameter has the shape {[*stored.shape]}")
        matrix = stored if self.index is None else stored[self.index]
        matrix = matrix.t() if self.transposed else matrix
        if self.rows is None:
            return matrix
        begin, end = self.rows
        if not 0 <= begin < end <= matrix.shape[0]:
            raise ValueError(f"{self.name}: the weight has {matrix.shape[0]} rows")
        return matrix[begin:end]

    def get(self, module: nn.Module) -> Tensor:
        """The weight [out, in], as a view of the parameter."""
        return self.of(module.get_parameter(self.parameter).detach())

    def set(self, module: nn.Module, value: Tensor) -> None:
        """Set the weight's value [out, in], in the parameter's dtype.

        A whole parameter is replaced by `value`, and tied parameters stay tied. A part is copied into the parameter's
        memory; raises ValueError if the parameter has no memory of its own (on the meta device, or an expanded tensor).
        """
        if self.whole:
            assign(module, self.parameter, value)
            return
        stored = module.get_parameter(self.parameter).detach()
        if stored.is_meta or any(
            size > 1 and step == 0 for size, step in zip(stored.shape, stored.stride(), strict=True)
        ):
            raise ValueError(f"{self.name}: the parameter has no memory to write to")
        self.of(stored).copy_(value)


def put(module: nn.Module, values: Iterable[tuple[View, Tensor]]) -> None:
    """Replace weights by other values [out, in], in new memory; the parameters' old tensors are unchanged.

    values: any float dtype; they are converted to the parameter's. A parameter of which only parts are replaced is
    copied first.
    """
    copied: set[str] = set()
    for view, value in values:
        held = module.get_parameter(view.parameter).data
        if not view.whole and view.parameter not in copied:
            assign(module, view.parameter, held.clone())
            copied.add(view.parameter)
        view.set(module, value.to(held.dtype))
