"""Methods that store a weight as two thin matrices. One import line registers a method."""

from __future__ import annotations

from fettle.methods.factor.asvd import Asvd as Asvd
from fettle.methods.factor.svd import Svd as Svd
from fettle.methods.factor.svd_llm import SvdLlm as SvdLlm
