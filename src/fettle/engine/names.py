"""The engines by name: what `--engine` takes. `runners.py` opens them."""

from __future__ import annotations

AUTO = "auto"
ENGINE_NAMES = (AUTO, "torch", "native")
