"""Image data on the host: read once, fitted to the model, divided among clients.

Everything here is numpy; nothing imports JAX.
"""

from jaxfed.data.dataset import DataError, Dataset, Progress, check, load
from jaxfed.data.partition import (
    PARTITIONS,
    Partition,
    PartitionSpec,
    partition,
)
from jaxfed.data.resize import fit
from jaxfed.data.tables import format_label_table, label_table

__all__ = [
    "PARTITIONS",
    "DataError",
    "Dataset",
    "Partition",
    "PartitionSpec",
    "Progress",
    "check",
    "fit",
    "format_label_table",
    "label_table",
    "load",
    "partition",
]
