"""Which scheme each matrix is stored with: `quantization_config` ⇄ schemes, and reading a matrix back.

Two spellings in `config.json`:

- compressed-tensors (https://github.com/vllm-project/compressed-tensors), where the standard can say it
  (`standard.py`): uniform grids and the small floats of FP8, MXFP8, MXFP4 and NVFP4, a scale per tensor, per channel or
  per group of a size that divides the row, on `nn.Linear` modules. Such a folder loads with plain `transformers` and
  vLLM. Folders of other programs in this format are understood too (exact names, `re:` patterns, classes).
- `"quant_method": "fettle"` for everything else (`config.py`): a group size that does not divide the row, GPT-2's
  Conv1D, experts (transformers 5 holds them as 3-D parameters), routers, embeddings, other grids, remainders kept
  beside the codes. The tensors are stored the same way, and the schemes stand in the config.

transformers 5 *skips* a quantization method that it does not know and answers with random weights. The keys in
`config.REFUSAL` prevent that: they lead it to parse our sentence as a dtype, which fails, with the sentence in the
error. A test proves it.
"""

from __future__ import annotations

from fettle.models.storage.config import (
    StoredScheme,
    dense_config,
    is_stored_as_codes,
    quantization_config,
    stored_schemes,
)
from fettle.models.storage.matrices import read_input_quantizer, read_packed, read_quantized, read_weight
from fettle.models.storage.modules import input_obstacle, module_name
from fettle.models.storage.standard import standard_obstacle

__all__ = [
    "StoredScheme",
    "dense_config",
    "input_obstacle",
    "is_stored_as_codes",
    "module_name",
    "quantization_config",
    "read_input_quantizer",
    "read_packed",
    "read_quantized",
    "read_weight",
    "standard_obstacle",
    "stored_schemes",
]
