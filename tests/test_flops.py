"""Counted FLOPs are those of the specification (kernels.md, section 3)."""

import bench_flops
import pytest

from difffast import EncoderPropagation, FeatureReuse


@pytest.fixture(scope="module")
def costs():
    return bench_flops.Costs("sd15")


def test_parts_of_a_step(costs):
    assert costs.whole == pytest.approx(1606e9, rel=1e-3)
    assert costs.reuse[0] < 0.1 * costs.whole
    assert costs.reuse[0] < costs.reuse[1] < 0.25 * costs.whole
    # The decoder's skip-only work, 13.3% of it, moves to the encoder's side.
    assert costs.encode + costs.decode(1) == pytest.approx(costs.whole, rel=0.01)
    assert costs.encode == pytest.approx((0.31 + 0.015 + 0.133 * 0.675) * costs.whole, rel=0.02)


def test_images(costs):
    stock = 50 * costs.whole
    assert costs.image(EncoderPropagation(key_steps=1).plan(50)) == stock
    assert costs.image(EncoderPropagation().plan(50, device="cuda")) == pytest.approx(0.66 * stock, rel=0.01)
    assert costs.image(FeatureReuse(5).plan(50)) == 10 * costs.whole + 40 * costs.reuse[0]
    assert costs.image(FeatureReuse(5, branch=1).plan(50)) == 10 * costs.whole + 40 * costs.reuse[1]
