"""A row of a table of algorithms or aggregators: how it is built, and what it uses."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Spec(NamedTuple):
    """One row of `ALGORITHMS` or `AGGREGATORS`.

    Validation, defaults, `--list`, the header of a run, its report and the tables of the
    documentation follow from it.

    Args:
      build: `(problem, experiment, federation) -> FedAlgorithm` for an algorithm, `experiment ->
        Aggregator` for an aggregator. Numbers of `experiment.client` and `experiment.server` may be
        tracers.
      uses: keys of the experiment that it reads, such as `client.lr`. A key that it does not use is
        refused if it is given.
      defaults: values of keys that are not given.
      summary: one line.
      source: paper, or framework.
      pooled: whether the cohort's examples make one client, which has no other beside it.
    """

    build: Callable[..., Any]
    uses: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}
    summary: str = ""
    source: str = ""
    pooled: bool = False
