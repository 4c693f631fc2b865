"""The promise: an offloaded model gives the very bits of the resident one, whatever the budgets."""

import ctypes
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import CONFIGS, build, save

import tiercache
from tiercache.compat import cache_kwargs, cache_out
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.kernels.select import select
from tiercache.model import meta_model
from tiercache.model.head import folding
from tiercache.quant import planes
from tiercache.quant.hadamard import restored, stored
from tiercache.stats.run import peak_rss_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# From everything in one tier to a few dozen KiB beside what a pass itself takes.
BUDGETS = (
    {"dram": "64MiB"},
    {"hbm": "64MiB", "dram": "8MiB"},
    {"spare": 95_000},
    {"hbm_spare": 80_000, "spare": 70_000},
    {"hbm_spare": 200_000, "spare": 400_000},
)
CONTEXT = 64
IDS = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], Path]:
    made = {}
    for name, dtype in product(CONFIGS, DTYPES):
        folder = tmp_path_factory.mktemp("checkpoints") / f"{name} {dtype}"
        save(name, folder, dtype, shard="100KB")
        made[name, dtype] = folder
    return made


def resident(folder: Path) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


def steps(model: tf.PreTrainedModel, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Logits of a prefill and of every single-token step after it."""
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        logits = [output.logits]
        for place in range(4):
            token = ids[:, place : place + 1]
            output = model(input_ids=token, **cache_kwargs(model, cache_out(output)), use_cache=True)
            logits.append(output.logits)
    return logits


def reserve(folder: Path, **options: object) -> int:
    """What a pass takes beside the weights, as the plan says."""
    with tiercache.offload(folder, dram="64MiB", context=CONTEXT, **options) as model:
        return sum(model.tiercache.plan.dram.reserved_bytes.values())


def budgets(kind: dict[str, object], reserved: int) -> dict[str, object]:
    """Turn a share of the table above into sizes."""
    if "hbm_spare" in kind:
        return {"hbm": reserved + kind["hbm_spare"], "dram": reserved + kind["spare"]}
    return {"dram": reserved + kind["spare"]} if "spare" in kind else kind


# Each architecture at one precision in turn, Llama at all.
EACH_AND_LLAMA = sorted(
    {*zip(CONFIGS, itertools.cycle(planes.PRECISIONS), strict=False), *(("llama", each) for each in planes.PRECISIONS)}
)


def equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_source_equals_resident(name: str, dtype: torch.dtype, folders: dict) -> None:
    folder = folders[name, dtype]
    want = steps(resident(folder))
    reserved = reserve(folder)
    streamed = 0
    for kind in BUDGETS:
        with tiercache.offload(folder, context=CONTEXT, **budgets(kind, reserved)) as model:
            assert equal(steps(model), want), kind
            stats = model.tiercache.stats()
            streamed += stats.tiers["dram"].misses
            for tier in stats.tiers.values():
                assert tier.peak_bytes <= tier.capacity_bytes
    assert streamed > 20, "no budget was small enough to stream anything"


def at_rung(folder: Path, precision: str) -> tf.PreTrainedModel:
    """The resident model with every matrix rounded to `precision`, the head to int8: planes alone, no store."""
    model = resident(folder)
    found = meta_model.matrices(model)
    bundled = {block.outward.module for block in meta_model.ffns(found)}
    for matrix in found:
        module = model.get_submodule(matrix.module)
        # rows as stored: a feed-forward block's outward matrix by neuron, all others by output
        outward = matrix.module in bundled
        flip = matrix.transposed != outward
        rows = (module.weight.data.T if flip else module.weight.data).contiguous()
        factors = rows.abs().amax(dim=0).float() if outward else None
        coded = planes.encode(stored(rows, factors)).at(precision if matrix.layer is not None else "int8")
        decoded = restored(coded, factors, torch.empty_like(rows))
        module.weight = torch.nn.Parameter(decoded.T.contiguous() if flip else decoded)
    return model


@pytest.mark.parametrize(("name", "precision"), EACH_AND_LLAMA)
def test_rungs_equal_the_resident_reference(name: str, precision: str, folders: dict, tmp_path: Path) -> None:
    folder = folders[name, torch.bfloat16 if precision == "int4" else torch.float32]
    want = steps(at_rung(folder, precision))
    options = {"precision": precision, "store": tmp_path / "store", "kernels": "decode"}
    reserved = reserve(folder, **options)
    for kind in BUDGETS:
        sizes = budgets(kind, reserved)
        with tiercache.offload(folder, context=CONTEXT, **sizes, **options) as model:
            assert equal(steps(model), want), kind


@pytest.mark.parametrize(("name", "precision"), EACH_AND_LLAMA)
def test_fast_kernels_give_the_same_bits_wherever_planes_lie(
    name: str, precision: str, folders: dict, plane_store: Callable[..., Path]
) -> None:
    store = plane_store(name)
    options = {"precision": precision, "kernels": "fast"}
    reserved = reserve(store, **options)
    with tiercache.offload(store, dram="64MiB", context=CONTEXT, precision=precision, kernels="decode") as model:
        want = steps(model)
    results = []
    for kind in BUDGETS:
        with tiercache.offload(store, context=CONTEXT, **budgets(kind, reserved), **options) as model:
            results.append(steps(model))
            assert model.tiercache.stats().kernels.startswith("cpu (")
        assert equal(results[-1], results[0]), kind
    for got, exact in zip(results[0], want, strict=True):  # 16-bit fixed-point activations, through two layers
        assert not torch.equal(got, exact)
        assert (got - exact).abs().max() < 3e-3 * exact.std()


def test_without_a_compiler_it_says_so_and_decodes(
    plane_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = plane_store("llama")
    with tiercache.offload(store, precision="int4", dram="64MiB", context=CONTEXT, kernels="decode") as model:
        want = steps(model)
    select.cache_clear()
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with ExitStack() as stack:
        opened = tiercache.offload(store, precision="int4", dram="64MiB", context=CONTEXT)
        with pytest.warns(UserWarning, match=r"slow: the kernels need a C compiler; install gcc"):
            model = stack.enter_context(opened)
        assert model.tiercache.stats().kernels == "decode"
        assert equal(steps(model), want)
    with (
        pytest.raises(EnvironmentUnsupportedError, match="C compiler"),
        tiercache.offload(store, precision="int4", dram="64MiB", context=CONTEXT, kernels="fast"),
    ):
        pass


def test_a_store_alone_will_do(folders: dict, tmp_path: Path) -> None:
    folder = folders["llama", torch.float32]
    tiercache.convert(folder, tmp_path / "store")
    want = steps(at_rung(folder, "int4"))
    options = {"precision": "int4", "dram": "64MiB", "context": CONTEXT, "kernels": "decode"}
    with tiercache.offload(tmp_path / "store", **options) as model:
        assert equal(steps(model), want)


def test_a_model_with_another_file_dtype_is_cast(tmp_path: Path) -> None:
    model = build("llama", torch.float32)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (tmp_path / "config.json").write_text(config)
    want = steps(resident(tmp_path))
    assert want[0].dtype == torch.bfloat16
    with tiercache.offload(tmp_path, dram="64MiB", context=CONTEXT) as offloaded:
        assert equal(steps(offloaded), want)


@pytest.fixture
def llama(folders: dict) -> Iterator[tuple[tf.PreTrainedModel, tf.PreTrainedModel]]:
    """A resident and an offloaded model of the same checkpoint, the latter streaming."""
    folder = folders["llama", torch.float32]
    reserved = reserve(folder)
    with tiercache.offload(folder, dram=reserved + 90_000, context=CONTEXT) as model:
        yield resident(folder), model


GENERATE = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_generate_is_unchanged(options: dict, llama: tuple) -> None:
    outputs = []
    for model in llama:
        torch.manual_seed(7)
        outputs.append(model.generate(IDS[:1], max_new_tokens=8, pad_token_id=0, eos_token_id=None, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_head_makes_no_copy_of_its_weight_in_a_prefill(dtype: torch.dtype, bias: bool) -> None:
    """In a process's own peak: torch alone copies a weight of 16 bits where it gets the last tokens of a sequence."""
    head = torch.nn.Linear(256, 60_000, bias=bias).to(dtype).requires_grad_(False)
    slices = [torch.randn(batch, 32, 256).to(dtype)[:, -last:, :] for batch in (1, 2) for last in (1, 5, 32)]
    assert all(torch.equal(folding(head)(x), head(x)) for x in slices)
    x = slices[1]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew
    before = peak_rss_bytes()
    out = folding(head)(x)
    assert peak_rss_bytes() - before < out.nbytes + head.weight.nbytes // 4


def test_left_padding(llama: tuple) -> None:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :4], mask[0, :4] = 0, 0
    outputs = [
        model.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, do_sample=False) for model in llama
    ]
    assert torch.equal(*outputs)


