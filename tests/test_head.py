"""A large head lies in blocks of rows: the same bits, and a budget that need not hold all of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

import tiercache
from tiercache.engine import machine
from tiercache.errors import DoesNotFitError, UsageError
from tiercache.kernels.contract import Kernels
from tiercache.kernels.reference import ReferenceKernels
from tiercache.kernels.select import select
from tiercache.store import manifests
from tiercache.store.convert import convert
from tiercache.store.manifest import PlaneWeight, RowBlocks
from tiercache.store.planestore import PlaneStore

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, BLOCK_BYTES = 3000, 32 << 10
IDS = torch.randint(3, VOCABULARY, (1, 70), generator=torch.Generator().manual_seed(5))
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 56,  # no whole group
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL),
    "tied": tf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "a head with a bias": tf.PhiConfig(**SMALL | {"hidden_size": 64}),
}


@dataclass(frozen=True)
class Stores:
    """Plane stores by name; the second of each is compressed."""

    plain: dict[str, Path]
    packed: dict[str, Path]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """Each with a head of some 190 KB, which blocks of 32 KiB hold in seven."""
    folder = tmp_path_factory.mktemp("heads")
    made = Stores({}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "ROW_BLOCK_BYTES", BLOCK_BYTES)
        patch.setattr(manifests, "_BLOCK_ROWS", 16)
        for name, config in CONFIGS.items():
            torch.manual_seed(1)
            tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            for stores_of, compress in ((made.plain, "off"), (made.packed, "on")):
                stores_of[name] = folder / f"{name}-{compress}"
                convert(folder / name, stores_of[name], plain=True, compress=compress, show_progress=False)  # type: ignore[arg-type]
        yield made


def logits(store: Path, lengths: Sequence[int], precision: str = "int4", **options: object) -> list[Tensor]:
    """Of passes of so many tokens, each from the start, all rows."""
    settings = {"device": "cpu", "context": 80, "logits": 80, "dram": "32MiB", "cpu_tokens": 0} | options
    with tiercache.offload(store, precision=precision, **settings) as model, torch.no_grad():  # type: ignore[arg-type]
        return [model(IDS[:, :length]).logits.clone() for length in lengths]


def smallest(store: Path, **options: object) -> int:
    """The least bytes of HBM that are not refused."""
    with pytest.raises(DoesNotFitError) as refusal:
        logits(store, [], hbm=1 << 16, **options)
    return (1 << 16) + refusal.value.missing_bytes


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_bits_are_those_of_the_whole_head(
    stores: Stores, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (1, 8, 70)
    head = PlaneStore.open(stores.plain[name]).manifest(precision, by_rows=True).head
    assert isinstance(head, RowBlocks)
    assert len(head.blocks) == 7
    assert head.shape == (VOCABULARY, CONFIGS[name].hidden_size)
    packed = PlaneStore.open(stores.packed[name]).manifest(precision, by_rows=True).head
    assert isinstance(packed, PlaneWeight), "frames would be read twice"
    in_blocks = [
        logits(store, lengths, precision, hbm=hbm)
        for store in (stores.plain[name], stores.packed[name])
        for hbm in (None, smallest(store, precision=precision), smallest(store, precision=precision) + (64 << 10))
    ]
    monkeypatch.setattr(manifests, "ROW_BLOCK_BYTES", 1 << 30)
    whole = logits(stores.plain[name], lengths, precision)
    for each in in_blocks:
        assert all(torch.equal(one, other) for one, other in zip(each, whole, strict=True))


def test_a_call_of_the_head_that_fails_leaves_the_next_pass_right(stores: Stores) -> None:
    """Outside of a pass as well, where only the head itself gives its slot back."""
    store = stores.plain["llama"]
    options = {"device": "cpu", "context": 80, "logits": 80, "dram": "32MiB", "cpu_tokens": 0}
    hbm = smallest(store, precision="int8")
    with tiercache.offload(store, precision="int8", hbm=hbm, **options) as model, torch.no_grad():  # type: ignore[arg-type]
        before = model(IDS).logits.clone()
        with pytest.raises(UsageError):
            model.lm_head(torch.randn(4, 50))
        assert torch.equal(model(IDS).logits, before)


def test_the_smallest_budget_is_no_longer_the_heads(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores.plain["llama"]
    in_blocks = smallest(store)
    monkeypatch.setattr(manifests, "ROW_BLOCK_BYTES", 1 << 30)
    assert smallest(store) - in_blocks > 4 * BLOCK_BYTES


@pytest.mark.parametrize("spare", [0, 40 << 10, 90 << 10])
def test_drafting_with_planes_that_stay(stores: Stores, spare: int) -> None:
    """Blocks are cut by plane as well; each drafts with those of its own that stay."""
    store, own = stores.plain["llama"], {"drafter": "resident", "drafter_options": {}}
    hbm = smallest(store, precision="int8", drafter="resident") + spare
    texts = []
    for options in ({}, {"hbm": hbm, "drafter": own["drafter"]}):
        settings = {"device": "cpu", "context": 80, "logits": 80, "dram": "32MiB", "cpu_tokens": 0}
        with tiercache.offload(store, precision="int8", **settings, **options) as model:  # type: ignore[arg-type]
            texts.append(model.generate(IDS[:, :9], max_new_tokens=12, do_sample=False, pad_token_id=0))
            stats = model.tiercache.stats()
    assert torch.equal(*texts)
    assert stats.resident_bytes > 0


@pytest.mark.parametrize("kernels", ["unfused", "decode"])
def test_other_kernels(stores: Stores, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are made first are made whole: then the bits are those of the rounded model."""
    in_blocks = logits(stores.plain["llama"], (8,), kernels=kernels)
    monkeypatch.setattr(manifests, "ROW_BLOCK_BYTES", 1 << 30)
    assert torch.equal(in_blocks[0], logits(stores.plain["llama"], (8,), kernels=kernels)[0])


def test_the_reference_agrees(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = logits(stores.plain["a head with a bias"], (8,), "int8")[0]

    def slow(*arguments: object, **named: object) -> Kernels:
        found = select(*arguments, **named)  # type: ignore[arg-type]
        return ReferenceKernels(found.device)

    monkeypatch.setattr(machine, "select", slow)
    exact = logits(stores.plain["a head with a bias"], (8,), "int8")[0]
    assert (fast - exact).norm() < 1e-3 * exact.norm()
