"""`calibrate` against direct computation on real tiny models; what it refuses, and what it keeps."""

import errno
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn import functional

import tiercache
from policies.precision import Recipe
from profiler import replay
from profiler.trace import Trace
from tiercache.calibrate import collect, command, halving, search
from tiercache.calibrate import journal as journals
from tiercache.calibrate import report as tables
from tiercache.calibrate import settings as trying
from tiercache.calibrate import sums as summing
from tiercache.calibrate.command import calibrate
from tiercache.calibrate.job import Job
from tiercache.calibrate.measure import Measurer
from tiercache.calibrate.report import report
from tiercache.calibrate.settings import Forecast, shares, uniform
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine.mixed_plan import sizes_of
from tiercache.engine.offload import open_offloaded
from tiercache.errors import DoesNotFitError, EnvironmentUnsupportedError, StoreError, UsageError
from tiercache.quality import measure as measuring
from tiercache.quality.measure import Score
from tiercache.quant.hadamard import restored
from tiercache.store import catalog
from tiercache.store.calibration import FILE, PARTIAL_FILE, Calibration
from tiercache.store.folders import locked
from tiercache.store.planestore import PlaneStore

TEXT = Path(__file__)
SMALL: dict[str, Any] = {"tokens": 96, "window": 32, "measure_tokens": 32, "show_progress": False}
FEW = (0.5,)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*tokenizer.*"),
]


def with_tokenizer(store: Path, folder: Path) -> Path:
    """A copy of a tiny model's store that knows a token for each ASCII character."""
    shutil.copytree(store, folder)
    tokenizer = Tokenizer(models.WordLevel({**{chr(code): code + 3 for code in range(127)}, "?": 130}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer shares to try: what is tested then is not which."""
    monkeypatch.setattr(trying, "SHARES", FEW)


@pytest.fixture(scope="module")
def llama(plane_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A calibrated tiny llama."""
    folder = with_tokenizer(plane_store("llama"), tmp_path_factory.mktemp("llama") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trying, "SHARES", FEW)
        result = calibrate(folder, TEXT, **SMALL, predictor_rank=4)
    return SimpleNamespace(folder=folder, result=result, kept=Calibration.load(PlaneStore.open(folder)))


def same(one: Calibration, other: Calibration) -> bool:
    """The same contents, but for the time it took."""
    arrays = {**one.arrays, "norms": one.norms, "frequency": one.frequency, "losses": one.losses}
    others = {**other.arrays, "norms": other.norms, "frequency": other.frequency, "losses": other.losses}
    metas = [{name: value for name, value in each.meta.items() if name != "seconds"} for each in (one, other)]
    equal = arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in arrays)
    return equal and metas[0] == metas[1] and one.settings == other.settings


def windows(folder: Path, text: Path = TEXT) -> list[torch.Tensor]:
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"][: SMALL["tokens"]]
    return list(torch.tensor(ids).split(SMALL["window"]))


# ---------------------------------------------------------------- against direct computation


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Any]:
    """The model in mixed mode, by its own calibration."""
    config = OffloadConfig(
        hbm=None, dram=Budget(), precision="int8", mode="mixed", bytes_per_token=Budget.parse(0.75), **options
    )
    with torch.no_grad(), open_offloaded(folder, config, show_progress=False) as model:
        yield model


def matrices(block: Any, precision: str) -> list[torch.Tensor]:
    """Gate, up and down of a block, decoded."""
    block.planes.open()
    try:
        (parts,) = [parts for _, parts in block.planes.chunks(slice(None))]
        factors = [block.planes.input_factors] * (len(parts) - 1) + [block.planes.output_factors]
        shape = parts[0].rows, parts[0].columns
        return [restored(p.at(precision), f, torch.empty(shape)) for p, f in zip(parts, factors, strict=True)]
    finally:
        block.planes.close()


