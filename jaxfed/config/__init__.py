"""Experiments as data: the schema, its JSON and flags, ranges of values, sweeps."""

from jaxfed.config.check import validate
from jaxfed.config.codec import (
    command_line,
    dotted_keys,
    expected,
    from_dict,
    from_json,
    numbers,
    override,
    replaced,
    structure,
    to_dict,
    to_json,
    value_of,
)
from jaxfed.config.experiment import (
    BatchStats,
    ClientConfig,
    ConfigError,
    DataConfig,
    Experiment,
    ModelConfig,
    ServerConfig,
)
from jaxfed.config.spec import Spec

__all__ = [
    "BatchStats", "ClientConfig", "ConfigError", "DataConfig", "Experiment", "ModelConfig",
    "ServerConfig", "Spec", "command_line", "dotted_keys", "expected", "from_dict", "from_json",
    "numbers", "override", "replaced", "structure", "to_dict", "to_json", "validate", "value_of",
]  # fmt: skip
