"""`import gracile` is light: it costs little beyond torch and brings in no runtime, plotting or hub package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"onnx", "onnxscript", "onnxruntime", "openvino", "matplotlib", "jinja2"}
HEAVY |= {"transformers", "huggingface_hub", "sklearn"}

PROBE = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import gracile
end = time.perf_counter()
print(json.dumps({"torch": middle - start, "gracile": end - middle, "modules": sorted(sys.modules)}))
"""


def probe() -> dict:
    """Seconds that each import takes in a fresh process, and the modules that are loaded after both."""
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def probes() -> list[dict]:
    return [probe() for _ in range(3)]


def test_import_brings_in_no_runtime_plotting_or_hub_package(probes):
    loaded = {name.split(".")[0] for name in probes[0]["modules"]}
    assert "gracile" in loaded
    assert loaded.isdisjoint(HEAVY), f"import gracile loads {sorted(loaded & HEAVY)}"


def test_import_costs_at_most_a_second_beyond_torch(probes):
    # The fastest of three, so that a busy machine does not decide. An idle one needs a small part of this second.
    seconds = min(p["gracile"] for p in probes)
    torch_seconds = min(p["torch"] for p in probes)
    assert seconds <= 1.0, f"import gracile takes {seconds:.2f} s beyond torch ({torch_seconds:.2f} s)"