class Direct:
    """What a llama's block has, computed by torch from decoded matrices, over all windows."""

    def __init__(self, folder: Path, place: int) -> None:
        with opened(folder) as model:
            layer, block = model.model.layers[place], model.tiercache.mixed.blocks[place]
            x: list[torch.Tensor] = []
            stream: list[torch.Tensor] = []
            layer.mlp.gate_proj.register_forward_pre_hook(lambda module, arguments: x.append(arguments[0][0].clone()))
            layer.register_forward_hook(lambda module, arguments, output: stream.append(output[0].clone()))
            with model.tiercache.passes("exact"):
                for window in windows(folder):
                    model(input_ids=window[None], use_cache=False)
            self.weights = {precision: matrices(block, precision) for precision in ("int3", "int4", "int8")}
        self.windows, self.x, self.stream = len(x), torch.cat(x), torch.cat(stream)
        self.norms = self.weights["int8"][2].norm(dim=1)
        self.truth = self.hidden("int8").abs() * self.norms

    def inward(self, precision: str) -> list[torch.Tensor]:
        return [self.x @ matrix.T for matrix in self.weights[precision][:2]]

    def hidden(self, precision: str) -> torch.Tensor:
        gate, up = self.inward(precision)
        return functional.silu(gate) * up

    def output(self, precision: str) -> torch.Tensor:
        return self.hidden(precision) @ self.weights[precision][2]

    def sets(self, scores: torch.Tensor, share: float) -> list[set[int]]:
        return [set(row.tolist()) for row in scores.topk(round(share * scores.shape[1]), dim=1).indices]


@pytest.mark.parametrize("place", [0, 2])
def test_statistics_of_a_block_are_those_of_its_matrices(llama: SimpleNamespace, place: int) -> None:
    direct, result, kept = Direct(llama.folder, place), llama.result, llama.kept
    assert np.allclose(kept.norms[place], direct.norms, rtol=1e-5)
    true = direct.sets(direct.truth, 0.5)
    counts = np.bincount([n for some in true for n in some], minlength=direct.truth.shape[1])
    assert np.abs(kept.frequency[place] * len(true) - counts).max() <= 1  # one tie at the border
    for name, precision, share in itertools.product(("product", "gate", "up"), ("int3", "int4"), (0.25, 0.5)):
        gate, up = direct.inward(precision)
        guess = {"product": functional.silu(gate) * up, "gate": functional.silu(gate), "up": up}[name]
        found = direct.sets(guess.abs() * direct.norms, share)
        wanted = direct.sets(direct.truth, share)
        expected = np.mean([len(a & b) / len(b) for a, b in zip(found, wanted, strict=True)])
        assert result["recall"][name][precision][f"{share:.0%}"][place] == pytest.approx(expected, abs=2e-3)
        flat = np.sort((guess.abs() * direct.norms).numpy().reshape(direct.windows, -1), axis=1)
        quantile = flat[:, flat.shape[1] // 2].mean()
        assert result["thresholds"][name][precision][place][1] == pytest.approx(float(quantile), rel=1e-3)
    runs = [true[start : start + 32] for start in range(0, len(true), 32)]
    shared = [len(a & b) / len(b) for run in runs for a, b in itertools.pairwise(run)]
    assert result["overlap"]["50%"][place] == pytest.approx(np.mean(shared), abs=2e-3)
    assert result["previous"]["50%"][place] == pytest.approx(np.mean(shared), abs=2e-3)
    unions = [len(set.union(*run[at : at + 4])) for run in runs for at in range(len(run) - 3)]
    assert result["unions"]["50%"]["4"][place] == pytest.approx(np.mean(unions) / len(counts), abs=2e-3)
    assert "64" not in result["unions"]["50%"]  # windows have 32 tokens
    for at, precision in enumerate(("int3", "int4")):
        error = (direct.output(precision) - direct.output("int8")).square().sum(dim=1)
        expected = (error / direct.stream.square().sum(dim=1)).mean()
        assert kept.losses[place, at] == pytest.approx(float(expected), rel=1e-3)
    assert kept.losses[place, 2] == 0


def test_coactivation_is_a_multiple_of_chance(llama: SimpleNamespace) -> None:
    direct = Direct(llama.folder, 1)
    chosen = torch.zeros_like(direct.truth)
    chosen.scatter_(1, direct.truth.topk(round(0.5 * chosen.shape[1]), dim=1).indices, 1)
    chosen = chosen[:, llama.kept.arrays["paired"][1]]
    share = chosen.mean(dim=0)
    expected = (chosen.T @ chosen / len(chosen)) / (share[:, None] * share).clamp_min(1e-9)
    seen = (share[:, None] * share > 0).numpy()
    assert np.abs(llama.kept.arrays["coactivation"][1] - expected.numpy())[seen].max() < 0.1
    assert np.diagonal(llama.kept.arrays["coactivation"][1]).max() >= 1


def test_forecasts_add_up_the_errors_of_single_neurons(llama: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(llama.folder, folder)
    sums = collected(folder)
    direct, store = Direct(folder, 1), PlaneStore.open(folder)
    forecast = Forecast(sums, sizes_of(store.blocks()[0], store))
    recipe = Recipe("gate", 1, 1, (0.25, 0.25, 0.25))
    neurons = direct.truth.shape[1]
    high, middle, low = recipe.counts(neurons)
    order = (functional.silu(direct.inward("int3")[0]).abs() * direct.norms).argsort(dim=1, descending=True)
    lost = torch.zeros(len(order))
    for at in range(high, neurons):
        precision = "int4" if at < high + middle else "int3" if at < high + middle + low else "skip"
        n = order[:, at]
        made = torch.zeros(len(n), direct.x.shape[1])
        if precision != "skip":
            gate = direct.inward(precision)[0]
            made = (functional.silu(gate) * direct.inward(precision)[1]).gather(1, n[:, None]) * direct.weights[
                precision
            ][2][n]
        true = direct.hidden("int8").gather(1, n[:, None]) * direct.weights["int8"][2][n]
        lost += (made - true).square().sum(dim=1)
    expected = float((lost / direct.stream.square().sum(dim=1)).mean())
    assert forecast.losses(recipe)[1] == pytest.approx(expected, rel=0.02)
    assert forecast.losses(uniform(3, 2, 3)[0]).max() == 0


def collected(folder: Path) -> summing.Sums:
    """The sums of a calibration, which its journal has until its end."""
    kept: list[summing.Sums] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.Search, "settings", lambda self: kept.append(self.job.sums()) or stop())
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, TEXT, **SMALL)
    return kept[0]


