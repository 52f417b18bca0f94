"""The divergence of logits, against PyTorch's own of the whole at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.block.loss import LOGITS, chunk_of, divergence, relative_loss


def states() -> tuple[Tensor, Tensor, torch.nn.Linear]:
    torch.manual_seed(3)
    return torch.randn(2, 7, 5).requires_grad_(), torch.randn(2, 7, 5), torch.nn.Linear(5, 11).requires_grad_(False)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_is_that_of_the_whole_with_its_gradient(chunk: int) -> None:
    hidden, wanted, head = states()
    seen: list[int] = []

    def logits(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return torch.tanh(head(x))

    have = divergence(logits, hidden, wanted, chunk)
    want = torch.nn.functional.kl_div(
        torch.tanh(head(hidden)).log_softmax(-1).flatten(0, 1),
        torch.tanh(head(wanted)).log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(*(torch.autograd.grad(3 * each, hidden)[0] for each in (have, want)))
    assert max(seen) == min(chunk, 14)


def test_without_gradients_none_is_computed() -> None:
    hidden, wanted, head = states()
    with torch.no_grad():
        assert not divergence(head, hidden, wanted, 3).requires_grad
    assert float(divergence(head, hidden.detach(), hidden.detach(), 3)) == 0


def test_a_chunk_has_at_least_one_token() -> None:
    assert chunk_of(LOGITS * 3) == 1 and chunk_of(LOGITS // 8) == 8


def test_the_relative_loss_is_the_mean_of_each_token_s() -> None:
    output, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3) * 10
    target[0, 0] = 0  # the floor: a small part of the mean size
    size = target.square().mean(-1)
    want = ((output - target).square().mean(-1) / (size + 0.01 * size.mean())).mean()
    torch.testing.assert_close(relative_loss(output.bfloat16().float(), target), want, rtol=0.02, atol=0)
