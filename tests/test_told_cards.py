"""What is planned for cards that are told and not measured: P40, M40, T4 and 3090."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import tiercache
from tiercache.bench.shapes import SHAPES
from tiercache.engine.compute_dtype import DTYPES, compute_dtype
from tiercache.errors import UsageError
from tiercache.model import meta_model
from tiercache.model.card_attention import SCORE_BYTES, Call, Capability, CardAttention
from tiercache.model.trace import trace_on_meta

IDS = torch.arange(3, 12)[None]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# capability: what a checkpoint in bf16, in fp16 and in fp32 is computed in
AUTO = {
    None: (BF16, FP16, FP32),
    (5, 2): (FP32, FP32, FP32),
    (6, 1): (FP32, FP32, FP32),
    (7, 0): (FP16, FP16, FP32),
    (7, 5): (FP16, FP16, FP32),
    (8, 6): (BF16, FP16, FP32),
}


def test_the_dtype_goes_by_capability() -> None:
    for capability, wanted in AUTO.items():
        assert tuple(compute_dtype("auto", stored, capability) for stored in (BF16, FP16, FP32)) == wanted, capability
        assert compute_dtype("bf16", FP32, capability) == BF16, "what is asked for is taken anywhere"


@pytest.mark.parametrize("asked", ["fp32", "fp16"])
def test_weights_are_converted_as_they_are_bound(asked: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", dtype=BF16)
    resident = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[asked])
    options = {"dram": "64MiB", "context": 32}
    with tiercache.offload(folder, **options) as model:
        assert model.dtype == BF16, "auto"
        assert model.tiercache.stats().compute_dtype == "bf16"
        plain = model.tiercache.plan.dram.reserved_bytes
    with torch.inference_mode(), tiercache.offload(folder, compute_dtype=asked, **options) as model:
        assert torch.equal(model(input_ids=IDS).logits, resident(input_ids=IDS).logits)
        assert model.tiercache.stats().compute_dtype == asked
        own = model.tiercache.plan.dram.reserved_bytes
    largest = max(each.numel() for name, each in resident.named_parameters() if "embed" not in name)
    assert own["workspace"] - plain["workspace"] == largest * DTYPES[asked].itemsize
    with (
        pytest.raises(UsageError, match="cast it first"),
        tiercache.offload(resident, compute_dtype="bf16", **options),
    ):
        pass


def attention(dtype: torch.dtype, *, tokens: int, slots: int, causal: bool, masked: bool) -> Call:
    """Eight heads of queries over two of keys; a causal call has as many slots as tokens."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    mask = torch.rand(tokens, slots, generator=generator)[None, None] < 0.8 if masked else None
    kept = random(1, 2, slots, 16), random(1, 2, slots, 16)
    return Call(random(1, 8, tokens, 16), *kept, mask, is_causal=causal, enable_gqa=True)


def test_long_prefills_go_by_slices_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    run = CardAttention._run
    monkeypatch.setattr(CardAttention, "_run", lambda self, call: (shapes.append(call.query.shape), run(self, call))[1])
    for dtype, capability in ((BF16, (6, 1)), (FP16, (7, 5)), (FP32, (6, 1))):
        for causal, masked, slots in ((True, False, 50), (False, True, 70), (False, False, 70)):
            call = attention(dtype, tokens=50, slots=slots, causal=causal, masked=masked)
            whole = torch.nn.functional.scaled_dot_product_attention(**vars(call))
            shapes.clear()
            found = CardAttention(capability, score_bytes=call.score_bytes // 4).attend(call)
            wanted = [50] if dtype != BF16 else [12, 12, 12, 12, 2]
            assert [shape[-2] for shape in shapes] == wanted, "the efficient kernel takes no bf16 here"
            close = 1e-6 if dtype == FP32 else 2 ** (-7 if dtype == BF16 else -10)
            torch.testing.assert_close(found, whole, rtol=close, atol=close)


def test_a_plan_counts_scores_where_no_kernel_is_fused() -> None:
    config = SHAPES["tiny"].config()
    config.max_position_embeddings = 4096

    def activations(dtype: torch.dtype, capability: Capability | None) -> int:
        model = meta_model.build(config, dtype)
        return trace_on_meta(model, (), 4096, 1, capability=capability).prefill_bytes

    heads = config.num_attention_heads
    scores = min(SCORE_BYTES, heads * 4095 * 4095 * 8)
    for capability in ((5, 2), (6, 1), (7, 5)):
        missing = activations(BF16, capability) - activations(BF16, (8, 6))
        assert 0.9 * scores < missing < 1.5 * scores, capability
        assert activations(FP16, capability) - activations(FP16, (8, 6)) < scores / 2, "repeated heads at most"
    assert activations(BF16, (8, 6)) == activations(BF16, None)
