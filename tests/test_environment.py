"""Facts about the machine, on machines made up for the purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from gracile import environment


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    environment.instructions.cache_clear()
    yield
    environment.instructions.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected", "dot_product"),
    [
        ("sse2 avx2 fma", "AVX2", False),
        ("avx2 avx_vnni", "AVX2 + VNNI", True),
        ("avx2 avx512f", "AVX-512", False),
        ("avx2 avx512f avx512_vnni", "AVX-512 VNNI", True),
        ("avx2 avx512f avx512_vnni avx512_bf16", "AVX-512 VNNI + bf16", True),
        ("avx2 avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16", "AVX-512 + AMX int8 + AMX bf16", True),
        ("fp asimd asimddp bf16", "NEON + dot product + bf16", True),
    ],
)
def test_instruction_sets_are_read_from_the_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: str, dot_product: bool
) -> None:
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.setattr(environment, "_cpuinfo", lambda: ["model name : Some CPU", f"flags\t: {flags}"])
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64" if "asimd" in flags else "x86_64")
    assert environment.instruction_set() == expected
    assert environment.has_int8_dot_product() is dot_product
    assert environment.vector_floats() == (16 if "avx512f" in flags else 8 if "avx2" in flags else 4)
    assert environment.cpu_model() == "Some CPU"
    warned = any(finding.name == "int8" and finding.state == "warning" for finding in environment.doctor())
    assert warned is not dot_product


def test_where_the_system_does_not_tell_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "platform", "win32")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert environment.instruction_set() == "AVX-512"


def test_the_description_is_plain_data_with_versions() -> None:
    found = json.loads(json.dumps(environment.describe_environment()))
    assert found["torch"] == torch.__version__
    assert found["packages"].keys() == environment.OPTIONAL.keys()
    assert found["cores"] >= 1
    assert found["instruction_set"]


def test_the_doctor_says_what_is_absent_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.package_version
    monkeypatch.setattr(environment, "package_version", lambda name: None if name == "openvino" else real(name))
    found = {finding.name: finding for finding in environment.doctor()}
    assert found["openvino"].state == "absent"
    assert "gracile[openvino]" in found["openvino"].detail
    assert "OpenVINO" in found["openvino"].gives
    assert found["torch"].state == "ok"


def test_the_doctor_names_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(environment, "package_version", lambda name: "1.2.3")
    monkeypatch.setattr(environment.importlib, "import_module", broken)
    found = next(finding for finding in environment.doctor() if finding.name == "onnxruntime")
    assert found.state == "warning"
    assert found.detail == "1.2.3 is installed but does not import: operator torchvision::nms does not exist"
