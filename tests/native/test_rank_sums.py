"""The sum over ranks, at every instruction set: threads are ranks here, as no call of a group uses the pool."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shuteye.parallel.group import ShmGroup, ShmRegion

SIZE = 3


def reduced(rows, width, dtype, part_dtype):
    """What every rank gets, and what it should get."""
    torch.manual_seed(rows * width)
    parts = [torch.randn(rows, width).mul(10.0 ** (rank - 1)).to(part_dtype) for rank in range(SIZE)]
    bias, residual = torch.randn(width).to(dtype), torch.randn(rows, width).to(dtype)
    region = ShmRegion(SIZE, epoch=1, slot_bytes=2048)

    def rank(number):
        group = ShmGroup(region.fd, number, SIZE, epoch=1, timeout_s=20)
        out = residual.clone()
        group.all_reduce_into(out, parts[number], bias=bias, residual=out)
        plain = parts[number].clone()
        group.all_reduce(plain)
        group.close()
        return out, plain

    with ThreadPoolExecutor(SIZE) as threads:
        results = list(threads.map(rank, range(SIZE)))
    region.close()
    total = (parts[0].float() + parts[1].float()) + parts[2].float()
    return results, (residual + (total + bias.float()).to(dtype), total.to(part_dtype))


@pytest.mark.parametrize("part_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 31), (2, 577), (1, 4000)])
def test_ranks_are_added_in_order(level, rows, width, dtype, part_dtype):
    """Another order, an end that is no full vector, or a rounding too many or too few."""
    results, expected = reduced(rows, width, dtype, part_dtype)
    for found in results:
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
