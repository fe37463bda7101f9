"""Keras twins of jaxfed's networks: the same layers under the same names, giving logits.

The MobileNets are keras.applications' own. With another norm than "batch" they are a clone of it
in which every BatchNormalization is replaced, so that what is compared with them is compared with
Keras and not with a second reading of the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

layers = tf.keras.layers
applications = tf.keras.applications

NORMS = ("batch", "group", "layer", "none")


def build(
    name: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float,
    norm: str,
    dropout: bool,
    nested: bool = False,
) -> tf.keras.Model:
    """The network `name` in the type `tf.keras.backend.floatx()`.

    Args:
      name: a key of `SMALL`, or one of `MOBILENETS`.
      input_shape: (H, W, C) of one image.
      num_classes: number of logits.
      width: multiplies the numbers of channels.
      norm: one of `NORMS`.
      dropout: False sets every rate of dropout to 0.
      nested: put the network into a Sequential, where TFF's check for BatchNorm does not look.
        The names of the variables stay the same.

    Returns:
      Images [B, H, W, C] -> logits [B, num_classes].

    Raises:
      ValueError: if there is no such network or norm, or logistic is asked for a width or norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, expected one of {', '.join(NORMS)}")
    if name in SMALL:
        image = layers.Input(input_shape)
        features = SMALL[name](image, width, norm, dropout)
        logits = layers.Dense(num_classes, name="logits")(layers.Flatten()(features))
        model = tf.keras.Model(image, logits, name=name)
    elif name in MOBILENETS:
        model = mobilenet(name, input_shape, num_classes, width, dropout)
        model = model if norm == "batch" else with_norm(model, norm)
    else:
        known = ", ".join([*SMALL, *MOBILENETS])
        raise ValueError(f"network: got {name!r}, expected one of {known}")
    return tf.keras.Sequential([model]) if nested else model


def norm_layer(norm: str, channels: int, name: str) -> layers.Layer:
    """The normalisation of the last axis, of size `channels`; the identity for "none".

    Epsilon is 1e-3 and BatchNorm's momentum 0.99: Keras' defaults.
    """
    if norm == "batch":
        return layers.BatchNormalization(name=name)
    if norm == "group":
        # Keras: 32 groups, which few of these networks' layers can be divided into.
        groups = next(g for g in range(8, 0, -1) if channels % g == 0)
        return layers.GroupNormalization(groups, name=name)
    if norm == "layer":
        return layers.LayerNormalization(name=name)
    return layers.Activation("linear", name=name)


# The small networks: an image -> the features that the last layer sees.


def conv(x: tf.Tensor, number: int, filters: int, kernel: int, padding: str, norm: str):
    """Convolution, norm, ReLU: conv1 and norm1, and so on."""
    x = layers.Conv2D(filters, kernel, padding=padding, name=f"conv{number}")(x)
    return layers.ReLU()(norm_layer(norm, filters, f"norm{number}")(x))


def scaled(units: int, width: float) -> int:
    """`units` times `width`, rounded, at least one."""
    return max(1, round(units * width))


def cnn(image: tf.Tensor, width: float, norm: str, dropout: bool) -> tf.Tensor:
    """Two convolutions."""
    del dropout
    x = layers.MaxPooling2D()(conv(image, 1, scaled(32, width), 3, "valid", norm))
    return layers.MaxPooling2D()(conv(x, 2, scaled(64, width), 3, "valid", norm))


def cnn_small(image: tf.Tensor, width: float, norm: str, dropout: bool) -> tf.Tensor:
    """One convolution."""
    del dropout
    return layers.MaxPooling2D()(conv(image, 1, scaled(16, width), 3, "valid", norm))


def cnn_mcmahan(image: tf.Tensor, width: float, norm: str, dropout: bool) -> tf.Tensor:
    """The CNN of McMahan et al., 2017."""
    del dropout
    x = layers.MaxPooling2D()(conv(image, 1, scaled(32, width), 5, "same", norm))
    x = layers.MaxPooling2D()(conv(x, 2, scaled(64, width), 5, "same", norm))
    return layers.Dense(scaled(512, width), "relu", name="dense1")(layers.Flatten()(x))


def cnn_dropout(image: tf.Tensor, width: float, norm: str, dropout: bool) -> tf.Tensor:
    """The EMNIST CNN of Reddi et al., 2021."""
    x = conv(image, 1, scaled(32, width), 3, "valid", norm)
    x = layers.MaxPooling2D()(conv(x, 2, scaled(64, width), 3, "valid", norm))
    x = layers.Flatten()(layers.Dropout(0.25 if dropout else 0.0)(x))
    x = layers.Dense(scaled(128, width), "relu", name="dense1")(x)
    return layers.Dropout(0.5 if dropout else 0.0)(x)


def mlp(image: tf.Tensor, width: float, norm: str, dropout: bool) -> tf.Tensor:
    """The 2NN of McMahan et al., 2017."""
    del dropout
    x, hidden = layers.Flatten()(image), scaled(200, width)
    for number in (1, 2):
        x = layers.Dense(hidden, name=f"dense{number}")(x)
        x = layers.ReLU()(norm_layer(norm, hidden, f"norm{number}")(x))
    return x


def logistic(image: tf.Tensor, width: float, norm: str, dropout: bool) -> tf.Tensor:
    """Nothing before the last layer."""
    del dropout
    if width != 1 or norm != "none":
        raise ValueError(
            f"logistic: got width {width} and norm {norm}, expected 1.0 and none: it has no hidden "
            "layer; leave them out"
        )
    return image


SMALL: dict[str, Callable[[tf.Tensor, float, str, bool], tf.Tensor]] = {
    "cnn": cnn,
    "cnn-small": cnn_small,
    "cnn-mcmahan": cnn_mcmahan,
    "cnn-dropout": cnn_dropout,
    "mlp": mlp,
    "logistic": logistic,
}


# The MobileNets.

MOBILENETS = ("mobilenet-v1", "mobilenet-v2", "mobilenet-v3-small", "mobilenet-v3-large")


def mobilenet(
    name: str, input_shape: tuple[int, int, int], num_classes: int, width: float, dropout: bool
) -> tf.keras.Model:
    """keras.applications' own, with Keras' rates of dropout or none."""
    given = {
        "input_shape": tuple(input_shape),
        "alpha": width,
        "weights": None,
        "classes": num_classes,
        "classifier_activation": None,
    }
    if name == "mobilenet-v1":
        return applications.MobileNet(dropout=1e-3 if dropout else 0.0, **given)
    if name == "mobilenet-v2":
        return applications.MobileNetV2(**given)
    small = name == "mobilenet-v3-small"
    make = applications.MobileNetV3Small if small else applications.MobileNetV3Large
    return make(dropout_rate=0.2 if dropout else 0.0, include_preprocessing=False, **given)


def with_norm(model: tf.keras.Model, norm: str) -> tf.keras.Model:
    """A copy of `model`, with new weights, that has `norm` in place of BatchNormalization.

    For "none" every convolution has a bias, in place of the norm layer's.
    """

    def clone(layer: layers.Layer) -> layers.Layer:
        if isinstance(layer, layers.BatchNormalization):
            return norm_layer(norm, layer.gamma.shape[0], layer.name)
        config = layer.get_config()
        if norm == "none" and "use_bias" in config:
            config["use_bias"] = True
        return type(layer).from_config(config)

    return tf.keras.models.clone_model(model, clone_function=clone)
