"""QuantLinear: a linear layer whose weight stays packed; its forward is one operator of llmq_kernels.

Its kinds are in linear.py. It has only buffers, so it is not trained; its input gets a gradient, as adapters need. It
is an nn.Linear, like bitsandbytes' layers, so that peft recognizes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq_kernels.backend import triton_refusal

HALF = {torch.bfloat16, torch.float16}


class QuantLinear(nn.Linear):
    """y = x · Wᵀ + bias with W [out, in] packed. dtype: of the inputs that it was packed for, and of the bias; notes:
    why no faster layout is possible, if it runs on the plain operator.

    `qweight` holds the codes in the layout's own form. Raises LlmqError when moved to a device or cast to a dtype that
    this form does not support: load the folder there instead.
    """

    qweight: Tensor
    layout = "plain"
    notes: dict[str, str]

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.notes = {}
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Empty; peft and models read its device, and its dtype to cast inputs. Adding to it is an error."""
        return self.qweight.new_empty(0, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., in], else TypeError. Returns [..., out] in x's dtype, computed in the layer's dtype."""
        if not x.dtype.is_floating_point:
            raise TypeError(f"x must be floating, not {x.dtype}")
        return self.product(x.to(self.dtype)).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] in the layer's dtype → [..., out]."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight's values [out, in], in the layer's dtype."""
        with torch.enable_grad():
            x = self.weight.new_zeros(self.out_features, self.in_features).requires_grad_()
            every = torch.eye(self.out_features, dtype=self.dtype, device=x.device)
            (weight,) = torch.autograd.grad(self.product(x), x, every)
        return weight

    def moved(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the packed weight cannot be moved to another kind of device or used with another dtype, or None."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Implements .to() and similar: the weight's tensors are moved but never cast; the bias is cast too."""
        changed = apply(self, self._buffers, fn)
        if changed:
            self.settle()
        return self

    def settle(self) -> None:
        """Called after a move: the new device may have a better layout, or only the plain operator."""
        self.notes = {}
        if self.qweight.device.type not in ("cpu", "meta"):
            reason = triton_refusal(self.qweight.device)
            if self.dtype not in HALF:
                reason = f"inputs must be bfloat16 or float16, not {self.dtype}"
            if reason is not None:
                self.notes = {"triton": reason}

    def fresh(self) -> list[Tensor]:
        """Buffers allocated by packing; others may alias the mapped checkpoint."""
        return []

    def extra_repr(self) -> str:
        """The text that print shows."""
        return f"in={self.in_features}, out={self.out_features}, {self.layout}, bias={self.bias is not None}"


def apply(layer: QuantLinear, buffers: dict[str, Tensor | None], fn: Callable[[Tensor], Tensor]) -> bool:
    """Move the buffers of a layer, or of many that are stacked, as nn.Module._apply does; whether anything changed.

    Tensors of the weight are moved but never cast. Raises LlmqError if the layer cannot be moved there.
    """
    device = layer.qweight.device
    to = fn(torch.empty(0, dtype=layer.dtype, device=device))
    changed = (to.device.type, to.dtype) != (device.type, layer.dtype) and to.device.type != "meta"
    reason = layer.moved(to.device, to.dtype) if changed else None
    if reason is not None:
        raise LlmqError(
            f"{layer} cannot be moved to {to.device}, {to.dtype}: {reason}; the model is now only partly moved: "
            "load the folder again, on that device"
        )
    for name, buffer in buffers.items():
        if buffer is not None:
            new = fn(buffer)
            kept = new.dtype == buffer.dtype or name == "bias"
            buffers[name] = new if kept else buffer.to(new.device)
    layer.dtype = to.dtype
    return changed
