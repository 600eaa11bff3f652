"""Filters of convolution networks: which depend on each other, which are missed least, and how the rest recovers."""

from __future__ import annotations

from fettle.methods.filters.prune_filters import PruneFilters as PruneFilters
