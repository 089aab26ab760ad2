"""A short training that erases, and the weights that it leaves."""

import torch

import difffast
from difffast.erase.examples import Examples
from difffast.erase.text import Conditions

FAST = {"sampling_steps": 3, "learning_rate": 1e-3}


def weights_of(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


def assert_same(unet, expected):
    found = unet.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def make_trap(**options):
    def draw(seed, count):
        g = torch.Generator().manual_seed(seed)
        mean = torch.randn(count, 4, 8, 8, generator=g)
        return Examples(mean, torch.ones_like(mean), Conditions(torch.randn(count, 77, 64, generator=g)))

    return difffast.MetaTrap(draw(1, 2), draw(2, 1), draw(3, 1), **options)
