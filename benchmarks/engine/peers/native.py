"""fettle's native engine as one of those that take turns: codes of some format on random weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import native_llama
from turns import DECODED, PROMPT, TOGETHER, take_turns

from fettle.kernels.native import plane

FORMATS = {"uniform4-32": (4, 32), "uniform4-128": (4, 128), "uniform3-32": (3, 32), "uniform2-64": (2, 64),
           "ternary-256": (0, 256), "uniform8-128": (8, 128)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.bits, options.group_size = FORMATS[options.format]
    pool = plane().Pool(options.threads)
    decoder = plane().Decoder(native_llama.make_table(options, pool), 1024, native_llama.PAGE, "float16", pool, True)
    read = decoder.weight_bytes - native_llama.VOCABULARY * native_llama.HIDDEN * 2

    def run(count: int, tokens: int, start: int) -> float:
        return native_llama.seconds(decoder, native_llama.batch_of(count, tokens, start))

    run(1, 64, 0)
    work = {
        "prefill": lambda: run(1, PROMPT, 0),
        "decode": lambda: sum(run(1, 1, PROMPT + i) for i in range(DECODED)),
        "decode8": lambda: sum(run(TOGETHER, 1, PROMPT + i) for i in range(DECODED)),
        "bandwidth": lambda: (1 << 28) / plane().memory_bandwidth(pool, 1 << 28, 1),
        "peak": lambda: 1e12 / plane().integer_peak(pool, 1),
    }
    take_turns(work, {"engine": "native", "bytes": read})


if __name__ == "__main__":
    main()
