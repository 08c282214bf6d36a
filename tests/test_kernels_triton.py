"""The Triton kernel gives the bits of plain torch: compiled where there is a GPU, interpreted elsewhere."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from test_kernels import assert_same, bits, copy_parts, draw, make_parts, some_quanta
from torch import Tensor

from teacherstudent.distributed import kernels, kernels_torch
from teacherstudent.distributed.codec import Quanta
from teacherstudent.distributed.kernels import Part

pytestmark = pytest.mark.system
SIZES = [0, 1, 63, 4096, 4097, 9000]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which has no other use here


@pytest.fixture(scope="module")
def triton_kernels() -> ModuleType:
    pytest.importorskip(
        "triton", reason="needs triton, a wheel of 1 GB that is installed by hand: pip install triton"
    )
    return importlib.import_module("teacherstudent.distributed.kernels_triton")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from teacherstudent.distributed.kernels_triton import _fire
names = _fire.arg_names
tensors = {"residual": "*fp32", "held": "*fp32", "gradient": "*%s"}
integers = dict.fromkeys(["room", "first", "size"], "i32")
numbers = dict.fromkeys(["scale", "threshold", "most"], "fp32")
constants = {"ADDS": %r, "AGAIN": %r, "SIZE": 4096}
types = {**dict.fromkeys(names, "*i32"), **tensors, **integers, **numbers, **dict.fromkeys(constants, "constexpr")}
source = ASTSource(_fire, types, {(names.index(name),): value for name, value in constants.items()})
options = {"num_warps": 8, "enable_fp_fusion": False}
print(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"])
"""


@pytest.mark.parametrize(
    "what", [("fp32", True, False), ("bf16", True, False), ("fp32", False, True)], ids=str
)
def test_the_kernel_compiles_without_fused_additions_and_approximate_divisions(
    triton_kernels: ModuleType, what: tuple[str, bool, bool], tmp_path: Path
) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables.update(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-c", COMPILE % what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "div.rn.f32" in done.stdout
    assert not re.search(r"\bfma|\bmad\.f|div\.(full|approx)|(add|sub|mul|div)\.\S*ftz", done.stdout)


def case(special: bool, dtype: torch.dtype) -> tuple[Tensor, list[Part]]:
    """A residual and parts with gradients of all kinds."""
    residual, *drawn = draw(sum(SIZES), *SIZES)
    if special:
        values = torch.tensor([0.0, -0.0, 2.0**-149, 2.25, -2.25, 4.5, 2.0**-126, 3e37, -3e37, 2.0**19])
        residual = values.repeat(sum(SIZES) // 10 + 1)[: sum(SIZES)].clone()
        drawn = [values[torch.arange(size) * 7 % 10] for size in SIZES]
    gradients: list[Tensor | None] = [gradient.to(DEVICE, dtype) for gradient in drawn]
    gradients[5] = gradients[5].view(90, 100).T  # type: ignore[union-attr]
    return residual.to(DEVICE), make_parts(gradients, SIZES, [1.0, 0.3, 0.0, 1.7, 1.0, 2.3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("special", [False, True], ids=["drawn", "special"])
@pytest.mark.parametrize("most", [1, 1000])
@pytest.mark.parametrize("share", [0.37, 3.0, 0.0])
@pytest.mark.parametrize("commit", [True, False])
def test_triton_fires_what_plain_torch_fires(
    triton_kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    special: bool,
    most: int,
    share: float,
    commit: bool,
) -> None:
    if not commit and dtype != torch.float32:
        pytest.skip("gradients that are to hold residuals have their dtype")
    results = []
    for variant in (triton_kernels, kernels_torch):
        monkeypatch.setattr(kernels, "_variant", lambda residual, variant=variant: variant)
        residual, parts = case(special, dtype)
        quanta = kernels.fire(residual, parts, 2.25, share=share, most=most, commit=commit)
        results.append((quanta, [residual, *(part.gradient.float() for part in parts)]))  # type: ignore[union-attr]
    (quanta, tensors), (expected, others) = results
    assert_same(quanta, expected)
    assert all(torch.equal(bits(left), bits(right)) for left, right in zip(tensors, others, strict=True))


def test_blocks_that_find_the_buffer_full_are_gone_through_again(
    triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "LEAST_BUFFER", 5000)
    for commit in (True, False):
        residual, parts = case(False, torch.float32)
        other, copies = residual.clone(), copy_parts(parts)
        active = [part for part in parts if part.rate and part.start < part.stop]
        copies = [part for part in copies if part.rate and part.start < part.stop]
        found = Quanta(*triton_kernels.fire(residual, active, 0.25, 1.0, 1, commit))
        expected = Quanta(*kernels_torch.fire(other, copies, 0.25, 1.0, 1, commit))
        assert len(found) > 10_000  # twice what the buffer holds, many of them due again
        assert_same(found, expected)
        assert torch.equal(bits(residual), bits(other))
        for part, copied in zip(active, copies):
            assert torch.equal(part.gradient, copied.gradient)  # type: ignore[arg-type]


def test_a_product_is_rounded_before_it_is_added(triton_kernels: ModuleType) -> None:
    residual = torch.full((200,), -(1 + 2.0**-11), device=DEVICE)
    gradient = torch.full((200,), 1 + 2.0**-12, device=DEVICE)
    triton_kernels.fire(residual, [Part(0, 200, gradient, 1 + 2.0**-12)], 1.0, 1.0, 1, True)
    assert not residual.any()


def test_applying_on_the_device_writes_what_the_host_writes(triton_kernels: ModuleType) -> None:
    received = [some_quanta(9000, 500, seed) for seed in range(3)]
    gradients = [torch.ones(9000, device=DEVICE), torch.ones(9000)]
    parts = [Part(0, 9000, gradient, 0.3) for gradient in gradients]
    triton_kernels.apply(parts[:1], received, 0.8125, 3, torch.float32)
    kernels.apply(parts[1:], received, 0.8125, 3, torch.float32)
    assert torch.equal(bits(gradients[0].cpu()), bits(gradients[1]))
