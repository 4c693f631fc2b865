"""Learned rounding: what it keeps, what it gains on a layer of the pico model, and what convert makes of it."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibrate import with_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from tiercache import cli
from tiercache.errors import StoreError, UsageError
from tiercache.quant import tune
from tiercache.quant.codes import CELL, MIDDLES
from tiercache.quant.corpus import Corpus
from tiercache.quant.gptq import LayerMoments
from tiercache.quant.hadamard import restored, stored
from tiercache.quant.planes import Planes, codes_of, decode, encode
from tiercache.quant.tune import CodedPiece, Layer, tuned
from tiercache.store import encode as encoder
from tiercache.store import estimate, layout
from tiercache.store.activations import TextPass
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.convert import convert
from tiercache.store.manifest import PlaneWeight
from tiercache.store.planestore import PlaneStore
from tiercache.store.reader import Reader, aligned_buffer, load

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*tokenizer.*")]


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Layer, list[CodedPiece]]]:
    """Pico's second layer, what goes through it, and its calibrated planes, with scales of inputs."""
    source = Checkpoint.open(PICO)
    windows = Corpus.read(None, PICO, source.config, 1024).windows.reshape(-1, 128)
    with Reader() as reader:
        text_pass = TextPass(source, windows, reader, tmp_path_factory.mktemp("walk"), looks_back=True)
        text_pass.resume(0)
        text_pass.layer()
        moments = LayerMoments(text_pass.layer(), scaled=True)
        pieces: list[CodedPiece] = []
        with text_pass.passed() as layer:
            for unit in (unit for unit in layout.plan(source, 64, scaled=True) if unit.layer == 1):
                pieces += encoder.calibrated(unit, lambda name: load(reader, source.tensors[name]), 64, moments)
            assert all(piece.factors is not None for piece in pieces)
            yield layer, pieces


def losses(layer: Layer, pieces: list[CodedPiece], made: list[Planes], windows: slice) -> dict[str, float]:
    """Mean squared errors of the layer's output at each precision."""
    found = {}
    for precision in ("int3", "int4", "int8"):
        weights = {piece.parameter: layer.parameters[piece.parameter].clone() for piece in pieces}
        for piece, planes in zip(pieces, made, strict=True):
            restored(planes.at(precision), piece.factors, piece.of(weights[piece.parameter]))
        outputs = torch.stack([layer.forward(weights, window) for window in layer.inputs[windows]])
        found[precision] = float((outputs - layer.outputs[windows]).square().mean())
    return found


def same(one: list[Planes], other: list[Planes]) -> bool:
    pairs = ((a.planes, b.planes) for a, b in zip(one, other, strict=True))
    return all(torch.equal(a, b) for some, others in pairs for a, b in zip(some, others, strict=True))