def test_streamer_and_stopping(llama: tuple) -> None:
    class Collect(tf.generation.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    stop = tf.StoppingCriteriaList([tf.generation.MaxLengthCriteria(13)])
    seen = []
    for model in llama:
        streamer = Collect()
        model.generate(
            IDS[:1], streamer=streamer, stopping_criteria=stop, max_new_tokens=9, pad_token_id=0, eos_token_id=None
        )
        seen.append(streamer.tokens)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 14


def test_hidden_states_and_the_inner_model(llama: tuple) -> None:
    outputs = [model(input_ids=IDS, output_hidden_states=True).hidden_states for model in llama]
    assert equal(list(outputs[0]), list(outputs[1]))
    inner = [model.model(input_ids=IDS).last_hidden_state for model in llama]
    assert torch.equal(*inner)
    assert equal(steps(llama[1]), steps(llama[0])), "the pass after a partial one"


@pytest.mark.parametrize("hbm", [None, "hbm"])
def test_statistics_add_up(hbm: str | None, folders: dict) -> None:
    folder = folders["llama", torch.float32]
    reserved = reserve(folder)
    sizes = {"dram": 600_000 if hbm else reserved + 150_000, "hbm": reserved - 400_000 if hbm else None}
    with tiercache.offload(folder, context=CONTEXT, **sizes) as model:
        steps(model)
        stats, each = model.tiercache.stats(), model.tiercache.pass_bytes()
        plan = model.tiercache.plan
        assert stats.passes == 5
        assert stats.tokens == 2 * 9 + 4 * 2
        top = stats.tiers["hbm" if hbm else "dram"]
        dram = stats.tiers["dram"]
        assert top.needed_bytes == 5 * each["needed"]
        assert top.hits + top.misses == 5 * 22
        if hbm:  # what one tier brings, the tier below is asked for, once the copies ahead have been made
            deadline = time.monotonic() + 10
            while dram.needed_bytes != top.loaded_bytes and time.monotonic() < deadline:
                time.sleep(0.01)
            assert dram.needed_bytes == top.loaded_bytes
        kept = sum(tier.miss_bytes + tier.dropped_bytes for tier in stats.tiers.values())
        loaded = sum(tier.loaded_bytes for tier in stats.tiers.values())
        assert loaded >= kept
        assert each["ssd"] == sum(size for key, size in payload(model).items() if key in set(plan.streamed))
        assert stats.ssd_bytes >= 4 * each["ssd"]
        assert stats.embedding_bytes > 0
        assert stats.first_pass_s > 0
        assert stats.tokens_per_s > 0
        assert stats.to_dict()["schema"] == "tiercache.stats/1"
        assert not plan.still


@pytest.mark.parametrize("hbm", [None, "64MiB"])
def test_where_all_units_stay_nothing_moves(hbm: str | None, folders: dict) -> None:
    with tiercache.offload(folders["llama", torch.float32], context=CONTEXT, dram="64MiB", hbm=hbm) as model:
        assert model.tiercache.plan.still
        steps(model)
        before = model.tiercache.stats().tiers["hbm" if hbm else "dram"].misses
        steps(model)
        assert model.tiercache.stats().tiers["hbm" if hbm else "dram"].misses == before


def payload(model: tf.PreTrainedModel) -> dict[int, int]:
    return model.tiercache._asked.payload
