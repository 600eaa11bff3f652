"""The types of fettle's data plane in C++ (native/bindings/); arrays are C-contiguous numpy arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def features() -> dict[str, Any]: ...
def has_units(levels: list[float], bits: int) -> bool: ...

class Pool:
    def __init__(self, threads: int, pinned: bool = False) -> None: ...
    @property
    def threads(self) -> int: ...

class Matrix:
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def block(self) -> int: ...
    def multiply(
        self, inputs: NDArray[np.float32], pool: Pool, integer: bool, kernels: str = ""
    ) -> NDArray[np.float32]: ...
    def row(self, index: int, kernels: str = "") -> NDArray[np.float32]: ...

def coded(
    streams: NDArray[np.uint8],
    columns: int,
    stream_bits: int,
    bits: int,
    group: int,
    scales: NDArray[Any],
    scale_type: str,
    levels: list[float],
    zero_codes: NDArray[np.uint8] | None,
    gain: float,
    pool: Pool,
) -> Matrix: ...
def sparse_codes(
    codes: NDArray[np.uint8],
    kept: NDArray[np.uint8],
    bits: int,
    group: int,
    scales: NDArray[Any],
    scale_type: str,
    levels: list[float],
    gain: float,
    pool: Pool,
) -> Matrix: ...
def set_rounding(matrix: Matrix, kind: str, bits: int, scale: float, point: float) -> None: ...
def sparse_numbers(values: NDArray[Any], type: str, pool: Pool) -> Matrix: ...
def dense(values: NDArray[Any], type: str, pool: Pool) -> Matrix: ...

class Decoder:
    def __init__(
        self,
        table: dict[str, Any],
        pages: int,
        page_size: int,
        cache_type: str,
        pool: Pool,
        integer: bool,
        kernels: str = "",
    ) -> None: ...
    def step(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        query_starts: NDArray[np.int32],
        known_lengths: NDArray[np.int32],
        page_table: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
        copies: NDArray[np.int32],
    ) -> NDArray[np.float32]: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...

def memory_bandwidth(pool: Pool, bytes: int, repeats: int, kernels: str = "") -> float: ...
def integer_peak(pool: Pool, repeats: int, kernels: str = "") -> float: ...
