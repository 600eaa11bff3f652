"""The native kernels under address and undefined-behaviour sanitizers, on random odd sizes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "native"


@pytest.mark.exhaustive
@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)
def test_no_kernel_reads_or_writes_beside_its_memory(tmp_path: Path) -> None:
    options = ["-DFETTLE_SANITIZE=ON", "-DFETTLE_MODULE=OFF", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    subprocess.run(["cmake", "-S", SOURCE, "-B", tmp_path, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--target", "fettle_fuzz"], check=True, capture_output=True)
    ran = subprocess.run([tmp_path / "fettle_fuzz", "400", "0"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "agree" in ran.stdout
