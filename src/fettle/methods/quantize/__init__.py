"""Methods that choose codes. One import line registers a method."""

from __future__ import annotations

from fettle.methods.quantize.awq import Awq as Awq
from fettle.methods.quantize.gptq import Gptq as Gptq
from fettle.methods.quantize.hqq import Hqq as Hqq
from fettle.methods.quantize.learned_rounding import LearnedRounding as LearnedRounding
from fettle.methods.quantize.low_rank import LowRankCorrection as LowRankCorrection
from fettle.methods.quantize.outliers import SparseOutliers as SparseOutliers
from fettle.methods.quantize.residual_codebooks import ResidualCodebooks as ResidualCodebooks
from fettle.methods.quantize.rotation import Rotation as Rotation
from fettle.methods.quantize.round_to_nearest import RoundToNearest as RoundToNearest
from fettle.methods.quantize.smoothquant import SmoothQuant as SmoothQuant
