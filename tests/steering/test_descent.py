"""Gradient descent on x^2 / 2 a row: an update with step size s multiplies x by 1 - s, and the loss by its square."""

import pytest
import torch

from difffast.steering.descent import Leaf, descend, descend_unguarded


def run(how, start, step_size, iterations=3, below=0.0):
    leaf = Leaf(torch.tensor(start, dtype=torch.float64)[:, None], step_size)
    found = how(
        range(len(start)),
        [leaf],
        lambda rows, values: values[0].square().sum(1) / 2,
        iterations=iterations,
        is_done=lambda row, loss: loss < below,
    )
    return leaf.value[:, 0].tolist(), found


@pytest.mark.parametrize("how", [descend, descend_unguarded])
def test_rows_move_by_their_gradient(how):
    values, found = run(how, [4.0, -8.0], 0.5)
    assert values == [0.5, -1.0]
    assert found[0].losses == [8.0, 2.0, 0.5]
    assert found[1].losses == [32.0, 8.0, 2.0]
    assert {each.outcome for each in found.values()} == {"iterations"}


def test_guarded_a_row_that_is_done_stays():
    values, found = run(descend, [4.0, 1.0], 0.5, below=1.0)
    assert values == [1.0, 1.0]
    assert found[0].losses == [8.0, 2.0, 0.5]
    assert found[1].losses == [0.5]
    assert {each.outcome for each in found.values()} == {"done"}


def test_unguarded_a_row_is_updated_before_it_is_asked_whether_it_is_done():
    values, found = run(descend_unguarded, [4.0, 1.0], 0.5, below=1.0)
    assert values == [0.5, 0.5]
    assert found[0].losses == [8.0, 2.0, 0.5]
    assert found[1].losses == [0.5]
    assert {each.outcome for each in found.values()} == {"done"}


def test_only_guarded_rows_go_back():
    values, found = run(descend, [1.0], 3.0)
    assert (values, found[0].losses, found[0].outcome) == ([1.0], [0.5, 2.0], "diverged")
    values, found = run(descend_unguarded, [1.0], 3.0)
    assert (values, found[0].losses, found[0].outcome) == ([-8.0], [0.5, 2.0, 8.0], "iterations")


def test_guarded_the_last_update_is_looked_at_as_well():
    values, found = run(descend, [1.0, 2.0], 3.0, iterations=1)
    assert (values, found[0].losses, found[1].losses) == ([1.0, 2.0], [0.5], [2.0])
    assert {each.outcome for each in found.values()} == {"diverged"}
    values, found = run(descend, [1.0], 0.5, iterations=1)
    assert (values, found[0].losses, found[0].outcome) == ([0.5], [0.5], "iterations")


def test_what_falls_and_rises_in_the_last_update_goes_back_to_its_lowest():
    leaf, heights = Leaf(torch.zeros(1, 1, dtype=torch.float64), 1.0), {0.0: 3.0, -1.0: 2.0, -2.0: 4.0}

    def evaluate(rows, values):
        (place,) = values[0]
        return (
            place - place.detach() + heights[float(place.detach())]
        )  # the slope is 1 everywhere, the loss one of these

    found = descend([0], [leaf], evaluate, iterations=2)
    assert (leaf.value.tolist(), found[0].losses, found[0].outcome) == ([[-1.0]], [3.0, 2.0], "diverged")


@pytest.mark.parametrize(("how", "looks"), [(descend, 4), (descend_unguarded, 3)])
def test_the_guard_costs_one_look_without_gradients(how, looks):
    wanted = []

    def evaluate(rows, values):
        wanted.append(torch.is_grad_enabled())
        return values[0].square().sum(1)

    how([0], [Leaf(torch.ones(1, 1), 0.1)], evaluate, iterations=3)
    assert wanted == [True] * 3 + [False] * (looks - 3)


@pytest.mark.parametrize("how", [descend, descend_unguarded])
def test_nothing_to_do(how):
    assert run(how, [], 0.5)[1] == {}
    values, found = run(how, [4.0], 0.5, iterations=0)
    assert (values, found[0].losses) == ([4.0], [])
    leaf = Leaf(torch.ones(1, 1), 0.5)
    assert how([0], [leaf], lambda rows, values: torch.ones(1), iterations=3)[0].losses
    assert leaf.value.tolist() == [[1.0]]
