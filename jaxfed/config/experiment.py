"""The config tree: one frozen dataclass = the JSON file = the command-line flags = the sweep keys.

A key that is None takes its default from the row of the table that it belongs to: the algorithm,
the optimizer, the partition, the data. What a row does not use is refused if it is given.
"""

from dataclasses import dataclass, field
from typing import Literal

Norm = Literal["batch", "group", "layer", "none"]
BatchStats = Literal["frozen", "mean", "pooled", "local", "recalibrate"]
Schedule = Literal["constant", "exponential", "cosine"]
InputRange = Literal["0..1", "-1..1", "0..255"]


class ConfigError(ValueError):
    """An experiment that cannot run: what was got, what was expected, what to do."""


@dataclass(frozen=True)
class DataConfig:
    """The dataset, and how it is divided among clients."""

    dataset: str = "digits"
    """digits (embedded), a TFDS name (mnist, cifar10, ...) or path/to/file.npz."""
    partition: str = "iid"
    """How examples are divided among clients."""
    num_clients: int | None = None
    """Clients in the population (default: 10; with natural, all of the file)."""
    examples_per_client: int | None = None
    """Draw num_clients x this many training examples first (default: use all of them)."""
    shards_per_client: int | None = None
    """Label-sorted shards dealt to each client (partition shards; default: 2)."""
    alpha: float | None = None
    """Dirichlet concentration: smaller is more skewed (dirichlet, quantity; default: 0.5)."""
    classes_per_client: int | None = None
    """Classes each client holds (partition pathological; default: 2)."""
    image_size: int | None = None
    """Side of the images in pixels (default: native, or the model's minimum if that is larger)."""


@dataclass(frozen=True)
class ModelConfig:
    """The network, and what federated averaging does to its BatchNorm statistics."""

    name: str = "cnn"
    """A network of the list, or module:object of your own."""
    width: float | None = None
    """Multiplies the number of channels (MobileNet's alpha; default: 1)."""
    norm: Norm | None = None
    """Normalization layers (default: the published network's own)."""
    batch_stats: BatchStats | None = None
    """Rule for BatchNorm's moving statistics (default: recalibrate; TFF's: frozen)."""
    input_range: InputRange | None = None
    """Range that pixels 0 to 255 are mapped to (default: 0..1; with a Keras file: -1..1)."""
    frozen: str | None = None
    """Parameters that are not trained, as patterns: 'conv1/*,*/bias'."""


@dataclass(frozen=True)
class ClientConfig:
    """Local training on each client."""

    optimizer: str | None = None
    """Local optimizer; its state starts afresh every round (default: sgd)."""
    lr: float | None = None
    """Local learning rate (default: the optimizer's; sgd: 0.1)."""
    momentum: float | None = None
    """Momentum (optimizers sgd: none, momentum and nesterov: 0.9)."""
    b1: float | None = None
    """Decay of the mean gradient (default: the optimizer's; adam: 0.9)."""
    b2: float | None = None
    """Decay of the mean squared gradient (default: the optimizer's; adam: 0.999)."""
    epsilon: float | None = None
    """Added to the root of the squared gradient (default: the optimizer's; adam: 1e-7)."""
    weight_decay: float | None = None
    """Times the weights, added to the gradient (adamw: decoupled, default 0.004)."""
    clip: float | None = None
    """Largest norm of a step's gradient; longer ones are scaled down."""
    schedule: Schedule | None = None
    """Learning rate by round: constant, exponential (lr_decay), or cosine to 0 after the last."""
    lr_decay: float | None = None
    """Factor on the learning rate per round (schedule exponential; default: 0.99)."""
    epochs: int | None = None
    """Passes over the client's examples each round, McMahan's E (default: 3; fedsgd: 1)."""
    batch_size: int | None = 20
    """Examples per step (McMahan's B); none is one full batch."""
    shuffle: bool = True
    """Visit the examples in a new order every epoch."""
    mu: float | None = None
    """Weight of FedProx's proximal term (algorithm fedprox; default: 0.01)."""
    label_smoothing: float | None = None
    """Share of the target that is spread over all classes (tasks with classes)."""


@dataclass(frozen=True)
class ServerConfig:
    """How the server aggregates and uses the clients' messages."""

    aggregator: str | None = None
    """How messages become one: a row of the list, or module:object (default: mean)."""
    optimizer: str | None = None
    """sgd at 1.0 is FedAvg, momentum FedAvgM, adam and yogi TFF's (default: sgd)."""
    lr: float | None = None
    """Server learning rate (default: the optimizer's; sgd: 1.0, adam: 0.01)."""
    momentum: float | None = None
    """Momentum (optimizers sgd: none, momentum and nesterov: 0.9)."""
    b1: float | None = None
    """Decay of the mean update (default: the optimizer's; adam: 0.9)."""
    b2: float | None = None
    """Decay of the mean squared update (default: the optimizer's; adam: 0.999)."""
    epsilon: float | None = None
    """Added to the root of the squared update; Reddi's tau (default: the optimizer's)."""
    weight_decay: float | None = None
    """Times the weights, added to the update (adamw: decoupled, default 0.004)."""
    schedule: Schedule | None = None
    """Learning rate by round: constant, exponential (lr_decay), or cosine to 0 after the last."""
    lr_decay: float | None = None
    """Factor on the learning rate per round (schedule exponential; default: 0.99)."""
    warmup: int | None = None
    """Rounds over which the learning rate rises linearly to its full value."""


@dataclass(frozen=True)
class Experiment:
    """One federated experiment, completely described.

    Example:
      >>> from jaxfed import Experiment, DataConfig
      >>> Experiment(rounds=5, data=DataConfig(num_clients=20)).data.num_clients
      20
    """

    name: str = ""
    """A label for reports (default: made from dataset and model)."""
    seed: int = 0
    """Seed of partition, initial weights, cohorts, batch order and dropout."""
    rounds: int = 30
    """Communication rounds."""
    clients_per_round: int | None = None
    """Clients in a cohort (default: 10, or all if there are fewer)."""
    eval_every: int = 1
    """Evaluate on the test set every so many rounds, and after the last."""
    task: str | None = None
    """What is learned: a task of the list, or module:object (default: classification)."""
    algorithm: str = "fedavg"
    """A row of the list, or module:object of your own."""
    weighting: Literal["examples", "uniform"] | None = None
    """Clients count by their number of examples (the default), or equally."""
    init: str | None = None
    """Initial weights: weights.npz, the folder of a run, or a Keras .h5 file of weights."""
    stop_at: float | None = None
    """End a run when the test score (accuracy, or the loss of regression) has reached this."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of the computation; weights are float32 (float64 with float64)."""
    parallel: Literal["auto", "loop", "vmap"] | int = "auto"
    """Clients at once on each device (all visible devices are used): one (loop), all (vmap), N."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
