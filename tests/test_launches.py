"""What a UNet call would start on a GPU, counted without one; bench/host_cost.py measures its Python as well."""

import pytest
import torch
from host_cost import cases, count_copies, count_launches, count_own_bytes, make_narrow


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_patched_call_starts_no_more_kernels_than_stock(name):
    with torch.no_grad():
        launches = {what: count_launches(call) for what, call in cases(make_narrow(name)).items()}
    assert launches["exact, eager"] <= launches["stock"]
    assert launches["decoded step, eager"] <= 0.6 * launches["stock"]
    # The latents; time, text, its keys and values and SDXL's conditions are those of the call before.
    assert launches["replayed graph"] <= 2


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_replay_copies_no_more_than_the_latents_the_time_and_the_text(name):
    """Not what a key step leaves for others: their graphs read it where the key step's graph has written it."""
    with torch.no_grad():
        model = make_narrow(name)
        copied = count_copies(cases(model))
    assert set(copied) == {
        "replayed graph", "replayed encoder", "replayed decoder", "replayed key step", "replayed reuse"
    }  # fmt: skip
    assert max(copied.values()) <= count_own_bytes(model)
