"""The layout of the 4-bit kernel is found out by trying, on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.parametrize(("capability", "block"), [("avx512", 64), ("avx2", 32), ("default", None)])
def test_an_unknown_layout_is_noticed(capability, block):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("needs a CPU that has all of them")
    code = "from llama.int4 import kernel_block; print(kernel_block())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(block)
