"""Which instructions run, why, and that those of other processors are right: emulated where this one lacks them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fettle.errors import UsageError
from fettle.kernels import native

SOURCE = Path(__file__).resolve().parents[2] / "native"
SIMDE = Path("/usr/include/simde/x86/avx512.h")
ARM = "aarch64-linux-gnu-g++"

built = pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")
compiles = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


@built
def test_the_fastest_instructions_run_unless_others_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.FORCE, raising=False)
    found = native.plane().features()
    assert found["instructions"] == found["available"][0]
    assert found["available"][-1] == "portable"
    assert all(found[name] for name in found["available"][:1] if name != "portable")
    for name in found["available"]:
        monkeypatch.setenv(native.FORCE, name)
        assert native.plane().features()["instructions"] == name
        assert f"native, {name} kernels" in (said := native.explain_runtime())
        assert ("asks for them" in said) == (name != found["available"][0])


@built
def test_instructions_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.FORCE, "sse9")
    with pytest.raises(UsageError, match=r"FETTLE_INSTRUCTIONS is 'sse9'; this processor .*portable"):
        native.explain_runtime()


@pytest.mark.parametrize("name", ["avx512_vnni", "avx2", "neon_dot", "portable"])
def test_every_set_has_its_reason(name: str) -> None:
    told = {"instructions": name, "available": [name, "portable"]}
    assert native.reason(told).startswith("this processor")
    assert f"; {name} kernels would run" in native.reason({**told, "instructions": "other"})


@built
def test_the_arithmetic_limit_is_measured_with_the_instructions_at_hand() -> None:
    plane = native.plane()
    pool = plane.Pool(1)
    for name in plane.features()["available"]:
        assert plane.integer_peak(pool, 1, name) > 1e6


def build(folder: Path, target: str, *options: str) -> Path:
    configure = ["cmake", "-S", SOURCE, "-B", folder, "-DFETTLE_MODULE=OFF", "-DFETTLE_PROVE=ON", *options]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder, "--target", target], check=True, capture_output=True)
    return folder / target


def run(*command: str | Path, instructions: str = "") -> str:
    environment = {**os.environ, native.FORCE: instructions}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.exhaustive
@compiles
@pytest.mark.skipif(not SIMDE.exists(), reason="emulating AVX-512 needs SIMDe's headers (Debian: libsimde-dev)")
def test_avx512_kernels_give_the_definition_to_the_bit(tmp_path: Path) -> None:
    options = ("-DFETTLE_EMULATE=ON", "-DFETTLE_SANITIZE=ON")
    said = run(build(tmp_path, "fettle_prove", *options), "150", "0")
    assert "avx512_vnni: 150 rounds" in said
    assert "portable: 150 rounds" in said
    fuzz = build(tmp_path, "fettle_fuzz", *options)
    assert "avx512_vnni and portable kernels agree" in run(fuzz, "100", "0", instructions="avx512_vnni")


@pytest.mark.exhaustive
@compiles
@pytest.mark.skipif(
    shutil.which(ARM) is None or shutil.which("qemu-aarch64") is None,
    reason="needs a compiler and an emulator for Arm (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_kernels_give_the_definition_to_the_bit(tmp_path: Path) -> None:
    cross = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM}")
    program = build(tmp_path, "fettle_prove", *cross, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    assert "neon_dot: 150 rounds" in run("qemu-aarch64", "-cpu", "max", program, "150", "0")
    assert "neon_dot" not in run("qemu-aarch64", "-cpu", "cortex-a53", program, "5", "0")  # it has no dot products
