from typing import Any

import numpy.typing as npt

def gather_rows(crops: npt.NDArray[Any], rows: npt.NDArray[Any], out: npt.NDArray[Any]) -> None: ...
