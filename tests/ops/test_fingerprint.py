"""Fingerprints of weights: any byte counts, and where it is."""

from __future__ import annotations

import pytest
import torch

from difffast.ops import _fingerprint, missing
from difffast.ops._fingerprint import fingerprint

needs_kernel = pytest.mark.skipif(missing("cpp") is not None, reason=str(missing("cpp")))


@pytest.fixture(params=[pytest.param("cpp", marks=needs_kernel), "sums"])
def way(request, monkeypatch):
    if request.param == "sums":
        monkeypatch.setattr(_fingerprint, "missing", lambda backend: f"no {backend} here")
    return request.param


def test_every_byte_counts(way):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_001, generator=generator)  # several parts, and a rest
    first = fingerprint([x])
    assert first == fingerprint([x.clone()])
    for place in [0, 1, 15, 16, 8191, 16_383, 16_384, 39_999, 40_000]:
        for change in (torch.nextafter(x[place], torch.tensor(9.0)), -x[place]):
            other = x.clone()
            other[place] = change
            assert fingerprint([other]) != first
    assert fingerprint([x[:-1]]) != first


@needs_kernel
def test_pairs_of_signs_do_not_cancel():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    found = {fingerprint([x])}
    generator = torch.Generator().manual_seed(1)
    pairs = {tuple(torch.randperm(len(x), generator=generator)[:2].sort().values.tolist()) for _ in range(5000)}
    for one, two in pairs:
        other = x.clone()
        other[one], other[two] = -x[one], -x[two]
        found.add(fingerprint([other]))
    assert len(found) == 1 + len(pairs)


@needs_kernel
def test_places_count():
    x = torch.randn(40_001, generator=torch.Generator().manual_seed(0))
    swapped = x.clone()
    swapped[[3, 19]] = x[[19, 3]]
    parts = torch.cat([x[16_384:32_768], x[:16_384], x[32_768:]])  # parts that change places
    zeros = torch.zeros(64)
    moved = [torch.zeros(64).index_fill_(0, torch.tensor([i]), 1.0) for i in range(64)]
    found = [fingerprint([each]) for each in (x, swapped, parts, zeros, zeros[:-1], zeros[:-16], *moved)]
    found.append(fingerprint([x, swapped]))
    found.append(fingerprint([swapped, x]))
    assert len(set(found)) == len(found)


def test_lists_of_tensors(way):
    tensors = [
        torch.arange(7, dtype=torch.uint8),
        torch.ones(3, 5, dtype=torch.bfloat16),
        torch.empty(0),
        torch.ones(()),
    ]
    first = fingerprint(tensors)
    assert first == fingerprint([each.clone() for each in tensors])
    for index in (0, 1, 3):
        others = [each.clone() for each in tensors]
        others[index].view(-1)[-1] += 1
        assert fingerprint(others) != first
    assert fingerprint([]) == fingerprint([])
    assert fingerprint([torch.nn.Parameter(torch.ones(3))]) == fingerprint([torch.ones(3)])
