"""Facades of modules give what the module gives with the descendants replaced, eagerly and in torch.compile's trace."""

import pytest
import torch
from torch import nn

from difffast.surgery.facade import get_descendant, replace_descendants


class Adapted(nn.Module):
    """All that holds modules: attributes, a list, a dict as LoRA's layers have, a sequence, and one in another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.several = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.adapters = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.sequence = nn.Sequential(nn.SiLU(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))

    def forward(self, x):
        x = self.first(x)
        for layer in self.several:
            x = layer(x)
        for name in self.adapters.keys():  # noqa: SIM118, as peft does
            x = x + self.adapters[name](x)
        return self.sequence(x)


NAMES = [name for name, module in Adapted().named_modules() if isinstance(module, nn.Linear)]
SETS = [*([name] for name in NAMES), NAMES]


def add_one(module):
    return lambda x: module(x) + 1


def expected_of(model, names, x):
    """The same by PyTorch's own hooks."""
    hooks = [model.get_submodule(name).register_forward_hook(lambda _m, _x, y: y + 1) for name in names]
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("names", SETS, ids=str)
def test_descendants_are_replaced(names, compiled):
    torch.manual_seed(0)
    model, x = Adapted().double(), torch.randn(2, 4, dtype=torch.float64)
    before = model(x)

    def run(x):
        # One after another, as the kinds of layers come: also facades of facades.
        facade = model
        for name in names:
            facade = replace_descendants(facade, {name: add_one(get_descendant(facade, name))})
        return facade(x), replace_descendants(model, {name: add_one(model.get_submodule(name)) for name in names})(x)

    with torch.no_grad():
        results = torch.compile(run, backend="eager", fullgraph=True)(x) if compiled else run(x)
    expected = expected_of(model, names, x)
    assert not torch.allclose(expected, before)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
