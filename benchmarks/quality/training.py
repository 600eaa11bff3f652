"""What training wins: codes at 2 bits and ternary, smaller students, adapters; one JSON line a figure.

python benchmarks/quality/training.py ../shared/assets/models/stories260K --parts codes,student,narrowed --steps 300 \
    --text …/tinystories/train_a.txt --judge …/tinystories/valid.txt
python benchmarks/quality/python_text.py python.txt
python benchmarks/quality/training.py demo --parts student --steps 300 --text python.txt
python benchmarks/quality/training.py demo --parts scratch --steps 200 --batch 4 --rate 0.003 --ternary tensor \
    --text python.txt
python benchmarks/quality/training.py demo --parts adapters --steps 60 --batch 4 \
    --domain …/tinystories/train_a.txt --domain-judge …/tinystories/valid.txt

Parts: codes, ternary, scratch (`training_codes.py`), student, narrowed (`training_students.py`), adapters
(`training_adapters.py`, which needs --domain). Figures are of written, reloaded files on the judging text, which no
step sees. With --work FOLDER a killed run goes on where it was, and what is made is kept. Without arguments: few steps
on the embedded model, which show that it runs. Memory: `training_memory.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from training_adapters import KINDS, adapters
from training_bench import Bench
from training_codes import codes, scratch, ternary
from training_students import SEVERAL, SIGNALS, narrowed, student

PARTS = {
    "codes": codes, "ternary": ternary, "scratch": scratch, "student": student, "narrowed": narrowed,
    "adapters": adapters,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Every flag; a part reads those that it needs."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model", nargs="?", default="demo")
    found.add_argument("--parts", default="student", help=", ".join(PARTS))
    found.add_argument("--text", help="to learn from; none for the embedded calibration text")
    found.add_argument("--judge", help="to measure on; none for the embedded held-out text")
    found.add_argument("--domain", help="the new domain's text to learn from")
    found.add_argument("--domain-tokens", type=int, help="learn from so many tokens at its beginning; none for all")
    found.add_argument("--domain-dev", help="to choose step sizes and moments by; none for the end of --domain")
    found.add_argument("--domain-judge")
    found.add_argument("--work", type=Path)
    found.add_argument("--steps", type=int, default=4)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--length", type=int, default=128)
    found.add_argument("--judge-tokens", type=int, default=16384)
    found.add_argument("--codes", default="learned_rounding", help="methods, or folders of codes; with commas")
    found.add_argument("--rate", type=float, default=1e-3, help="of qat")
    found.add_argument("--rate-in", default="weights", choices=("weights", "levels"), help="what qat's rate counts")
    found.add_argument("--scale-rate", type=float, default=1.0, help="of qat's scales, times its rate")
    found.add_argument("--ternary", default="group", choices=("group", "channel", "tensor"))
    found.add_argument("--layers", type=int, default=3, help="a student's blocks")
    found.add_argument("--student-map", default="uniform", help="which blocks a student keeps: uniform, influence, …")
    found.add_argument("--student-rate", type=float, default=1e-3)
    found.add_argument(
        "--signals", default="hard labels+soft labels", help=f"{'; '.join((*SIGNALS, *SEVERAL))}; with +"
    )
    found.add_argument("--shapes", default="narrow", help="narrow, resize; with commas")
    found.add_argument(
        "--full-rates", default="0.0005,0.001", help="of full fine-tuning; the least held-back loss counts"
    )
    found.add_argument("--kinds", help=f"{'; '.join(KINDS)}; with +; none for all")
    found.add_argument("--adapter-rates", help="of every kind, with commas; none for each kind's own")
    return found


def main() -> None:
    """Runs the parts that are asked for."""
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts.split(","):
            PARTS[part](Bench(arguments, folder))


if __name__ == "__main__":
    main()
