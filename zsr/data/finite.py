"""Check that vectors are finite, and short enough for sums of squares in float32."""

from typing import Final

import numpy as np
import pyarrow as pa

from zsr.errors import ConfigError

MAX_NORM: Final = 1e15  # its square, and a sum of 10^8 such squares as in k-means and PCA, fit float32


def require_finite(matrix: np.ndarray, keys: pa.ChunkedArray | None, where: str, fix: str) -> None:
    """Raise ConfigError for vectors with values that are not finite or a norm above MAX_NORM: distances would be wrong.

    Args:
        matrix: (N, D) float16 or float32. keys: keys of the N rows, if they have any.
        fix: what to do about it, for the message.

    Raises:
        ConfigError: with the key and row of the first such vector, and their number.
    """
    whole = matrix.astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        squared = np.einsum("nd,nd->n", whole, whole)
    wrong = np.flatnonzero(~(squared <= MAX_NORM**2))
    if not len(wrong):
        return
    row = int(wrong[0])
    length = float(np.linalg.norm(matrix[row].astype(np.float64)))
    found = f"is {length:.3g} long" if np.isfinite(length) else "holds a value that is not finite"
    more = f" ({len(wrong)} of {len(matrix)} vectors are like that)" if len(wrong) > 1 else ""
    name = f"row {row}" if keys is None else f"{keys[row].as_py()!r} (row {row})"
    raise ConfigError(
        f"{where}: the vector of {name} {found}{more}; expected finite values and a length of "
        f"at most {MAX_NORM:g}. {fix}"
    )
