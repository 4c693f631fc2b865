"""Mixed mode computes what it says: the same as a plain torch model whose neurons are rounded and left out likewise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import CONFIGS
from mixed_oracle import CONTEXT, Oracle, apart, calibration, mixed, orders

import tiercache
from policies.precision import Recipe
from tiercache.compat import cache_kwargs, cache_out
from tiercache.store.calibration import Calibration

pytestmark = pytest.mark.usefixtures("one_thread")

SHARES = (0.2, 0.3, 0.2)
IDS = torch.randint(3, 131, (1, 6), generator=torch.Generator().manual_seed(3))
# Kernels hold activations at 15 bits and add in fp32: 1e-4 of the RMS for one product, a few times that after three
# layers; the largest seen is 5e-4. One neuron at another precision moves logits further: see `test_the_oracle_notices`.
TOLERANCE = 1e-3
# Of the largest score; the largest seen is 1.3e-4.
NEAR_TIE = 5e-4
UNGATED = ("gpt2", "opt", "falcon", "gpt-neox")
Folders = Callable[..., Path]


def recipes(name: str) -> list[Recipe]:
    inward = 1 if name in UNGATED else 2
    made = [*(Recipe("product", rank, inward, SHARES) for rank in (1, 2)), Recipe("inputs", 1, inward, SHARES)]
    return made if inward == 1 else [*made, Recipe("gate", 1, 1, SHARES), Recipe("up", 2, 1, SHARES)]


def stepwise(model: tf.PreTrainedModel, oracle: Oracle, ids: torch.Tensor) -> list[float]:
    """How far the engine's logits are from the oracle's, token by token."""
    got, want, found = None, None, []
    for token in ids.split(1, dim=1):
        with orders(model) as chosen, torch.no_grad():
            got = model(token, **cache_kwargs(model, got and cache_out(got)), use_cache=True)
        want = oracle.logits(chosen, token, **cache_kwargs(model, want and cache_out(want)), use_cache=True)
        found.append(apart(got.logits, want.logits))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_oracle(name: str, checkpoint: Folders, plane_store: Folders) -> None:
    for place, recipe in enumerate(recipes(name)):
        precision = ("int8", "int4")[place % 2]
        made = calibration(plane_store(name), recipe)
        oracle = Oracle(checkpoint(name), made, precision)
        with mixed(plane_store(name), made, precision=precision) as model:
            assert max(stepwise(model, oracle, IDS)) < TOLERANCE
            with orders(model) as chosen, model.tiercache.every_token(), torch.no_grad():
                got = model(IDS).logits
            assert apart(got, oracle.logits(chosen, IDS).logits) < TOLERANCE
            assert oracle.worst < NEAR_TIE
            assert model.tiercache.stats().neurons.tokens == 2 * IDS.shape[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["llama-tied-bias", "phi3", "gpt2"])
def test_equals_the_oracle_with_slots(name: str, device: str, checkpoint: Folders, plane_store: Folders) -> None:
    """Of a card, or of the region that stands in for one; the oracle is the CPU's in any case."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    made = calibration(plane_store(name), recipes(name)[0])
    oracle, got, want = Oracle(checkpoint(name), made, "int8"), None, None
    with mixed(plane_store(name), made, hbm="512MiB", device=device) as model:
        for token in IDS.split(1, dim=1):
            with orders(model) as chosen, torch.no_grad():
                got = model(token.to(device), **cache_kwargs(model, got and cache_out(got)), use_cache=True)
            want = oracle.logits(chosen, token, **cache_kwargs(model, want and cache_out(want)), use_cache=True)
            assert apart(got.logits.cpu(), want.logits) < TOLERANCE
        assert oracle.worst < NEAR_TIE
        assert "hbm" in model.tiercache.stats().tiers


