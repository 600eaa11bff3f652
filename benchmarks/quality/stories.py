"""The table of the assets page: stories260K, round to nearest, perplexity on the first 24,000 bytes of valid.txt.

Each figure from a written, reloaded folder; windows of BOS and 511 tokens; float32 scales, as the model's own.

    python benchmarks/quality/stories.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import fettle
from fettle.pipeline.recipe import parse_recipe

ASSETS = Path(__file__).parents[2] / ".." / "shared" / "assets"
# bits, group size (None: a row), asymmetric → the figure that the page quotes
QUOTED = {
    (8, None, True): 4.215, (4, None, True): 4.633, (4, 32, True): 4.597, (3, 32, True): 7.287,
    (8, None, False): 4.209, (4, None, False): 4.955, (4, 32, False): 4.756, (3, 32, False): 12.59,
}  # fmt: skip


def main() -> None:
    model = ASSETS / "models" / "stories260K"
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.txt"
        text.write_bytes((ASSETS / "corpora" / "tinystories" / "valid.txt").read_bytes()[:24_000])
        original = fettle.evaluate(model, text=text)
        print(
            json.dumps(
                {"benchmark": "stories", "scheme": "original", "perplexity": original.perplexity, "quoted": 4.2088}
            )
        )
        for (bits, group, asymmetric), quoted in QUOTED.items():
            fields = {"method": "round_to_nearest", "bits": bits, "group_size": group, "asymmetric": asymmetric}
            out = Path(temporary) / f"{bits}-{group}-{asymmetric}"
            fettle.compress(model, out, parse_recipe({"steps": [fields]}, "stories"), evaluate=False)
            found = fettle.evaluate(out, reference=model, text=text)
            line = {"benchmark": "stories", **fields, "perplexity": round(found.perplexity or 0, 4), "quoted": quoted}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
