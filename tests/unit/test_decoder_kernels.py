# SPDX-License-Identifier: Apache-2.0
"""
The fast forms of norm, rotary positions and loss against transformers' own, forward and backward, at odd sizes.

On a CUDA device; the Triton kernels also anywhere under the interpreter: `TRITON_INTERPRET=1 pytest ...`.
"""

import os

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hf_locmoe import loss_locmoe, rotary_locmoe
from hf_locmoe.norm_locmoe import LocMoeRMSNorm
from tests.tolerances import assert_close


pytest.importorskip("triton", reason="the kernels need Triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a CUDA device, or TRITON_INTERPRET=1 set from the start", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# the interpreter does not round to bfloat16, it cuts off
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch):
    """The interpreter runs on the CPU; and what is not written shows: new memory holds NaN."""
    if DEVICE == "cpu":
        monkeypatch.setattr(rotary_locmoe, "_runs_on", lambda *_: True)
        monkeypatch.setattr(loss_locmoe, "_runs_on", lambda *_: True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def outputs_and_gradients(function, leaves, directions):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, directions)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "length, heads, key_heads, width", [(5, 4, 4, 8), (7, 20, 3, 48), (1, 16, 2, 64), (3, 1, 1, 2)]
)
@pytest.mark.parametrize("cos_batch", [1, 2])
def test_rotary_positions_are_transformers_bit_for_bit(length, heads, key_heads, width, cos_batch, dtype):
    def states(number):  # as the projections give them: (B, Q, H, D) in memory
        return torch.randn(2, length, number, width, device=DEVICE, dtype=dtype).transpose(1, 2)

    angles = torch.randn(cos_batch, length, width, device=DEVICE)
    positions = angles.cos().to(dtype), angles.sin().to(dtype)
    leaves, directions = [states(heads), states(key_heads)], [states(heads), states(key_heads).contiguous()]
    with torch.no_grad():
        assert rotary_locmoe._runs_on(*leaves, *positions)
    actual = outputs_and_gradients(lambda q, k: rotary_locmoe.apply_rotary(q, k, *positions), leaves, directions)
    expected = outputs_and_gradients(lambda q, k: apply_rotary_pos_emb(q, k, *positions), leaves, directions)
    for fast, slow in zip(actual, expected):
        torch.testing.assert_close(fast, slow, rtol=0, atol=0)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(13)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 37, 5000])
def test_loss_is_the_cross_entropy_in_float32(vocab_size, dtype, num_items):
    logits = 3 * torch.randn(2, 9, vocab_size, device=DEVICE).to(dtype)
    logits[0, 1] += 300  # large values, masked ones
    logits[0, 2, 1:] = -float("inf")
    labels = torch.randint(0, vocab_size, (2, 9), device=DEVICE)
    labels[0, 3], labels[1, 4:7] = 0, -100
    direction = [torch.tensor(1.7, device=DEVICE)]
    assert loss_locmoe._runs_on(logits)
    actual, expected = (
        outputs_and_gradients(lambda x, f=f: f(x, labels, vocab_size, num_items), [logits], direction)
        for f in (loss_locmoe.causal_lm_loss, ForCausalLMLoss)
    )
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], dtype)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    assert_close(loss_locmoe.causal_lm_loss(logits, None, vocab_size, num_items, shift_labels=shifted), actual[0])


def test_no_target_and_what_is_no_number_show_as_in_torch():
    logits, labels = torch.randn(1, 4, 11, device=DEVICE), torch.full((1, 4), -100, device=DEVICE)
    assert loss_locmoe.causal_lm_loss(logits, labels, 11).isnan()
    labels = torch.zeros_like(labels)
    assert torch.isfinite(loss_locmoe.causal_lm_loss(logits, labels, 11))
    logits[0, 1, 5] = float("nan")
    assert loss_locmoe.causal_lm_loss(logits, labels, 11).isnan()


@pytest.mark.skipif(DEVICE == "cpu", reason="torch's fused norm is for CUDA")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtype, weight_dtype", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 7, 4, 10), (300, 2048), (2, 0, 16)])
def test_norm_is_llamas(shape, dtype, weight_dtype, autocast):
    norm = LocMoeRMSNorm(shape[-1], eps=1e-5).to(DEVICE, weight_dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, device=DEVICE, dtype=dtype)

    direction = torch.randn(shape, device=DEVICE)
    results = []
    for forward in (norm.forward, lambda y: LlamaRMSNorm.forward(norm, y)):
        y = x.detach().clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            output = forward(y)
        grads = torch.autograd.grad(output, [y, norm.weight], direction.to(output.dtype))
        results.append([output.detach(), *grads])
    for fast, slow in zip(*results):
        assert fast.dtype == slow.dtype
        scale = slow.abs().max().clamp_min(1e-6) if slow.numel() else 1.0
        assert_close(fast / scale, slow / scale, dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch's fused norm is for CUDA")
def test_norm_is_two_kernels_at_most(monkeypatch):
    # filling a new tensor with NaN is a kernel, too
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    norm = LocMoeRMSNorm(64).to(DEVICE, torch.bfloat16)
    x = torch.randn(4, 64, device=DEVICE, dtype=torch.bfloat16)
    norm(x)
    with torch.no_grad(), torch.profiler.profile() as profile:
        norm(x)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 2


@pytest.mark.skipif(DEVICE == "cpu", reason="torch's fused norm is for CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_norm_rounds_once(compiled):
    norm = LocMoeRMSNorm(96, eps=1e-5).to(DEVICE, torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(40, 96, device=DEVICE, dtype=torch.bfloat16)
    forward = norm
    if compiled:  # with the roundings of eager mode, which the compiler leaves out unless asked
        forward = torch.compile(norm, fullgraph=True, options={"emulate_precision_casts": True})
    with torch.no_grad():
        actual, exact = forward(x).double(), LlamaRMSNorm.forward(norm.double(), x.double())
        of_llama = LlamaRMSNorm.forward(norm.bfloat16(), x).double()
    half_a_step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)  # of bfloat16, 8 binary digits
    assert ((actual - exact).abs() <= 1.01 * half_a_step).all()
    assert not ((of_llama - exact).abs() <= 1.01 * half_a_step).all()
