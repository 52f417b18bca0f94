"""A module that stands for the parameter of all experts of a block, which are packed.

The models' own code runs on it: an entry of the stack, or the whole of it, is the weight of a product, and torch hands
such calls on to `__torch_function__` here. The same matrices can multiply rows that are sorted by expert, all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmq.errors import LlmqError
from llmq.formats.plain import IntWeight, Weight
from llmq.inference.layer import QuantLinear, apply
from llmq.inference.linear import IntLinear, quant_linear
from llmq_kernels.grouped_int_linear.operator import routed_linear
from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.int_linear import planes
from llmq_kernels.weights import PackedInt

PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}
GROUPED = {f for f in (getattr(torch, "_grouped_mm", None), getattr(functional, "grouped_mm", None)) if f is not None}


class StackedLinear(nn.Module):
    """Packed linear layers of one kind and size, one per expert: each of their buffers is one tensor for all."""

    def __init__(self, count: int, first: QuantLinear) -> None:
        super().__init__()
        self.count = count
        # In a list, so that it is no part of the module: the layer's buffers are views of this module's.
        self._like = [first]
        self.put(0, first)
        self._like = [self.at(0)]

    def put(self, index: int, layer: QuantLinear) -> None:
        """Copy an expert's layer. Raises LlmqError if it is not like the first."""
        like = self._like[0]
        fits = type(layer) is type(like) and _numbers(layer) == _numbers(like)
        for name, buffer in layer.named_buffers(recurse=False):
            if self._buffers.get(name) is None:
                self.register_buffer(name, _blank(name, buffer, self.count))
            mine = self.get_buffer(name)[index]
            fits = fits and (mine.shape, mine.dtype) == (buffer.shape, buffer.dtype)
            if fits:
                mine.copy_(buffer)
        if not fits:
            raise LlmqError(f"experts of one stack must be stored alike, but one is {layer}, another {like}")

    def at(self, index: int) -> QuantLinear:
        """An expert's layer, on views of the stacked buffers."""
        like = self._like[0]
        layer = object.__new__(type(like))
        buffers: dict[str, Tensor | None] = dict.fromkeys(like._buffers)
        buffers |= {name: buffer[index] for name, buffer in self.named_buffers()}
        layer.__dict__ = like.__dict__ | {"_buffers": buffers}
        return layer

    def routed(self, x: Tensor, routing: Routing, bias: Tensor | None) -> Tensor:
        """x [S, in], whose rows are routed to the experts: [routing.rows(x), out]. bias: [E, out]."""
        like, buffers = self._like[0], self._buffers
        weight = cast(Tensor, buffers["qweight"]), cast(Tensor, buffers["scale"]), buffers.get("zero")
        looked_up = 4, like.out_features, like.in_features, -(-like.in_features // weight[1].shape[-2])
        sizes = like.sizes() if isinstance(like, IntLinear) else looked_up
        table = buffers.get("codebook"), buffers.get("tables")
        if like.layout == "planes" and planes.direct(x, bias):
            return routed_linear(x, PackedInt(*weight, *sizes, *table), bias, routing, like.layout)
        y: Tensor = torch.ops.llmq.grouped_int_linear(
            x, *weight, bias, routing.offs, routing.chosen, *sizes, like.layout, *table
        )
        return y

    def routes(self) -> bool:
        """Whether `routed` can run it: integer weights whose inputs are in order, or what the same kernels look up."""
        like = self._like[0]
        return like.layout == "planes" or isinstance(like, IntLinear) if self._buffers.get("order") is None else False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedLinear:
        """Implements .to() and similar, as QuantLinear does."""
        apply(self._like[0], self._buffers, fn)
        self._like = [self.at(0)]
        return self

    def extra_repr(self) -> str:
        """The text that print shows."""
        return f"experts={self.count}, {self._like[0].extra_repr()}"


def _numbers(layer: QuantLinear) -> dict[str, Any]:
    """Sizes, layout and dtype."""
    return {name: value for name, value in vars(layer).items() if isinstance(value, (int, float, str, torch.dtype))}


def _blank(name: str, like: Tensor, count: int) -> Tensor:
    """A buffer for all experts, with the values of those that do not have it: no zero point, inputs in order."""
    if name == "order":
        return torch.arange(len(like), dtype=like.dtype, device=like.device).expand(count, -1).contiguous()
    return like.new_zeros(count, *like.shape)


class PackedStack(nn.Module):
    """Stands for a parameter of all experts' matrices, [experts, out, in], or [experts, in, out] if transposed.

    parts: layers whose outputs, concatenated, are an expert's. Indexed by a number it gives one expert's matrix; both
    can be transposed, and be the weight of a product. Anything else raises LlmqError.
    """

    def __init__(self, name: str, shape: tuple[int, ...], transposed: bool, parts: list[StackedLinear]) -> None:
        super().__init__()
        self.name, self.shape, self.transposed = name, torch.Size(shape), transposed
        self.parts = nn.ModuleList(parts)

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs that it was packed for."""
        return self._first()._like[0].dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self._first().buffers()).device

    def _first(self) -> StackedLinear:
        return cast(StackedLinear, self.parts[0])

    def product(self, index: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times one expert's matrix, plus bias [out]: [..., out]."""
        outputs = [cast(StackedLinear, part).at(index)(x) for part in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias

    def sorted_product(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [S, in], sorted by expert, whose rows end at offsets [E], by their experts' matrices: [S, out].

        bias: [E, out]. Rows beyond the last offset give zeros.
        """
        if self.routes():
            return self.routed_product(x, Routing(offsets.to(torch.int32)), bias)
        y = x.new_zeros(len(x), self.sizes()[0])
        start = 0
        for index, end in enumerate(offsets.tolist()):
            if end > start:
                y[start:end] = self.product(index, x[start:end], None if bias is None else bias[index])
            start = end
        return y

    def routed_product(self, x: Tensor, routing: Routing, bias: Tensor | None = None) -> Tensor:
        """x [S, in], whose rows are routed to the experts: [routing.rows(x), out], in one operator. bias: [E, out]."""
        return self._first().routed(x.to(self.dtype), routing, bias).to(x.dtype)

    def routes(self) -> bool:
        """Whether one operator multiplies routed rows."""
        return len(self.parts) == 1 and self._first().routes()

    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs of an expert's matrix."""
        rows, width = self.shape[1:]
        return (width, rows) if self.transposed else (rows, width)

    def __len__(self) -> int:
        return self.shape[0]

    def view(self, *shape: Any) -> View:
        """The whole stack as the operand of a product. shape: [experts, …], by which matrices below each other are told
        apart."""
        whole = View(self, None, self.transposed)
        wanted = tuple(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
        if len(wanted) not in (0, 3) or any(n not in (-1, own) for n, own in zip(wanted, self.shape, strict=False)):
            raise whole._refusal(f"view({', '.join(map(str, wanted))})")
        return whole

    def dim(self) -> int:
        """Of the parameter's axes."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> Any:
        """Of the parameter, or of one axis."""
        return self.shape if axis is None else self.shape[axis]

    def __getitem__(self, index: Any) -> View:
        return self.view()[index]

    def transpose(self, one: int, other: int) -> View:
        """The stack of transposed matrices."""
        return self.view().transpose(one, other)

    @property
    def mT(self) -> View:  # noqa: N802  (as torch names it)
        """The stack of transposed matrices."""
        return self.view().mT

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return View.__torch_function__(
            func, types, tuple(a.view() if isinstance(a, PackedStack) else a for a in args), kwargs
        )


class View:
    """A packed stack, or with an index one expert's matrix, as the operand of a product.

    turned: matrices are [in, out] instead of [out, in].
    """

    def __init__(self, stack: PackedStack, index: int | None, turned: bool) -> None:
        self.stack, self.index, self.turned = stack, index, turned

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        shape = self.stack.shape[0 if self.index is None else 1 :]
        return shape if self.turned == self.stack.transposed else torch.Size((*shape[:-2], shape[-1], shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """As a tensor's."""
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        """As a tensor's."""
        return self.stack.device

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if axis is None else self.shape[axis]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> View:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.numel() == 1 and index.dim() == 0)
        if self.index is not None or not one or (isinstance(index, Tensor) and index.is_floating_point()):
            raise self._refusal("indexing by anything but one expert's number")
        number, count = int(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"{self.stack.name} has {count} experts, and no number {number}")
        return View(self.stack, number % count, self.turned)

    def transpose(self, one: int, other: int) -> View:
        """The transposed matrices."""
        if {one % self.dim(), other % self.dim()} != {self.dim() - 1, self.dim() - 2}:
            raise self._refusal(f"transpose({one}, {other})")
        return View(self.stack, self.index, not self.turned)

    def t(self) -> View:
        """The transposed matrix."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> View:  # noqa: N802  (as torch names it)
        """The transposed matrices."""
        return self.transpose(-1, -2)

    @property
    def T(self) -> View:  # noqa: N802
        """The transposed matrix."""
        return self.transpose(0, 1)

    def _refusal(self, what: str) -> LlmqError:
        return LlmqError(
            f"{self.stack.name} is packed, and {what} needs its dense values: "
            "call model.set_experts_implementation('eager'), or load without llmq's kernels"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("input", "mat2", "bias"), args, strict=False)) | (kwargs or {})
        x, weight = given.pop("input", None), given.pop("weight", given.pop("mat2", given.pop("other", None)))
        if isinstance(x, Tensor) and isinstance(weight, View):
            y = weight._multiplied(func, x, {name: value for name, value in given.items() if value is not None})
            if y is not None:
                return y
        used = weight if isinstance(weight, View) else x if isinstance(x, View) else None
        name = getattr(func, "__name__", str(func))
        if used is None:
            raise LlmqError(f"a packed stack of experts has no {name}: load without llmq's kernels")
        raise used._refusal(name)

    def _multiplied(self, func: Callable[..., Any], x: Tensor, rest: dict[str, Any]) -> Tensor | None:
        """The product of x by this weight, as `func` computes it; None if it is no such product."""
        stack = self.stack
        if x.shape[-1] != self.shape[-2 if self.turned else -1]:
            raise ValueError(f"{stack.name} of shape {[*self.shape]} does not multiply {[*x.shape]}")
        if self.index is not None:
            if func is functional.linear and not self.turned and set(rest) <= {"bias"}:
                return stack.product(self.index, x, rest.get("bias"))
            return stack.product(self.index, x) if func in PRODUCTS and self.turned and not rest else None
        if func in GROUPED and self.turned:
            offsets = rest.pop("offs", rest.pop("bias", None))
            dtype = rest.pop("out_dtype", x.dtype)
            return None if rest or offsets is None else stack.sorted_product(x, offsets).to(dtype)
        if func in BATCHED and self.turned and x.dim() == 3 and len(x) == len(stack) and not rest:
            return torch.stack([stack.product(index, rows) for index, rows in enumerate(x)])
        return None


def joined(weights: list[Weight]) -> Weight | None:
    """The weight of which these are the rows, one after the other; None if one layer cannot run them."""
    first = weights[0]
    if len(weights) == 1:
        return first
    whole = [weight for weight in weights if isinstance(weight, IntWeight)]
    if len(whole) < len(weights) or not isinstance(first, IntWeight):
        return None
    alike = {(w.bits, w.in_features, w.group_size, w.scale.dtype) for w in whole}
    if len(alike) > 1 or any(weight.order is not None for weight in whole):
        return None
    zeros = [w.zero if w.zero is not None else torch.zeros_like(w.scale, dtype=torch.int8) for w in whole]
    zero = None if all(weight.zero is None for weight in whole) else torch.cat(zeros)
    words, scale = torch.cat([w.words for w in whole]), torch.cat([w.scale for w in whole])
    return IntWeight(words, scale, zero, first.bits, first.in_features, first.group_size)


def packed_stack(
    name: str,
    shape: tuple[int, ...],
    transposed: bool,
    weights: Iterable[list[Weight]],
    dtype: torch.dtype,
    file: str | Path,
) -> PackedStack:
    """The stack of experts whose matrices have these weights as their rows, one list per expert.

    file: where the first is stored. Raises LlmqError if experts are not stored alike.
    """
    parts: list[StackedLinear] = []
    for index, rows in enumerate(weights):
        try:
            whole = joined(rows) if len(parts) < 2 else None
            layers = [quant_linear(weight, None, dtype) for weight in ([whole] if whole is not None else rows)]
            if not parts:
                parts = [StackedLinear(shape[0], layer) for layer in layers]
            if len(parts) != len(layers):
                raise LlmqError("experts of one stack must be stored alike")
            for part, layer in zip(parts, layers, strict=True):
                part.put(index, layer)
        except (LlmqError, ValueError, TypeError) as error:
            raise LlmqError(f"{file}: {name}: {error}") from error
    return PackedStack(name, shape, transposed, parts)
