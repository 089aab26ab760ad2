"""What a GPU's programs trace is traced here on the meta device, where operators ask how operands lie in memory."""

import pytest
import torch

from difffast import ops


def attend(q, k):
    return ops.cross_attention(q, k, k)


def attend_to_pixels(q, k):
    return ops.joint_attention(q, k, k, q, q)


@pytest.mark.parametrize("call", [attend, attend_to_pixels, lambda q, k: ops.self_attention(q, q, q)])
def test_attention_is_one_graph(call):
    q, k = (torch.empty(2, n, 4, 8, device="meta", dtype=torch.float16).transpose(1, 2) for n in (64, 7))
    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        assert compiled(q, k).shape == call(q, k).shape