def stop() -> None:
    raise KeyboardInterrupt


def test_a_setting_loses_what_was_measured(llama: SimpleNamespace) -> None:
    window = windows(llama.folder)[0]
    with opened(llama.folder) as model, model.tiercache.passes("exact"):
        exact = model(input_ids=window[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
    setting = llama.kept.choose(share=0.75, max_loss=None)
    with opened(llama.folder) as model:
        assert model.tiercache.mixed.plan.setting == setting
        with model.tiercache.every_token():
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        assert model.tiercache.mixed.read_bytes == setting.read_bytes
    assert setting.kl == pytest.approx(float((exact.exp() * (exact - logits)).sum(-1).mean()), rel=1e-4, abs=1e-9)
    assert setting.entropy == pytest.approx(float(-(logits.exp() * logits).sum(-1).mean()), rel=1e-5)
    nats = -logits.gather(-1, window[1:, None]).mean()
    assert setting.perplexity == pytest.approx(float(nats.exp()), rel=1e-5)
    exact_nats = -exact.gather(-1, window[1:, None]).mean()
    assert setting.exact_perplexity == pytest.approx(float(exact_nats.exp()), rel=1e-5)
    assert setting.top1 == pytest.approx(float((logits.argmax(-1) == exact.argmax(-1)).double().mean()))


def test_settings_stay_within_their_bytes_and_have_traces(llama: SimpleNamespace) -> None:
    store = PlaneStore.open(llama.folder)
    sizes = sizes_of(store.blocks()[0], store)
    tried = shares(sizes)
    assert {sizes.neuron(2) / sizes.neuron(3), *FEW} <= set(tried)
    layers, neurons = llama.kept.norms.shape
    assert {setting.rank for setting in llama.kept.settings} == {1, 2}
    for place, setting in enumerate(llama.kept.settings):
        assert setting.share in tried
        assert setting.read_bytes <= setting.share * layers * neurons * sizes.neuron(3)
        assert {recipe.rank for recipe in setting.recipes} == {setting.rank}
        for block, recipe in enumerate(setting.recipes):
            rows = llama.kept.arrays[f"trace/{place}/{block}"]
            assert (rows.dtype, rows.shape) == (np.uint16, (32, recipe.wanted(neurons)[setting.rank]))
            assert all(len(set(row)) == len(row) for row in rows.tolist())
    with opened(llama.folder) as model:  # and the engine can replay them
        plan = model.tiercache.mixed.plan
        assert plan.trace(plan.setting.rank).tokens == 32


def test_traces_are_of_tokens_that_follow_one_another_inside_the_text(llama: SimpleNamespace) -> None:
    neurons = llama.kept.norms.shape[1]
    setting = next(one for one in llama.kept.settings if one.recipes[0].wanted(neurons)[one.rank] > 0)
    each = [recipe.wanted(neurons)[setting.rank] for recipe in setting.recipes]
    texts = windows(llama.folder)
    with opened(llama.folder) as model:
        blocks = model.tiercache.mixed.blocks
        measurer = Measurer(model, texts, lambda: None)
        whole = [Measurer(model, [text], lambda: None).trace(setting.recipes, 32, 1 << 20) for text in texts]
        middle = measurer.trace(setting.recipes, 8, 1 << 20)
        two = measurer.trace(setting.recipes, 64, 2 * 32 * sum(each))
        least = measurer.trace(setting.recipes, 64, 0)
    for block in map(str, range(len(blocks))):
        assert np.array_equal(middle[block], whole[1][block][12:20])
        assert np.array_equal(two[block], np.concatenate([whole[0][block][8:24], whole[2][block][8:24]]))
        assert np.array_equal(least[block], whole[1][block][15:16])


def test_policies_are_compared_on_the_trace_of_half_the_bytes(llama: SimpleNamespace) -> None:
    found = llama.result["policies"]
    place, setting = next(
        (p, s) for p, s in enumerate(llama.kept.settings) if (s.share, s.rank) == (found["share"], found["rank"])
    )
    assert (setting.rank, found["tokens"]) == (1, 32)
    assert setting.share <= 0.5
    neurons = llama.kept.norms.shape[1]
    counts = [recipe.wanted(neurons)[1:] for recipe in setting.recipes]
    trace = Trace(neurons, counts, [llama.kept.arrays[f"trace/{place}/{block}"] for block in range(len(counts))])
    slots = [[round(0.4 * neurons) if count else 0 for count in block] for block in counts]
    rows = {row["policy"]: row for row in found["rows"]}
    for policy in ("lru", "hot", "belady"):
        expected = replay.replay(trace, slots, policy, None, hot=llama.kept.frequency)
        assert rows[policy]["hit_rate"] == expected.hit_rate
        assert rows[policy]["chance"] == pytest.approx(0.4, abs=0.01)
        assert rows[policy]["hit_rate"] <= rows[policy]["belady"] == rows["belady"]["hit_rate"]
    store = PlaneStore.open(llama.folder)
    sizes = sizes_of(store.blocks()[0], store)
    outcome = replay.replay(trace, slots, "lru", None, hot=llama.kept.frequency)
    missed = (outcome.requests - outcome.hits) @ np.array([3 * sizes.planes[1], 3 * sizes.planes[2]])
    assert rows["lru"]["missed_bytes_per_token"] == missed.sum() / 32
    text = report(llama.result)
    assert "Policies, on 32 tokens" in text
    assert "Belady's bound" in text
    assert "Policies" not in report({**llama.result, "policies": None})


def test_of_many_blocks_tables_tell_the_spread() -> None:
    values = [0.9, None, *(place / 10 for place in range(1, 8)), 0.1]
    assert tables._layers({"blocks": len(values)}) == ["least", "median", "most", "mean"]
    assert tables._with_mean(values) == ["0.100", "0.400", "0.900", "0.422"]
    assert tables._with_mean([None] * 9) == ["-"] * 4
    assert tables._with_mean(values[:3]) == ["0.900", "-", "0.100", "0.500"]


def test_sums_do_not_depend_on_how_many_tokens_are_worked_on_at_a_time(llama: SimpleNamespace, tmp_path: Path) -> None:
    found = []
    for size in (128, 7):
        folder = tmp_path / str(size)
        shutil.copytree(llama.folder, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collect, "_SLICE", size)
            patch.setattr(collect, "_ORDERED", 16)  # every other token
            found.append(collected(folder))
    assert found[0]["ordered"][0] < found[0]["tokens"][0]
    for name, values in found[0].items():
        assert np.allclose(values, found[1][name], rtol=1e-5, atol=1e-12), name


# ---------------------------------------------------------------- losses that are no numbers


@pytest.mark.parametrize("who", ["the model", "the reference"])
def test_logits_that_are_no_numbers_lose_no_number(who: str) -> None:
    logits = torch.randn(2, 5)
    broken = logits.clone()
    broken[1, 2] = math.nan
    score = Score()
    score.add(
        *((broken, torch.tensor([0, 1]), logits) if who == "the model" else (logits, torch.tensor([0, 1]), broken))
    )
    assert math.isnan(score.kl)
    assert math.isnan(score.entropy) == (who == "the model")
    masked = logits.clone()
    masked[:, 3] = -math.inf
    score = Score()
    score.add(masked, torch.tensor([0, 1]), masked)
    assert score.kl == 0
    assert math.isfinite(score.entropy)


@contextmanager
def logits_are_nan() -> Iterator[None]:
    add = Score.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Score, "add", lambda self, logits, *others: add(self, logits * math.nan, *others))
        yield


@contextmanager
def breaking(broken: Callable[[Measurer, Any], bool]) -> Iterator[None]:
    """Whose logits are NaN from here on."""
    true = Measurer.mixed

    def mixed(measurer: Measurer, recipes: Any, kept: Any, windows: int | None) -> Any:
        if not broken(measurer, recipes):
            return true(measurer, recipes, kept, windows)
        with logits_are_nan():
            return true(measurer, recipes, kept, windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurer, "mixed", mixed)
        yield


def test_halving_measures_much_on_little_text_and_little_on_much(
    llama: SimpleNamespace, tmp_path: Path, few: None
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(llama.folder, folder)
    asked: list[tuple[int | None, Any]] = []
    true = Measurer.mixed

    def mixed(measurer: Measurer, recipes: Any, kept: Any, windows: int | None) -> Any:
        asked.append((windows, recipes))
        return true(measurer, recipes, kept, windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurer, "mixed", mixed)
        patch.setattr(halving, "PIECE", 8)
        calibrate(folder, TEXT, **{**SMALL, "measure_tokens": 96})
    settings = Calibration.load(PlaneStore.open(folder)).settings
    exact = [uniform(precision, 2, 3) for precision in (1, 2, 3)]
    by_round = {pieces: [r for p, r in asked if p == pieces and r not in exact] for pieces in (1, 3, 9, 12)}
    assert len(by_round[1]) > 2 * len(by_round[3]) >= 2 * len(by_round[9])
    assert {one.recipes for one in settings} <= set(by_round[12]) | set(exact)
    assert len(by_round[12]) <= len(settings), "the whole text is for the winners alone"


def test_a_setting_that_breaks_the_model_is_never_chosen(llama: SimpleNamespace, tmp_path: Path, few: None) -> None:
    chosen = {one.recipes for one in llama.kept.settings}
    folder = tmp_path / "store"
    shutil.copytree(llama.folder, folder)
    low = uniform(1, 2, 3)
    with breaking(lambda measurer, recipes: recipes in chosen or recipes == low):
        result = calibrate(folder, TEXT, **SMALL)
    kept = Calibration.load(PlaneStore.open(folder))
    assert kept.settings
    assert not chosen & {one.recipes for one in kept.settings}
    assert all(math.isfinite(one.kl) for one in kept.settings)
    assert result["uniform"]["int3"]["kl"] is None
    json.dumps(result, allow_nan=False)
    assert "all at int3" in report(result)


def test_a_model_that_breaks_whatever_is_done_is_named(llama: SimpleNamespace, tmp_path: Path, few: None) -> None:
    folder = tmp_path / "store"
    shutil.copytree(llama.folder, folder)
    with breaking(lambda measurer, recipes: True), pytest.raises(StoreError, match=r"none of .* has a finite loss"):
        calibrate(folder, TEXT, **SMALL)
    with logits_are_nan(), pytest.raises(StoreError, match=r"exact model .* predicts what is no number"):
        calibrate(folder, TEXT, **SMALL, restart=True)


def test_the_report_is_json_and_tables(llama: SimpleNamespace) -> None:
    result = llama.result
    assert json.loads(json.dumps(result)) == result
    assert result["schema"] == "tiercache.calibration/1"
    assert len(result["predictor"]["50%"]) == 3
    assert result["ahead"]["50%"][-1] is None
    text = report(result)
    assert "the token before" in text
    assert "all at int4" in text
    lost = [result["uniform"][precision]["kl"] for precision in ("int8", "int4", "int3")]
    assert lost[0] < lost[1] < lost[2]  # of int8 the head's shortlist alone
    assert llama.kept.arrays["predictor/0/own/inward.weight"].shape == (4, 56)


def test_the_objective_may_be_the_entropy_alone(
    llama: SimpleNamespace, tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(llama.folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.Search, "_trace", lambda self, kept: stop())
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, TEXT, **{**SMALL, "show_progress": True}, objective="entropy")
    assert "the same command goes on from here" in capsys.readouterr().err
    calibrate(folder, TEXT, **SMALL, objective="entropy")
    by_loss = {(one.share, one.rank): one for one in llama.kept.settings}
    settings = Calibration.load(PlaneStore.open(folder)).settings
    assert len(settings) == len(by_loss)
    for one in settings:
        other = by_loss[one.share, one.rank]
        assert one.entropy <= other.entropy
        assert one.kl >= other.kl


# ---------------------------------------------------------------- other models, budgets, precisions


@pytest.mark.parametrize("name", ["opt", "phi3", "gpt2"])
def test_other_layouts(plane_store: Callable[..., Path], tmp_path: Path, few: None, name: str) -> None:
    folder = with_tokenizer(plane_store(name), tmp_path / "store")
    result = calibrate(folder, TEXT, **SMALL)
    kept = Calibration.load(PlaneStore.open(folder))
    assert set(result["recall"]) == ({"product", "inputs"} if name in ("opt", "gpt2") else set(result["recall"]))
    assert np.mean(result["recall"]["product"]["int4"]["50%"]) > 0.9
    assert (np.mean(result["zeros"]) > 0.2) == (name == "opt")  # ReLU
    assert all(setting.kl >= 0 for setting in kept.settings)
    assert (kept.losses[:, 0] > kept.losses[:, 1]).all()
    with tiercache.offload(folder, precision="int8", mode="mixed", bytes_per_token=0.5) as model:
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_budgets_too_small_for_the_model_change_nothing(
    plane_store: Callable[..., Path], tmp_path: Path, few: None
) -> None:
    folder = with_tokenizer(plane_store("llama"), tmp_path / "store")
    calibrate(folder, TEXT, **SMALL)
    whole = Calibration.load(PlaneStore.open(folder))
    with pytest.raises(DoesNotFitError) as refused:
        calibrate(folder, TEXT, **SMALL, dram=100_000)
    least = 100_000 + refused.value.missing_bytes
    held = []
    true = Job.opened

    @contextmanager
    def noted(*arguments: Any) -> Iterator[Any]:
        with true(*arguments) as model:
            held.append(bool(model.tiercache.plan.streamed))
            yield model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "opened", noted)
        calibrate(folder, TEXT, **SMALL, dram=least + 20_000, restart=True)
    assert held
    assert all(held), "the model was not streamed"
    assert same(Calibration.load(PlaneStore.open(folder)), whole)
    calibrate(folder, TEXT, **SMALL, hbm="64MiB")
    upper = Calibration.load(PlaneStore.open(folder))
    assert np.allclose(upper.losses, whole.losses, rtol=1e-4)
    assert [setting.share for setting in upper.settings] == [setting.share for setting in whole.settings]


def test_pico_ranks_well_and_loses_little(pico_store: Path, tmp_path: Path) -> None:
    store = shutil.copytree(pico_store, tmp_path / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trying, "SHARES", ())
        result = calibrate(
            store, TEXT, tokens=256, window=256, measure_tokens=256, precision="int4", show_progress=False
        )
    recall = result["recall"]["product"]
    assert np.mean(recall["int4"]["50%"]) >= 0.95
    assert np.mean(recall["int3"]["50%"]) >= 0.85
    assert np.mean(recall["int4"]["50%"]) > np.mean(recall["inputs" if "inputs" in recall else "int3"]["50%"])
    least = {(row["share"], row["rank"]): row["kl"] for row in result["settings"]}
    sizes = sizes_of(PlaneStore.open(store).blocks()[0], PlaneStore.open(store))
    at_int4 = min(kl for (share, _), kl in least.items() if share <= sizes.neuron(2) / sizes.neuron(3))
    assert at_int4 <= 0.75 * result["uniform"]["int4"]["kl"]
    for rank in (1, 2):
        share = (sizes.neuron(1) + 2 * sizes.row(rank)) / sizes.neuron(3)
        assert least[share, rank] <= 0.3 * result["uniform"]["int3"]["kl"]


# ---------------------------------------------------------------- refusals


def test_a_calibration_of_another_store_or_model_is_refused_by_name(
    llama: SimpleNamespace, plane_store: Callable[..., Path], tmp_path: Path
) -> None:
    for name, group, what in (("llama", 32, "another store of this model"), ("opt", 64, "another model .llama.")):
        folder = tmp_path / name
        shutil.copytree(plane_store(name, group), folder)
        for suffix in (".mdb", ".sha256"):
            shutil.copy(llama.folder / f"calibration{suffix}", folder)
        with pytest.raises(StoreError, match=f"{FILE} was calibrated for {what}.*calibrate again"):
            Calibration.load(PlaneStore.open(folder))
        with pytest.raises(StoreError, match="was calibrated for another"):
            tiercache.offload(folder, precision="int8", mode="mixed", bytes_per_token=0.5).__enter__()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there; name a text file"),
        (b" \n", "is empty; name a file with text"),
        (b"\xff\xfe\x00text" * 99, "no UTF-8 text"),
        (b"text\0" * 99, "no text but binary"),
        (b"a few words", "holds 11 tokens, and 32 are the least; name a longer text"),
    ],
)
def test_texts_that_teach_nothing_are_refused(
    llama: SimpleNamespace, tmp_path: Path, content: bytes | None, message: str
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    before = sorted(llama.folder.iterdir())
    with pytest.raises(UsageError, match=message):
        calibrate(llama.folder, text, **SMALL)
    assert sorted(llama.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 8}, "--tokens 8 is too few"),
        ({"window": 1}, "--window 1 is too few"),
        ({"window": 257}, "257 is longer than the model's 256 positions"),
        ({"measure_tokens": 0}, "--measure-tokens 0"),
        ({"context": 31}, "--context 31 is too few; give 32 or more"),
        ({"predictor_rank": 0}, "--predictor-rank 0"),
        ({"predictor_rank": 10**6}, "takes .* of weights; give .* or less"),
        ({"precision": "int3"}, "'int3'.*int8 or int4"),
        ({"objective": "luck"}, "choose one of loss, entropy"),
    ],
)
def test_numbers_that_cannot_be_meant(llama: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(llama.folder, TEXT, **{**SMALL, **options}, restart=True)


def test_an_unfinished_run_is_gone_on_with_by_the_same_command_alone(
    llama: SimpleNamespace, plane_store: Callable[..., Path], tmp_path: Path, few: None
) -> None:
    folder = with_tokenizer(plane_store("llama"), tmp_path / "store")
    collected(folder)
    assert (folder / PARTIAL_FILE).is_file()
    with pytest.raises(UsageError, match=r"begun with window 32 \(now 16\).*--restart"):
        calibrate(folder, TEXT, **{**SMALL, "window": 16})
    other = tmp_path / "other.txt"
    other.write_text("other words than before " * 99)
    with pytest.raises(UsageError, match=r"begun with text .*--restart"):
        calibrate(folder, other, **SMALL)
    foreign = with_tokenizer(plane_store("opt"), tmp_path / "foreign")
    shutil.copy(folder / PARTIAL_FILE, foreign)
    with pytest.raises(UsageError, match=r"another store than the one it lies in.*--restart"):
        calibrate(foreign, TEXT, **SMALL)
    with locked(folder, None), pytest.raises(UsageError, match="another calibration is writing"):
        calibrate(folder, TEXT, **SMALL)
    calibrate(folder, TEXT, **{**SMALL, "predictor_rank": 4}, restart=True)
    assert same(Calibration.load(PlaneStore.open(folder)), llama.kept)
    assert not (folder / PARTIAL_FILE).exists()


def test_a_damaged_journal_is_named_with_the_way_out(plane_store: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_tokenizer(plane_store("llama"), tmp_path / "store")
    (folder / PARTIAL_FILE).write_bytes(b"no journal" * 1000)
    with pytest.raises(StoreError, match=rf"{PARTIAL_FILE} is damaged.*--restart"):
        calibrate(folder, TEXT, **SMALL)
    (folder / PARTIAL_FILE).unlink()
    collected(folder)
    with lmdb.open(str(folder / PARTIAL_FILE), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"chunks", b"x" * 40)
    with pytest.raises(StoreError, match=r"damaged \(checksum of chunks\).*--restart"):
        calibrate(folder, TEXT, **SMALL)


@pytest.mark.parametrize(("name", "message"), [("Read-only file system", "make the store writable")])
def test_a_store_that_cannot_be_written(
    llama: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise lmdb.Error(f"{arguments[0]}: {name}")

    true = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda path, **how: (true if how["readonly"] else refuse)(path, **how))
    with pytest.raises(EnvironmentUnsupportedError, match=message):
        calibrate(llama.folder, TEXT, **SMALL)


def test_a_full_disk_keeps_what_is_done(
    plane_store: Callable[..., Path], tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_tokenizer(plane_store("llama"), tmp_path / "store")
    true, steps = journals.Journal.put, []

    def fill(journal: journals.Journal, **given: Any) -> None:
        steps.append(given)
        with monkeypatch.context() as patch:
            if len(steps) == 3:
                patch.setattr(catalog, "sealed", refuse)
            true(journal, **given)

    def refuse(*arguments: Any) -> bytes:
        raise lmdb.Error("mdb_put: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "put", fill)
        with pytest.raises(EnvironmentUnsupportedError, match=r"is full; what is done is kept.*same command"):
            calibrate(folder, TEXT, **SMALL)
    assert not (folder / FILE).exists()
    monkeypatch.setattr(journals.Journal, "put", lambda journal, **given: steps.append(given) or true(journal, **given))
    calibrate(folder, TEXT, **SMALL)
    assert [given["plain"]["chunks"] for given in steps if "chunks" in given.get("plain", {})] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    "error",
    [BlockingIOError("of another"), OSError(errno.ENOSPC, "another disk"), PermissionError(errno.EACCES, "of another")],
)
def test_errors_of_the_work_itself_are_not_the_journals(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(type(error)) as raised, journals.journal(tmp_path, {}, restart=False):
        raise error
    assert raised.value is error
    foreign = StoreError("another catalogue is damaged")
    foreign.__cause__ = lmdb.Error("of another")
    with pytest.raises(StoreError) as kept, journals.journal(tmp_path, {}, restart=False):
        raise foreign
    assert kept.value is foreign


def test_room_names_its_own_way_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with (
        pytest.raises(EnvironmentUnsupportedError, match=r"70 bytes are missing; give fewer --measure-tokens"),
        measuring.kept_logits(tmp_path / "scratch", 80, "give fewer --measure-tokens"),
    ):
        pass


def test_a_run_that_was_begun_on_another_device_is_told(
    plane_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_tokenizer(plane_store("llama"), tmp_path / "store")
    collected(folder)
    monkeypatch.setattr(command, "resolve_device", lambda name: torch.device("meta"))
    with pytest.raises(UsageError, match=r"begun with device cpu \(now meta\).*--restart"):
        calibrate(folder, TEXT, **SMALL)
