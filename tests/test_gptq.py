"""Calibrated codes: GPTQ against a slow one, the Hessians against those of a resident model, and what it all gains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from mixed_oracle import mixed
from torch import Tensor

import tiercache
from policies.precision import Recipe
from tiercache.errors import QuantizationError, StoreError, UsageError
from tiercache.model import meta_model
from tiercache.quant import codes as code_choice
from tiercache.quant import gptq, packing
from tiercache.quant.corpus import Corpus
from tiercache.quant.gptq import Moments, quantize_columns, quantize_rows
from tiercache.quant.hadamard import restored, stored, transform
from tiercache.quant.planes import PRECISIONS, Planes, encode
from tiercache.store.activations import TextPass
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.convert import convert
from tiercache.store.planestore import PlaneStore
from tiercache.store.reader import Reader

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs that move together, some much larger than others: fp32 [tokens, features]."""
    torch.manual_seed(seed)
    mixed = torch.randn(tokens, features // 3 + 1) @ torch.randn(features // 3 + 1, features)
    return (mixed + 0.3 * torch.randn(tokens, features)) * torch.rand(features).exp()


def loss(planes: Planes, precision: str, weight: Tensor, x: Tensor, factors: Tensor | None = None) -> float:
    """Squared error of the outputs of `weight` [outputs, inputs] at a precision, relative to the outputs."""
    flip = planes.rows != len(weight)
    back = torch.empty(weight.T.shape if flip else weight.shape)
    restored(planes.at(precision), factors, back)
    back = back.T if flip else back
    return float((x @ (back - weight).T).square().sum() / (x @ weight.T).square().sum())


# ---------------------------------------------------------------- one matrix


def slow_codes(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """h and c [outputs, inputs] by the optimal brain surgeon's own formula: the inverse of what is left, each time.

    Inputs come by the energy of their groups, then by their own.
    """
    hessian, weight = transform(transform(hessian.double()).T), transform(weight)
    energy = hessian.diagonal().tolist()
    groups = [range(first, min(first + group, len(energy))) for first in range(0, len(energy), group)]
    groups.sort(key=lambda some: -sum(energy[i] for i in some))
    order = [i for some in groups for i in sorted(some, key=lambda i: -energy[i])]
    damped = hessian + gptq.DAMPING * hessian.diagonal().double().mean() * torch.eye(len(hessian)).double()
    states = weight.double()[None].repeat(3, 1, 1)
    codes = torch.zeros(2, *weight.shape, dtype=torch.uint8)
    lo = step = torch.empty(0)
    for at, index in enumerate(order):
        left = order[at:]
        inverse = torch.linalg.inv(damped[left][:, left])
        if at == 0 or index // group != order[at - 1] // group:
            own = [i for i in order if i // group == index // group]
            least, most = states[:, :, own].float().amin((0, 2)), states[:, :, own].float().amax((0, 2))
            lo, step = (some[:, 0] for some in code_choice.ranges(least[:, None], most[:, None]))
        wanted = states[:, :, index].float()
        h, c = code_choice.nearest_codes(wanted[0], wanted[1], wanted[2], lo, step)
        codes[0, :, index], codes[1, :, index] = h, c
        error = (states[:, :, index] - code_choice.values(h, c, lo, step).double()) / inverse[0, 0]
        states[:, :, left] -= error[..., None] * inverse[0]
    return codes[0], codes[1]


@pytest.mark.parametrize(("inputs", "group"), [(150, 64), (64, 32), (200, 128)])
def test_codes_are_those_of_the_slow_way(inputs: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(600, inputs)
    weight = torch.randn(24, inputs) * 0.1
    monkeypatch.setattr(gptq, "REFINEMENTS", 0)
    made = quantize_rows(weight, Moments.of(x.T @ x, group), group)
    h, c = slow_codes(weight, x.T @ x, group)
    padded = -(-inputs // group) * group - inputs
    packed = packing.pack(*(torch.nn.functional.pad(some, (0, padded)).view(24, -1, group) for some in (h, c)))
    same = [(one == other).float().mean() for one, other in zip(made.planes, packed, strict=True)]
    assert min(same) > 0.98  # sums in fp32 and in fp64 part at ties, and what follows a tie differs


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [False, True])
def test_every_precision_gains(group: int, columns: bool) -> None:
    """Outputs of new inputs are nearer to the unquantised ones, at all three precisions together."""
    x, new = correlated(1500, 192)[:1000], correlated(1500, 192)[1000:]
    weight = torch.randn(100, 192) * 0.1
    weight[::17] *= 8  # outputs of large weights
    scale = weight.abs().amax(dim=1) if columns else None
    if scale is not None:
        made = quantize_columns(weight.T, Moments.of(x.T @ x, None), group, scale)
        rounded = encode(stored(weight.T, scale), group)
    else:
        made, rounded = quantize_rows(weight, Moments.of(x.T @ x, group), group), encode(stored(weight), group)
    for precision in PRECISIONS:
        assert loss(made, precision, weight, new, scale) < 0.8 * loss(rounded, precision, weight, new, scale), precision


def test_factors_keep_large_outputs_from_spoiling_the_others() -> None:
    weight = torch.randn(128, 96)  # [outputs, inputs], stored input by input
    weight[5] *= 50
    scale = weight.abs().amax(dim=1)
    others = [i for i in range(128) if i != 5]
    made = [restored(encode(stored(weight.T, some)).at("int4"), some, torch.empty(96, 128)).T for some in (scale, None)]
    errors = [(one - weight)[others].square().mean() for one in made]
    assert errors[0] < errors[1] / 4


def test_a_large_matrix_is_cut_into_chunks_with_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(500, 96), torch.randn(200, 96)
    rows, columns = Moments.of(x.T @ x, 64), Moments.of(x.T @ x, None)
    scale = weight.abs().amax(dim=1)
    whole = quantize_rows(weight, rows, 64), quantize_columns(weight.T, columns, 64, scale)
    monkeypatch.setattr(gptq, "CHUNK_WEIGHTS", 96 * 64)
    pieces = quantize_rows(weight, rows, 64), quantize_columns(weight.T, columns, 64, scale)
    for one, other in zip(whole, pieces, strict=True):
        assert [torch.equal(a, b) for a, b in zip(one.planes, other.planes, strict=True)] == [True] * 3
        assert torch.equal(one.scales, other.scales)


def test_scales_of_inputs_give_large_ones_finer_steps() -> None:
    x = correlated(1500, 192)
    x[:, ::13] *= 30  # as after a norm whose weight has outliers
    weight = torch.randn(64, 192) * 0.1
    moments = [Moments.of(x[:1000].T @ x[:1000], 64, scaled=some) for some in (False, True)]
    for precision in PRECISIONS:
        losses = [loss(quantize_rows(weight, m, 64), precision, weight, x[1000:], m.factors) for m in moments]
        assert losses[1] < 0.8 * losses[0], (precision, losses)


def test_inputs_that_never_come_and_activations_that_are_not_finite() -> None:
    x, weight = correlated(100, 64), torch.randn(8, 64)
    x[:, 10:20] = 0
    made = quantize_rows(weight, Moments.of(x.T @ x, 64), 64)
    assert loss(made, "int8", weight, x) < 1e-4
    with pytest.raises(QuantizationError, match="not finite"):
        Moments.of(torch.full((64, 64), torch.nan), 64)


# ---------------------------------------------------------------- a text's way through a model


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_hessians_are_those_of_the_resident_model(checkpoint: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Also where the pass is taken up again behind a layer."""
    torch.manual_seed(1)
    windows = torch.randint(3, 131, (3, 12))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    wanted = _hessians(model, windows)
    source = Checkpoint.open(checkpoint(name))
    with Reader() as reader:
        found: dict[str, Tensor] = {}
        for layer in range(3):  # each in a pass of its own
            text_pass = TextPass(source, windows, reader, tmp_path)
            text_pass.resume(layer)
            found |= text_pass.layer()
            text_pass.keep()
            text_pass.forget()
        head = text_pass.head()
    assert [path.name for path in tmp_path.iterdir()] == ["hidden-00003.npy"]
    matrices = meta_model.matrices(model)
    assert found.keys() == {matrix.module for matrix in matrices if matrix.layer is not None}
    found |= {matrix.module: head for matrix in matrices if matrix.layer is None}
    for module, hessian in wanted.items():
        torch.testing.assert_close(found[module], hessian, rtol=2e-4, atol=2e-4 * float(hessian.abs().max()))


def _hessians(model: transformers.PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_module: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    for matrix in meta_model.matrices(model):
        model.get_submodule(matrix.module).register_forward_pre_hook(listen(matrix.module))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return sums


# ---------------------------------------------------------------- a whole store


@pytest.fixture(scope="module")
def stores(pico_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pico's planes, calibrated on the package's own text and rounded."""
    rounded = tmp_path_factory.mktemp("pico") / "rounded"
    convert(PICO, rounded, compress="off", plain=True, show_progress=False)
    return pico_store, rounded


def test_a_store_remembers_how_its_codes_were_chosen(stores: tuple[Path, Path]) -> None:
    calibrated, rounded = (PlaneStore.open(folder).contents.meta["calibration"] for folder in stores)
    assert rounded == {"method": "rounding"}
    assert (calibrated["method"], calibrated["tokens"]) == ("gptq", 2048)
    with pytest.raises(StoreError, match=r"was made with calibration=\d+ tokens of the text .* this conversion has"):
        convert(PICO, stores[0], compress="off", plain=True)


def test_a_calibrated_model_is_nearer_to_its_source(stores: tuple[Path, Path]) -> None:
    """KL of pico's next tokens on a text that calibration did not see."""
    text = (PICO.parent / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(PICO)
    ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
    model = transformers.AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
        for precision, most in (("int8", 0.9), ("int4", 0.8), ("int3", 0.8)):
            losses = []
            for folder in stores:
                _load(model, PlaneStore.open(folder), precision)
                made = model(ids).logits.log_softmax(-1)
                losses.append(float((wanted.exp() * (wanted - made)).sum(-1).mean()))
            assert losses[0] < most * losses[1], (precision, losses)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_with_scaled_inputs_are_those_of_the_decoded_weights(
    stores: tuple[Path, Path], precision: str
) -> None:
    ids = torch.arange(3, 40)[None]
    made = []
    for kernels in ("auto", "decode"):
        options: dict[str, Any] = {"precision": precision, "dram": "256MiB", "context": 64, "logits": 64}
        with tiercache.offload(stores[0], kernels=kernels, show_progress=False, **options) as model, torch.no_grad():
            assert all(weight.inputs for name, weight in _weights(model).items() if name != "lm_head")
            made.append(model(ids, logits_to_keep=37).logits.float())
    apart = (made[0] - made[1]).square().mean().sqrt()  # decoded weights are rounded to the model's bf16 once more
    assert float(apart) < 0.02 * float(made[1].std())


def _weights(model: Any) -> dict[str, Any]:
    return dict(PlaneStore.open(model.name_or_path).manifest("int8").weights)


@pytest.mark.parametrize("hbm", [None, "64MiB"])
def test_mixed_mode_with_every_neuron_at_int8_is_int8(stores: tuple[Path, Path], hbm: str | None) -> None:
    ids = torch.arange(3, 40)[None]
    options: dict[str, Any] = {"precision": "int8", "context": 64, "logits": 64, "kernels": "unfused"}
    with tiercache.offload(stores[0], dram="256MiB", show_progress=False, **options) as model, torch.no_grad():
        want = model(ids).logits.float()
    recipe = Recipe("product", 1, 2, (1.0, 0.0, 0.0))
    with mixed(stores[0], recipe, hbm=hbm, context=64, logits=64, kernels="unfused") as model, torch.no_grad():
        found = model(ids).logits.float()
    assert float((found - want).abs().max()) < 0.01 * float(want.std())


def _load(model: transformers.PreTrainedModel, store: PlaneStore, precision: str) -> None:
    """Put a store's weights into a model, decoded."""
    from tiercache.store.manifest import PlaneWeight
    from tiercache.store.reader import aligned_buffer

    manifest = store.manifest(precision)
    with Reader() as reader:
        for module, weight in manifest.weights.items():
            assert isinstance(weight, PlaneWeight)
            unit = manifest.units[weight.unit]
            slot = aligned_buffer(unit.slot_bytes)
            reader.read(unit.pieces, slot).wait()
            made = torch.empty(weight.shape)
            weight.decode_into(torch.from_numpy(slot), made)
            model.get_submodule(module).weight = torch.nn.Parameter(made, requires_grad=False)


def test_texts_that_cannot_be_used(checkpoint: Callable[..., Path], tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(UsageError, match="is not there"):
        convert(PICO, tmp_path / "store", calibrate=tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(UsageError, match="fewer than one window of 512"):
        convert(PICO, tmp_path / "store", calibrate=tmp_path / "short.txt")
    with pytest.raises(UsageError, match="exclude each other"):
        convert(PICO, tmp_path / "store", calibrate=tmp_path / "short.txt", plain=True)
    with pytest.raises(UsageError, match="too few"):
        convert(PICO, tmp_path / "store", tokens=1)
    with pytest.raises(StoreError, match="no tokenizer"):
        convert(checkpoint("llama"), tmp_path / "store", calibrate=PICO.parent / "heldout.txt")
    assert not list(tmp_path.glob("store*"))
    convert(checkpoint("llama"), tmp_path / "store", compress="off", show_progress=True)
    assert "rounded and not calibrated: no tokenizer lies in" in capfd.readouterr().err


def test_the_own_text_is_long_enough() -> None:
    source = Checkpoint.open(PICO)
    corpus = Corpus.read(None, PICO, source.config)
    assert corpus.windows.numel() == 16_384
