"""The exported form of LVDM's group norms is PyTorch's, and INT8 leaves its selecting products alone."""

from __future__ import annotations

import openvino as ov
import pytest
import torch
from openvino import opset14 as ops
from torch import nn

from pyengine.export.families.lvdm.group_norm import _by_products, group_norm
from pyengine.export.quantise import _selections


@pytest.mark.parametrize("shape", [(2, 5, 7, 192), (3, 16, 32), (1, 1, 4, 64)])
def test_both_forms_are_the_released_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(32, shape[-1]).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=torch.float64) + 3
    rows = x.movedim(1, -1)
    released = norm(rows.reshape(-1, shape[-1], shape[1])).reshape(rows.shape).movedim(-1, 1)
    torch.testing.assert_close(group_norm(x, norm), released, rtol=0, atol=1e-12)
    torch.testing.assert_close(_by_products(x, norm), released, rtol=0, atol=1e-11)


def test_products_that_select_are_not_quantised() -> None:
    x = ops.parameter([4, 6], ov.Type.f32)
    member = torch.eye(3).repeat_interleave(2, 0).numpy()
    gathered = ops.matmul(x, ops.constant(member), False, False, name="gather")
    mixed = ops.matmul(gathered, ops.constant(torch.randn(3, 3).numpy()), False, False, name="mix")
    assert _selections(ov.Model([mixed], [x])) == ["gather"]
