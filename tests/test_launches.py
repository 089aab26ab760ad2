"""What a UNet call would start on a GPU, counted without one; bench/host_cost.py measures its Python as well."""

import pytest
import torch
from host_cost import cases, count_launches, make_narrow


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_patched_call_starts_no_more_kernels_than_stock(name):
    with torch.no_grad():
        launches = {what: count_launches(call) for what, call in cases(make_narrow(name)).items()}
    assert launches["exact, eager"] <= launches["stock"]
    assert launches["decoded step, eager"] <= 0.6 * launches["stock"]
    # The latents; time, text, its keys and values and SDXL's conditions are those of the call before.
    assert launches["replayed graph"] <= 2
