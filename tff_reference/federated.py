"""A case in TFF itself: its learning process, watched from inside, round after round."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_reference import networks, weights
from tff_reference.optimizers import NotExpressible, optimizer

Arrays = dict  # of str -> np.ndarray


class WatchedMean(tff.aggregators.WeightedAggregationFactory):
    """TFF's weighted mean, which also reports what it returns and the sum of the weights."""

    def create(self, value_type: Any, weight_type: Any) -> Any:
        """As `tff.aggregators.MeanFactory.create`."""
        mean = tff.aggregators.MeanFactory().create(value_type, weight_type)

        @tff.federated_computation(
            mean.initialize.type_signature.result,
            tff.FederatedType(value_type, tff.CLIENTS),
            tff.FederatedType(weight_type, tff.CLIENTS),
        )
        def next_fn(state: Any, value: Any, weight: Any) -> Any:
            output = mean.next(state, value, weight)
            return _reporting(output, tff.federated_sum(weight))

        return tff.templates.AggregationProcess(mean.initialize, next_fn)


class WatchedUnweightedMean(tff.aggregators.UnweightedAggregationFactory):
    """TFF's unweighted mean, which also reports what it returns and the number of clients."""

    def create(self, value_type: Any) -> Any:
        """As `tff.aggregators.UnweightedMeanFactory.create`."""
        mean = tff.aggregators.UnweightedMeanFactory().create(value_type)

        @tff.federated_computation(
            mean.initialize.type_signature.result, tff.FederatedType(value_type, tff.CLIENTS)
        )
        def next_fn(state: Any, value: Any) -> Any:
            ones = tff.federated_value(1.0, tff.CLIENTS)
            return _reporting(mean.next(state, value), tff.federated_sum(ones))

        return tff.templates.AggregationProcess(mean.initialize, next_fn)


def _reporting(output: Any, weight: Any) -> Any:
    seen = collections.OrderedDict(mean=output.result, weight=weight)
    return tff.templates.MeasuredProcessOutput(output.state, output.result, tff.federated_zip(seen))


class Round(NamedTuple):
    """What one call of TFF's `next` gives."""

    params: Arrays
    stats: Arrays
    mean: Arrays
    """The aggregated update: what the server's optimizer is given."""
    weight: float
    """Sum of the clients' weights."""
    metrics: Arrays
    """Training loss, accuracy and number of examples."""


class Process(NamedTuple):
    """TFF's learning process of a case, on arrays with names."""

    start: Callable[[Arrays, Arrays], Any]
    """`(params, stats) -> state`."""
    next: Callable[[Any, list], tuple[Any, Round]]
    """`(state, clients' datasets) -> (state, round)`."""
    evaluate: Callable[[Arrays, Arrays, Any], Arrays]
    """`(params, stats, dataset) -> metrics`, by `build_fed_eval`."""


def build(case: dict, model: tf.keras.Model, params: list[str], stats: list[str]) -> Process:
    """Builds TFF's process for a case whose weights are called `params` and `stats`.

    `model` is the network once more; the order of its weights is TFF's.
    """
    dtype = tf.as_dtype(case["dtype"])
    network = case["network"]

    def model_fn() -> Any:
        # TFF always says which phase it means. Left open here, it would make a conditional of
        # every BatchNorm layer, and building a MobileNet in a graph take three times as long.
        with tf.keras.backend.learning_phase_scope(0):
            model = networks.build(**network)
        return tff.learning.models.from_keras_model(
            model,
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            input_spec=(
                tf.TensorSpec([None, *network["input_shape"]], dtype),
                tf.TensorSpec([None], tf.int32),
            ),
            metrics=[tf.keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        )

    trainable, fixed = model.trainable_variables, model.non_trainable_variables
    process = _learning_process(case, model_fn)
    evaluation = tff.learning.algorithms.build_fed_eval(model_fn)

    def to_tff(state: Any, of: Any, values: Arrays, constants: Arrays) -> Any:
        return of.set_model_weights(
            state,
            tff.learning.models.ModelWeights(
                weights.to_keras(trainable, values), weights.to_keras(fixed, constants)
            ),
        )

    def start(values: Arrays, constants: Arrays) -> Any:
        return to_tff(process.initialize(), process, values, constants)

    def next_(state: Any, clients: list) -> tuple[Any, Round]:
        output = process.next(state, clients)
        after = process.get_model_weights(output.state)
        seen = output.metrics["aggregator"]
        done = Round(
            params=weights.to_jaxfed(trainable, list(after.trainable), params),
            stats=weights.to_jaxfed(fixed, list(after.non_trainable), stats),
            mean=weights.to_jaxfed(trainable, list(seen["mean"]), params),
            weight=float(seen["weight"]),
            metrics=_named(output.metrics["client_work"]["train"]),
        )
        return output.state, done

    def evaluate(values: Arrays, constants: Arrays, dataset: Any) -> Arrays:
        state = to_tff(evaluation.initialize(), evaluation, values, constants)
        metrics = evaluation.next(state, [dataset]).metrics
        return _named(metrics["client_work"]["eval"]["current_round_metrics"])

    return Process(start, next_, evaluate)


def _learning_process(case: dict, model_fn: Callable) -> Any:
    algorithms, server = tff.learning.algorithms, _optimizer(case["server"])
    kind = case["algorithm"], case["weighting"]
    if kind == ("fedsgd", "examples"):
        return algorithms.build_fed_sgd(model_fn, server, model_aggregator=WatchedMean())
    if kind == ("fedavg", "examples"):
        return algorithms.build_weighted_fed_avg(
            model_fn, _optimizer(case["client"]), server, model_aggregator=WatchedMean()
        )
    if kind == ("fedavg", "uniform"):
        return algorithms.build_unweighted_fed_avg(
            model_fn, _optimizer(case["client"]), server, model_aggregator=WatchedUnweightedMean()
        )
    if kind == ("fedprox", "examples"):
        return algorithms.build_weighted_fed_prox(
            model_fn, case["prox_mu"], _optimizer(case["client"]), server,
            model_aggregator=WatchedMean(),
        )  # fmt: skip
    if kind == ("fedprox", "uniform"):
        return algorithms.build_unweighted_fed_prox(
            model_fn, case["prox_mu"], _optimizer(case["client"]), server,
            model_aggregator=WatchedUnweightedMean(),
        )  # fmt: skip
    raise NotExpressible(
        f"algorithm: got {kind[0]} with weighting {kind[1]}, expected fedavg or fedprox with "
        "either weighting, or fedsgd with weighting examples: TFF has no other"
    )


def _optimizer(config: dict) -> Any:
    return optimizer(config["optimizer"], config["lr"], config["momentum"], "tff")


def _named(metrics: Any) -> Arrays:
    wanted = ("loss", "accuracy", "num_examples")
    return {name: np.asarray(metrics[name]) for name in wanted}