@pytest.mark.parametrize("hbm", [None, "64MiB"])
@pytest.mark.parametrize("name", ["llama-tied-bias", "phi3", "gpt2"])
def test_short_passes_and_batches_choose_for_each_token(
    name: str, hbm: str | None, checkpoint: Folders, plane_store: Folders
) -> None:
    made = calibration(plane_store(name), recipes(name)[0])
    oracle = Oracle(checkpoint(name), made, "int8")
    ids = torch.randint(3, 131, (2, 2), generator=torch.Generator().manual_seed(5))
    with mixed(plane_store(name), made, hbm=hbm) as model, torch.no_grad():
        mask = torch.tensor([[0, 1], [1, 1]])  # padded on the left: a padding token is a token, and chooses too
        with orders(model) as chosen:
            got = model(ids, attention_mask=mask).logits
        assert [len(rows) for rows in chosen.values()] == [4] * len(chosen)
        want = oracle.logits(chosen, ids, attention_mask=mask).logits
        assert apart(got[1], want[1]) < TOLERANCE
        assert apart(got[0, 1], want[0, 1]) < TOLERANCE
        alone = oracle.logits({place: rows[1:2] for place, rows in chosen.items()}, ids[:1, 1:]).logits
        if name != "gpt2":  # whose positions are absolute
            assert apart(got[0, 1], alone[0, 0]) < TOLERANCE


def one_less(made: Calibration) -> Calibration:
    """One neuron fewer at int8, and one more at int4."""
    recipe = made.settings[0].recipes[0]
    each = 1 / made.norms.shape[1]
    other = replace(recipe, shares=(recipe.shares[0] - each, recipe.shares[1] + 2 * each, recipe.shares[2] - each))
    return replace(made, settings=(replace(made.settings[0], recipes=(other,) * len(made.norms)),))


def test_the_oracle_notices(checkpoint: Folders, plane_store: Folders) -> None:
    made = calibration(plane_store("llama"), Recipe("product", 1, 2, SHARES))
    other_norms = replace(made, norms=made.norms[:, ::-1].copy())
    other_rank = calibration(plane_store("llama"), Recipe("product", 2, 2, SHARES))
    with mixed(plane_store("llama"), made) as model:
        oracle = Oracle(checkpoint("llama"), one_less(made), "int8")
        assert max(stepwise(model, oracle, IDS)) > 3 * TOLERANCE
        for wrong in (other_norms, other_rank):
            oracle = Oracle(checkpoint("llama"), wrong, "int8")
            stepwise(model, oracle, IDS)
            assert oracle.worst > 20 * NEAR_TIE
        oracle = Oracle(checkpoint("llama"), made, "int4")
        assert max(stepwise(model, oracle, IDS)) > 20 * TOLERANCE


def test_blocks_have_recipes_of_their_own(checkpoint: Folders, plane_store: Folders) -> None:
    own = [Recipe("product", 1, 2, (0.5, 0.0, 0.1)), Recipe("gate", 1, 1, (0, 0.6, 0)), Recipe("up", 1, 1, (0, 0, 1))]
    made = calibration(plane_store("qwen3"), own)
    oracle = Oracle(checkpoint("qwen3"), made, "int8")
    for hbm in (None, "64MiB"):
        with mixed(plane_store("qwen3"), made, hbm=hbm) as model:
            assert max(stepwise(model, oracle, IDS)) < TOLERANCE


def test_half_precision_activations(plane_store: Folders, tmp_path: Path) -> None:
    """A model in bf16: its blocks take and give bf16, and both ways of choosing agree as far as bf16 tells."""
    from architectures import save

    save("llama-tied-bias", tmp_path / "checkpoint", torch.bfloat16)
    tiercache.convert(tmp_path / "checkpoint", tmp_path / "store")
    with mixed(tmp_path / "store", Recipe("product", 1, 2, SHARES)) as model, torch.no_grad():
        got = model(IDS[:, :1]).logits
        assert got.dtype == torch.bfloat16
        with model.tiercache.every_token():
            assert apart(model(IDS[:, :1].repeat(5, 1)).logits[:1], got) < 0.05


