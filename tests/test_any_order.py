"""Whatever users do to a patched pipeline, in any order: never a stale picture, and always stock's after unpatch."""

import pytest
from histories import History

#: Histories of the slow suite, 300: 25 in each of these blocks.
BLOCKS = 12


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.filterwarnings("ignore:Already")
@pytest.mark.parametrize("seed", range(4))
def test_some_histories(seed):
    History(seed).play(actions=6)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
@pytest.mark.filterwarnings("ignore:Already")
@pytest.mark.parametrize("block", range(1, BLOCKS + 1))
def test_many_histories(block):
    for seed in range(25 * block, 25 * (block + 1)):
        History(seed).play(actions=4)
