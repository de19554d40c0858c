"""What this machine and its Python offer: the facts that every measured number needs beside it, and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

#: Package -> what having it gives.
OPTIONAL = {
    "onnx": "export to ONNX (with onnxscript)",
    "onnxscript": "export to ONNX",
    "onnxruntime": "run and measure in ONNX Runtime: int8 layers, 4- and 8-bit weights",
    "openvino": "run and measure in OpenVINO: int8 layers, bf16 where the processor has it",
    "transformers": "load Hugging Face models",
    "scikit-learn": "F1, AUC and other metrics, and the demo's data",
}
#: Extra that installs each.
EXTRAS = {
    "onnx": "onnxruntime",
    "onnxscript": "onnxruntime",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "transformers": "huggingface",
    "scikit-learn": "metrics",
}
#: As Linux names them in /proc/cpuinfo, with the name people know, most telling last.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "bf16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "asimddp": "dot product",
    "i8mm": "int8 matmul",
    "bf16": "bf16",
}


@dataclass(frozen=True)
class Finding:
    """One line of `gracile doctor`. gives: what it makes possible, or would."""

    name: str
    state: Literal["ok", "absent", "warning"]
    detail: str
    gives: str = ""


def describe_environment() -> dict[str, Any]:
    """Versions, processor, memory and platform as plain data, for reports. Absent packages are None."""
    return {
        "gracile": package_version("gracile"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "packages": {name: package_version(name) for name in OPTIONAL},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "instructions": sorted(instructions()),
        "instruction_set": instruction_set(),
        "platform": platform.platform(),
    }


def instruction_set() -> str:
    """The vector instructions that decide how fast integers and bf16 run, in one line: "AVX-512 VNNI + bf16"."""
    found = instructions()
    if found & {"amx_int8", "amx_bf16"}:
        return " + ".join(["AVX-512", *(INSTRUCTIONS[name] for name in ("amx_int8", "amx_bf16") if name in found)])
    if "avx512f" in found:
        base = "AVX-512 VNNI" if "avx512_vnni" in found else "AVX-512"
        return f"{base} + bf16" if "avx512_bf16" in found else base
    if "avx2" in found:
        return "AVX2 + VNNI" if "avx_vnni" in found else "AVX2"
    if "asimd" in found:
        extras = [INSTRUCTIONS[name] for name in ("asimddp", "i8mm", "bf16") if name in found]
        return " + ".join(["NEON", *extras])
    return torch.backends.cpu.get_cpu_capability()


def vector_floats() -> int:
    """How many 32-bit floats a vector register of this processor holds."""
    found = instructions()
    return 16 if "avx512f" in found else 8 if "avx2" in found else 4


def has_int8_dot_product() -> bool:
    """Whether the processor adds 8-bit products in 32 bits; without it u8·s8 saturates 16 bits, and weights take 7."""
    found = instructions()
    return bool(found & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}) or not _is_x86()


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16; without it every product is emulated, up to ten times slower."""
    return bool(instructions() & {"avx512_bf16", "amx_bf16", "bf16"})


@lru_cache(maxsize=1)
def instructions() -> frozenset[str]:
    """The members of INSTRUCTIONS that this processor has. Where the system does not tell, what PyTorch found."""
    words: set[str] = set()
    if sys.platform == "linux":
        words = _linux_flags()
    elif sys.platform == "darwin":
        words = _darwin_flags()
    found = {name for name in INSTRUCTIONS if name in words}
    if not found:
        capability = torch.backends.cpu.get_cpu_capability()
        found = {"AVX512": {"avx2", "avx512f"}, "AVX2": {"avx2"}}.get(capability, set())
    return frozenset(found)


def doctor() -> list[Finding]:
    """What works here, what is absent and what it would give, and known bad pairs."""
    findings = [
        Finding("python", "ok", platform.python_version()),
        Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        Finding("processor", "ok", f"{cpu_model()}, {os.cpu_count()} cores, {instruction_set()}"),
    ]
    for name, gives in OPTIONAL.items():
        found = package_version(name)
        if found is None:
            findings.append(Finding(name, "absent", f"pip install 'gracile[{EXTRAS[name]}]'", gives))
        else:
            findings.append(_import_check(name, found, gives))
    return findings + _bad_pairs()


def package_version(name: str) -> str | None:
    """Installed version, None where absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    if sys.platform == "linux":
        for line in _cpuinfo():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    if sys.platform == "darwin":
        text = _sysctl("hw.memsize")
        return int(text) if text.isdigit() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _import_check(name: str, found: str, gives: str) -> Finding:
    module = {"scikit-learn": "sklearn"}.get(name, name)
    try:
        importlib.import_module(module)
    except Exception as error:  # a damaged package may raise anything
        return Finding(name, "warning", f"{found} is installed but does not import: {_line(error)}", gives)
    return Finding(name, "ok", found, gives)


def _bad_pairs() -> list[Finding]:
    """Combinations that are installed, and known to fail or to mislead."""
    findings = []
    if importlib.util.find_spec("torchvision") is not None:
        check = _import_check("torchvision", package_version("torchvision") or "?", "")
        if check.state == "warning":
            detail = f"{check.detail}. It was built for another torch: transformers fails beside it."
            findings.append(Finding("torchvision", "warning", detail, "reinstall torch and torchvision together"))
    if not has_int8_dot_product():
        detail = "No VNNI: sums of two 8-bit products saturate 16 bits in u8·s8 kernels."
        findings.append(Finding("int8", "warning", detail, "Int(bits=7) weights beside 8-bit inputs stay exact"))
    if package_version("onnxruntime") and package_version("onnxruntime-gpu"):
        detail = "onnxruntime and onnxruntime-gpu share one folder; the one installed last wins."
        findings.append(Finding("onnxruntime", "warning", detail, "uninstall one of them"))
    return findings


def _linux_flags() -> set[str]:
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _darwin_flags() -> set[str]:
    words = {w.lower().replace(".", "_") for w in _sysctl("machdep.cpu.leaf7_features").split()}
    names = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
    words |= {ours for theirs, ours in names.items() if _sysctl(f"hw.optional.arm.{theirs}") == "1"}
    return words | ({"asimd"} if platform.machine() == "arm64" else set())


def _sysctl(name: str) -> str:
    try:
        result = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
