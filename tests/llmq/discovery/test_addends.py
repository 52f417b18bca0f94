"""What a weight's output is added to, in blocks of a few lines whose streams are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery.addends import Seen, see
from llmq.discovery.view import View

WIDTH = 6


class Block(nn.Module):
    """Two matrices, of which `first` is used before `second`, though it is defined after it."""

    def __init__(self, run: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def sequential(block: Block, x: Tensor) -> Tensor:
    x = x + block.first(x.tanh())
    return x + block.second(x.tanh())


def parallel(block: Block, x: Tensor) -> Tensor:
    return block.first(x) + block.second(x.tanh()) + x


def parallel_later(block: Block, x: Tensor) -> Tensor:
    first, second = block.first(x), block.second(x.tanh())
    return x + first + second


def in_place(block: Block, x: Tensor) -> Tensor:
    x = x.clone()
    x += block.first(x.tanh())
    out = block.second(x.tanh())
    return out.add_(x)


def scaled(block: Block, x: Tensor) -> Tensor:
    x = x + 0.25 * block.first(x.tanh())
    return x + block.gain * block.second(x.tanh())


def gated(block: Block, x: Tensor) -> Tensor:
    first = block.first(x.tanh())
    x = block.gain * x + first
    second = block.second(x.tanh())
    return 0.5 * x + second


def reshaped(block: Block, x: Tensor) -> Tensor:
    x = x + block.first(x.tanh().reshape(-1, WIDTH)).view_as(x).contiguous()
    return x + nn.functional.dropout(block.second(x.tanh()), 0.5, training=False)


def rounded(block: Block, x: Tensor) -> Tensor:
    x = (x.double() + block.first(x.tanh()).double()).float()
    return x + block.second(x.tanh())


def normalized(block: Block, x: Tensor) -> Tensor:
    x = x + nn.functional.rms_norm(block.first(x.tanh()), (WIDTH,))
    return x * block.second(x.tanh())


def swapped(block: Block, x: Tensor) -> Tensor:
    # The tokens change places before the sum.
    x = x + block.first(x.tanh()).transpose(0, 1).contiguous()
    return x + block.second(x.tanh())


def twice(block: Block, x: Tensor) -> Tensor:
    x = x + block.first(x.tanh())
    x = x + block.first(x.tanh())
    return x + block.second(x.tanh())


def look(run: Callable[[Block, Tensor], Tensor]) -> tuple[Block, Tensor, list[Seen]]:
    torch.manual_seed(0)
    block, x = Block(run), torch.randn(3, 3, WIDTH)
    with torch.no_grad():
        seen, _ = see(block, [View("first.weight"), View("second.weight")], lambda: block(x))
    return block, x, seen


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, WIDTH)


@pytest.mark.parametrize("run", [sequential, in_place, reshaped, rounded])
def test_streams_of_two_residuals(run: Callable[[Block, Tensor], Tensor]) -> None:
    block, x, (first, second) = look(run)
    torch.testing.assert_close(first.stream, rows(x))
    torch.testing.assert_close(second.stream, rows(x + block.first(x.tanh())))
    torch.testing.assert_close(first.rows, rows(x.tanh()))
    assert first.first < second.first


@pytest.mark.parametrize("run", [parallel, parallel_later])
def test_beside_each_other_only_what_is_known_counts(run: Callable[[Block, Tensor], Tensor]) -> None:
    block, x, (first, second) = look(run)
    torch.testing.assert_close(first.stream, rows(x))
    torch.testing.assert_close(second.stream, rows(block.first(x) + x))


def test_a_factor_of_the_output_divides_the_stream() -> None:
    block, x, (first, second) = look(scaled)
    torch.testing.assert_close(first.stream, rows(4 * x))
    torch.testing.assert_close(second.stream, rows((x + 0.25 * block.first(x.tanh())) / block.gain))


def test_a_factor_of_the_stream_does_not_make_it_younger() -> None:
    block, x, (first, second) = look(gated)
    torch.testing.assert_close(first.stream, rows(block.gain * x))
    torch.testing.assert_close(second.stream, rows(0.5 * (block.gain * x + block.first(x.tanh()))))


def test_no_stream_behind_a_norm_or_a_product_or_in_another_order() -> None:
    assert [one.stream for one in look(normalized)[2]] == [None, None]
    _, _, (first, second) = look(swapped)
    assert first.stream is None and second.stream is not None


def test_a_weight_that_is_used_twice_has_all_its_inputs_and_no_stream() -> None:
    block, x, (first, second) = look(twice)
    middle = x + block.first(x.tanh())
    torch.testing.assert_close(first.rows, torch.cat([rows(x.tanh()), rows(middle.tanh())]))
    assert first.stream is None and second.stream is not None


def test_a_run_is_broken_off_when_all_was_seen() -> None:
    torch.manual_seed(0)
    ended = []

    def run(block: Block, x: Tensor) -> Tensor:
        x = sequential(block, x)
        ended.append(True)
        return x

    block, x = Block(run), torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        (whole,), counts = see(block, [View("first.weight")], lambda: block(x))
        (part,), again = see(block, [View("first.weight")], lambda: block(x), counts)
    assert len(ended) == 1 and again == counts
    assert torch.equal(part.rows, whole.rows)
    assert part.stream is not None and whole.stream is not None and torch.equal(part.stream, whole.stream)
