"""Multiplying codes: op × format × device → function. The plain reference is always there.

reference.py   dequantize and multiply, in plain torch, by tiles
dispatch.py    which function runs, and why
"""

from __future__ import annotations

from fettle.kernels.dispatch import explain, find

__all__ = ["explain", "find"]
