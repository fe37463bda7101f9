"""Optimizers by jaxfed's names, from `tff.learning.optimizers` and from Keras.

Each is the library's own with the library's own constants; only rate and momentum are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_reference.worker import NotExpressible


def optimizer(
    name: str, lr: float, momentum: float, library: str
) -> tff.learning.optimizers.Optimizer | Callable[[], tf.keras.optimizers.Optimizer]:
    """The optimizer `name` of one of the two libraries.

    Args:
      name: one of jaxfed's `OPTIMIZERS`.
      lr: learning rate.
      momentum: decay of the velocity; only `momentum` and `nesterov` use it.
      library: "tff" for a `tff.learning.optimizers.Optimizer`, which is all that TFF's federated
        averaging takes; "keras" for a function without arguments that makes a
        `tf.keras.optimizers.Optimizer`, for training without TFF.

    Raises:
      NotExpressible: if only the other library has it: TFF has no `nesterov`, Keras no `yogi`.
      ValueError: if neither has it, or there is no such library.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library: got {library!r}, expected one of {', '.join(LIBRARIES)}")
    table = LIBRARIES[library]
    if name not in table:
        others = [other for other, names in LIBRARIES.items() if name in names]
        got = f"optimizer: got {name!r} of {library}, expected one of {', '.join(table)}"
        if not others:
            raise ValueError(got)
        raise NotExpressible(f"{got}; take one of these, as only {others[0]} has {name}")
    if library == "keras":
        return lambda: table[name](lr, momentum)
    return table[name](lr, momentum)


def exact(make: Callable[..., Any], **given: float) -> Any:
    """`make(**given)`, where `given` and `make`'s own constants have the weights' type.

    A Python float that meets a tensor in `tf.cast` or in TFF's state becomes float32 on its way to
    float64. Adam's steps would be off by 1e-5 in both libraries (1 - 0.999 in float32), and TFF
    would refuse momentum, adamw and rmsprop, which multiply float64 weights by such numbers.
    """
    parameters = inspect.signature(make).parameters.items()
    constants = {name: p.default for name, p in parameters if isinstance(p.default, float)}
    number = np.dtype(tf.keras.backend.floatx()).type
    return make(**{name: number(value) for name, value in {**constants, **given}.items()})


LIBRARIES: dict[str, dict[str, Callable[[float, float], Any]]] = {
    "tff": {
        "sgd": lambda lr, _: exact(tff.learning.optimizers.build_sgdm, learning_rate=lr),
        "momentum": lambda lr, m: exact(
            tff.learning.optimizers.build_sgdm, learning_rate=lr, momentum=m
        ),
        "adam": lambda lr, _: exact(tff.learning.optimizers.build_adam, learning_rate=lr),
        "adamw": lambda lr, _: exact(tff.learning.optimizers.build_adamw, learning_rate=lr),
        "adagrad": lambda lr, _: exact(tff.learning.optimizers.build_adagrad, learning_rate=lr),
        "rmsprop": lambda lr, _: exact(tff.learning.optimizers.build_rmsprop, learning_rate=lr),
        # Its step size is a product of rate, betas and a step count cast to float32, whatever the
        # weights are; numbers of another type would be an error.
        "yogi": lambda lr, _: tff.learning.optimizers.build_yogi(float(lr)),
    },
    "keras": {
        "sgd": lambda lr, _: exact(tf.keras.optimizers.SGD, learning_rate=lr),
        "momentum": lambda lr, m: exact(tf.keras.optimizers.SGD, learning_rate=lr, momentum=m),
        "nesterov": lambda lr, m: exact(
            tf.keras.optimizers.SGD, learning_rate=lr, momentum=m, nesterov=True
        ),
        "adam": lambda lr, _: exact(tf.keras.optimizers.Adam, learning_rate=lr),
        "adamw": lambda lr, _: exact(tf.keras.optimizers.AdamW, learning_rate=lr),
        "adagrad": lambda lr, _: exact(tf.keras.optimizers.Adagrad, learning_rate=lr),
        "rmsprop": lambda lr, _: exact(tf.keras.optimizers.RMSprop, learning_rate=lr),
    },
}