# Exact passes.


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "opt", "falcon"])
def test_exact_passes_are_those_of_the_exact_mode(name: str, plane_store: Folders) -> None:
    store, recipe = plane_store(name), recipes(name)[1]
    passes = [IDS[:, :1], IDS[:, :4], IDS, IDS.repeat(4, 1)]
    options = {"precision": "int8", "dram": "256MiB", "context": CONTEXT, "kernels": "unfused"}
    with tiercache.offload(store, **options) as model, torch.no_grad():
        want = [model(ids).logits for ids in passes]
    for hbm in (None, "64MiB") if name in ("llama", "gpt2") else ("64MiB",):
        with mixed(store, recipe, hbm=hbm, kernels="unfused") as model, torch.no_grad():
            for ids, exact in zip(passes, want, strict=True):
                plain = model(ids).logits
                assert torch.equal(plain, exact) == (ids.numel() > 4), "passes of many tokens are dense of themselves"
                with model.tiercache.passes("exact"):
                    assert torch.equal(model(ids).logits, exact)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_exact_passes_do_not_depend_on_where_planes_lie(precision: str, plane_store: Folders) -> None:
    found = []
    for hbm in (None, "64MiB", "1200KB"):
        with mixed(plane_store("llama"), Recipe("product", 1, 2, SHARES), hbm=hbm, precision=precision) as model:
            with model.tiercache.passes("exact"), torch.no_grad():
                found.append([model(ids).logits for ids in (IDS[:, :1], IDS)])
            assert model.tiercache.stats().neurons.tokens == 0
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_everything_at_int8_is_exact_up_to_summation(plane_store: Folders) -> None:
    """Of the likeliest tokens; the others' logits are the head's at int3."""
    with mixed(plane_store("phi3"), Recipe("product", 1, 2, (1.0, 0.0, 0.0))) as model, torch.no_grad():
        got = model(IDS[:, :1]).logits
        with model.tiercache.every_token():
            many = model(IDS).logits
        assert apart(many[:, :1], got) < TOLERANCE
        with model.tiercache.passes("exact"):
            one, whole = model(IDS[:, :1]).logits, model(IDS).logits
    for lossy, exact in ((got, one), (many, whole)):
        likeliest = lossy.topk(4).indices
        assert apart(lossy.gather(-1, likeliest), exact.gather(-1, likeliest)) < TOLERANCE
        assert apart(lossy, exact) > 20 * TOLERANCE


def test_kinds_of_passes_end_with_their_context(plane_store: Folders) -> None:
    with mixed(plane_store("llama"), Recipe("product", 1, 2, SHARES)) as model, torch.no_grad():
        want = model(IDS[:, :1]).logits
        with pytest.raises(ZeroDivisionError), model.tiercache.passes("exact"), model.tiercache.every_token():
            raise ZeroDivisionError
        assert torch.equal(model(IDS[:, :1]).logits, want)
        with model.tiercache.passes("exact"), model.tiercache.passes("mixed"):
            assert torch.equal(model(IDS[:, :1]).logits, want)
        with pytest.raises(tiercache.errors.UsageError, match="dense"):
            model.tiercache.passes("dense")


@pytest.mark.parametrize("name", ["llama-tied-bias", "phi3", "gpt2"])
def test_misses_multiplied_below_equal_the_oracle(name: str, checkpoint: Folders, plane_store: Folders) -> None:
    """What the planes above add, multiplied in DRAM where there is no slot: the same sums, within rounding."""
    for recipe in recipes(name)[:2]:
        made = calibration(plane_store(name), recipe)
        oracle = Oracle(checkpoint(name), made, "int8")
        with mixed(plane_store(name), made, hbm="64MiB") as model:
            plan = model.tiercache.plan.hbm
            small = sum(plan.reserved_bytes.values()) + plan.slab_bytes + 4_000
        with mixed(plane_store(name), made, hbm=small, cpu_tokens=4) as model:
            assert max(stepwise(model, oracle, IDS)) < TOLERANCE
            with orders(model) as chosen, torch.no_grad():
                several = model(IDS[:, :4]).logits
            assert apart(several, oracle.logits(chosen, IDS[:, :4]).logits) < TOLERANCE
            neurons = model.tiercache.stats().neurons
            assert neurons.hits + neurons.uploads < neurons.requests, "nothing was multiplied below"
            assert oracle.worst < NEAR_TIE
