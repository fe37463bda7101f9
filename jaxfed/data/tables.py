"""What each client holds, as numbers and as text."""

import numpy as np

from jaxfed.data.partition import Partition


def label_table(parts: Partition, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many examples of each class each client has, int64 [K, num_classes].

    >>> from jaxfed.data.partition import natural
    >>> label_table(natural(np.array([0, 0, 1])), np.array([2, 2, 0]), 3)
    array([[0, 0, 2],
           [1, 0, 0]])
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":  # targets that are no classes
        return np.zeros((parts.num_clients, 0), np.int64)
    client = np.repeat(np.arange(parts.num_clients), parts.sizes)
    cells = client * num_classes + labels[parts.order]
    counts = np.bincount(cells, minlength=parts.num_clients * num_classes)
    return counts.reshape(parts.num_clients, num_classes)


def format_label_table(table: np.ndarray, max_rows: int = 10, max_columns: int = 20) -> str:
    """A label table as text: the first clients and classes, then the totals over all.

    >>> print(format_label_table(np.array([[3, 0], [1, 2]])))
    client  total  0  1
         0      3  3  0
         1      3  1  2
       all      6  4  2
    """
    columns = min(table.shape[1], max_columns)
    shown = [(str(k), row) for k, row in enumerate(table[:max_rows])]
    cells = [["client", "total", *map(str, range(columns))]]
    cells += [
        [name, str(row.sum()), *map(str, row[:columns])]
        for name, row in (*shown, ("all", table.sum(axis=0)))
    ]
    if len(table) > max_rows:
        cells.insert(-1, ["...", *[""] * (columns + 1)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    if table.shape[1] > columns:
        lines.append(f"({table.shape[1] - columns} more classes)")
    return "\n".join(lines)
