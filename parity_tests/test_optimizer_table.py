"""jaxfed's optimizers are TFF's; optax' defaults of the same names, and one of Keras', are not."""

import numpy as np
import pytest

from jaxfed.optimizers import OPTIMIZERS
from parity_tests.optimizer_table import (
    LR,
    OPTAX,
    SIZES,
    inputs,
    markdown,
    measured,
    path,
    recorded,
    rows,
    under,
    worst_error,
)
from tff_reference.process import Worker

ROUNDING = 1e-14  # measured: 7e-16
# TFF's yogi takes 1 - 0.999 in float32, which is off by up to half a spacing of the numbers below
# 1, twice: in the step size and in the second moment, each under a root. Measured: 9e-6.
YOGI = float(np.finfo(np.float32).epsneg) / 2 / (1 - 0.999)


@pytest.fixture(scope="module")
def trace():
    return recorded()


@pytest.fixture(scope="module")
def table(trace):
    return {row.name: row for row in rows(trace)}


def test_every_optimizer_has_a_row(table):
    assert list(table) == list(OPTAX)
    # Reddi's are in no other library.
    assert set(OPTIMIZERS) - set(OPTAX) == {"fedadam", "fedyogi", "fedadagrad"}
    assert [name for name, row in table.items() if row.jaxfed_tff is None] == ["nesterov"]
    assert [name for name, row in table.items() if row.jaxfed_keras is None] == ["yogi"]


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "adagrad", "rmsprop"])
def test_jaxfed_equals_tff(table, name):
    assert table[name].jaxfed_tff <= ROUNDING


def test_jaxfed_equals_tff_in_yogi_but_for_its_float32(table):
    assert ROUNDING < table["yogi"].jaxfed_tff <= YOGI


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "adamw", "adagrad"])
def test_jaxfed_equals_keras(table, name):
    assert table[name].jaxfed_keras <= ROUNDING


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad"])
def test_optax_defaults_that_equal_tff(table, name):
    assert table[name].optax_tff <= ROUNDING


@pytest.mark.parametrize(
    ("name", "at_any", "at_one"),
    [("adam", 0.9, 1e-6), ("adamw", 0.9, 1e-4), ("rmsprop", 0.9, 1e-7), ("yogi", 0.9, 1e-2)],
)
def test_optax_defaults_that_do_not(table, name, at_any, at_one):
    """Small gradients are another world; at gradients near 1 the difference is small but there."""
    assert table[name].optax_tff > at_any
    assert table[name].optax_tff_at_one > at_one


def test_keras_has_another_rmsprop(table):
    assert table["rmsprop"].jaxfed_keras > 0.9


def yogi_second(g):
    return 1e-6 + 0.001 * np.sign(g**2 - 1e-6) * g**2


# The first step from 0, over -LR: where each adds its epsilon, and what it starts from.
FIRST = {
    "adam": {
        "tff": lambda g: g / (np.abs(g) + 1e-7 / np.sqrt(0.001)),
        "keras": lambda g: g / (np.abs(g) + 1e-7 / np.sqrt(0.001)),
        "optax": lambda g: g / (np.abs(g) + 1e-8),
    },
    "rmsprop": {
        "tff": lambda g: g / (np.sqrt(0.1 * g**2) + 1e-7),
        "keras": lambda g: g / np.sqrt(0.1 * g**2 + 1e-7),
        "optax": lambda g: g / np.sqrt(0.1 * g**2 + 1e-8),
    },
    "yogi": {
        "tff": lambda g: np.sqrt(0.001) * g / (np.sqrt(yogi_second(g)) + 1e-3),
        "optax": lambda g: (g + 9e-6) / (np.sqrt(yogi_second(g) / 0.001) + 1e-3),
    },
}


@pytest.mark.parametrize(("name", "library"), [(name, of) for name in FIRST for of in FIRST[name]])
def test_the_reasons_given_explain_the_first_step(trace, name, library):
    gradient = inputs()["gradients/from_zero"][0]
    traced = path(OPTAX[name]()) if library == "optax" else under(trace, f"{library}/{name}/")
    tolerance = YOGI if (name, library) == ("yogi", "tff") else ROUNDING
    expected = -LR * FIRST[name][library](gradient)
    np.testing.assert_allclose(traced["from_zero"][0], expected, rtol=tolerance)


def test_weight_decay_explains_adamw(trace):
    start = inputs()["weights/mixed"]
    adamw, adam = (trace[f"tff/{name}/mixed"][0] for name in ("adamw", "adam"))
    np.testing.assert_allclose(adamw, adam - LR * 0.004 * start, rtol=ROUNDING)


def test_the_gradients_have_every_size():
    """Otherwise the table would be about one corner of the rules."""
    given = inputs()["gradients/from_zero"]
    assert len(SIZES) == given.shape[1] == 12
    assert (given[2] == 0).all()
    assert (given[:, -1] == 0).all()
    np.testing.assert_allclose(np.log10(np.abs(given[0, :-1])), np.arange(-8, 3), atol=0.31)


def test_a_trace_of_other_inputs_is_refused(monkeypatch):
    monkeypatch.setattr("parity_tests.optimizer_table.LR", 0.2)
    with pytest.raises(ValueError, match="other inputs"):
        recorded()


def test_markdown(table):
    lines = markdown(list(table.values())).splitlines()
    assert len(lines) == 2 + len(OPTAX)
    assert {line.count("|") for line in lines} == {7}


@pytest.mark.slow
def test_the_recorded_trace_is_what_tff_computes(tff_python, tmp_path, trace):
    with Worker(tff_python, tmp_path / "log", "tff_reference.optimizer_table:run") as worker:
        now = measured(worker, tmp_path)
    assert set(now) == set(trace)
    assert worst_error(now, trace) <= ROUNDING