def test_a_layer_gains_and_int8_keeps_its_weights(pico: tuple[Layer, list[CodedPiece]]) -> None:
    layer, pieces = pico
    before = [piece.planes for piece in pieces]
    assert same(tuned(layer, pieces, 0, seed=1), before)
    made = tuned(layer, pieces, 20, seed=1)
    assert same(tuned(layer, pieces, 20, seed=1), made)
    held_out = slice(-max(1, len(layer.inputs) // tune.WATCHED), None)
    was, now = (losses(layer, pieces, some, held_out) for some in (before, made))
    assert now["int8"] == was["int8"]
    for precision in tune.LEARNED:
        assert now[precision] < was[precision] or same(made, before)


def test_a_bad_code_is_found() -> None:
    """Of weights that could have the h next to theirs, a quarter has it: learning takes some of them back."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(16, 32, 64)
    planes = encode(stored(weight), 64)
    latent = tune._Latent(CodedPiece("w", 0, False, planes), weight)
    least, most = latent.bounds()
    spoiled = torch.where(torch.rand(48, 64) < 0.25, least + most - latent.h, latent.h).to(torch.uint8)
    layer = Layer({"w": weight}, lambda given, window: window @ given["w"].T, x, x @ weight.T)
    piece = CodedPiece("w", 0, False, latent.planes(spoiled))
    (made,) = tuned(layer, [piece], 60, seed=0)
    was, now = (losses(layer, [piece], [some], slice(None)) for some in (piece.planes, made))
    assert now["int4"] < 0.95 * was["int4"]
    assert now["int3"] < was["int3"]
    assert now["int8"] == was["int8"]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_first_codes_are_kept_where_nothing_is_better(transposed: bool) -> None:
    """Weights of which some could have another h, padded and scaled; the output does not depend on them."""
    torch.manual_seed(0)
    weight = torch.randn(40, 70)
    rows = weight.T if transposed else weight
    factors = rows.abs().amax(0)
    planes = encode(stored(rows, factors), 32)

    def forward(_weights: dict[str, Tensor], window: Tensor) -> Tensor:
        return window + 1 + 0 * _weights["w"].sum()

    layer = Layer({"w": weight}, forward, torch.zeros(3, 4, 5), torch.zeros(3, 4, 5))
    piece = CodedPiece("w", 0, transposed, planes, factors)
    assert same(tuned(layer, [piece], 5, seed=0), [planes])


@pytest.mark.parametrize("scaled", [False, True])
def test_codes_come_back_from_planes_and_go_up_and_down_without_a_change_at_int8(scaled: bool) -> None:
    torch.manual_seed(0)
    factors = torch.rand(150) + 0.1 if scaled else None
    planes = encode(stored(torch.randn(9, 150), factors), 64)
    piece = CodedPiece("w", 0, False, planes, factors)
    latent = tune._Latent(piece, restored(planes, factors, torch.empty(9, 150)))
    assert torch.equal(latent.rounded(), codes_of(planes)[0])
    least, most = latent.bounds()
    assert bool((least <= most).all())
    assert set((most - least).unique().tolist()) == {0, 1}
    begun = latent.h + tune._TOWARDS * (codes_of(planes)[1] - MIDDLES[1]) / CELL  # halfway to where int8 has the weight
    assert torch.allclose(latent._z, begun, atol=1e-3)
    for h in (least, most):
        moved = latent.planes(h.to(torch.uint8))
        assert torch.equal(codes_of(moved)[0], h.to(torch.uint8))
        assert torch.equal(decode(moved, torch.float32), decode(planes, torch.float32))


def test_a_store_is_tuned_and_remembers_it(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the conversion was interrupted behind its first layer: the same bytes."""
    model = with_tokenizer(checkpoint("llama"), tmp_path / "model")
    options: dict[str, Any] = {"compress": "off", "calibrate": Path(__file__), "tokens": 512, "show_progress": False}
    made = convert(model, tmp_path / "tuned", tune=2, **options)
    assert made.calibration is not None
    assert made.calibration["tune"] == 2
    assert PlaneStore.open(tmp_path / "tuned").contents.meta["calibration"] == made.calibration
    for other in (0, 3):
        with pytest.raises(StoreError, match="was made with calibration="):
            convert(model, tmp_path / "tuned", tune=other, **options)
    with monkeypatch.context() as patch:
        patch.setattr(TextPass, "forget", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(model, tmp_path / "again", tune=2, **options)
    expected = convert(model, tmp_path / "again", tune=2, dry_run=True, **options)
    resumed = convert(model, tmp_path / "again", tune=2, **options)
    assert resumed.resumed_bytes == expected.resumed_bytes > 0
    for path in (tmp_path / "tuned").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def _interrupt(_self: TextPass) -> None:
    raise KeyboardInterrupt


def test_a_tuned_stores_int8_and_its_scales_are_those_of_an_untuned_one(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is learned is kept here, so that something is: a toy's random weights gain little."""
    looks = itertools.count(2)
    monkeypatch.setattr(tune._Learner, "watch", lambda _self: [1 / next(looks)] * len(tune.LEARNED))
    model = with_tokenizer(checkpoint("llama"), tmp_path / "model")
    options: dict[str, Any] = {"compress": "off", "tokens": 512, "show_progress": False}
    stores = []
    for steps in (0, 20):
        convert(model, tmp_path / str(steps), tune=steps, **options)
        stores.append(PlaneStore.open(tmp_path / str(steps)))
    plain, learned = stores
    learned.verify()
    assert (plain.folder / "scales.bin").read_bytes() == (learned.folder / "scales.bin").read_bytes()
    inputs = [[record.inputs for record in store.contents.records] for store in stores]
    assert inputs[0] == inputs[1]
    assert any(inputs[0])
    assert _same_weights(plain, learned, "int8")
    assert not _same_weights(plain, learned, "int4")


def _same_weights(one: PlaneStore, other: PlaneStore, precision: str) -> bool:
    """Whether all quantised parameters of two stores decode to the same, scales of inputs included."""
    made: list[dict[str, Tensor]] = []
    for manifest in (one.manifest(precision), other.manifest(precision)):
        made.append({})
        with Reader() as reader:
            for name, weight in manifest.weights.items():
                if isinstance(weight, PlaneWeight):
                    slots = [_slot(reader, manifest.units[unit]) for unit in weight.units]
                    made[-1][name] = torch.empty(weight.shape)
                    weight.decode_into(slots[0], made[-1][name], slots[1:])
    assert len(made[0]) > 10
    return all(torch.equal(weight, made[1][name]) for name, weight in made[0].items())


def _slot(reader: Reader, unit: Any) -> Tensor:
    slot = aligned_buffer(unit.slot_bytes)
    reader.read(unit.pieces, slot).wait()
    return torch.from_numpy(slot)


def test_the_estimate_counts_the_steps() -> None:
    units = layout.plan(Checkpoint.open(PICO), 64)
    rates = estimate.ConversionRates(1e9, 1e-9, 1e-6)
    takes = [estimate.seconds(units, 4096, 512, steps, rates) for steps in (0, 100, 200)]
    assert takes[2] - takes[1] == pytest.approx(takes[1] - takes[0], rel=0.1)
    assert takes[1] > takes[0]
    plain, tuned = (estimate.memory_bytes(units, 4096, 512, tuned=some) for some in (False, True))
    assert tuned > plain


def test_what_cannot_be_tuned(checkpoint: Any, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        found = CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])
        assert found.exit_code != 0
        assert isinstance(found.exception, UsageError | SystemExit)
        return f"{found.output} {found.exception}"

    store = tmp_path / "store"
    assert "leave tune= or plain= out" in refused(PICO, store, "--tune", 5, "--plain")
    assert "give 0 or more" in refused(PICO, store, "--tune", -1)
    assert "cannot be tuned without a text" in refused(checkpoint("llama"), store, "--tune", 5)
    assert "two windows" in refused(PICO, store, "--tune", 5, "--tokens", 300)
    assert not list(tmp_path.glob("store*"))
