"""`quality` against direct computation: real tiny models, real files, and nothing left behind."""

import json
import math
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

import tiercache
from tiercache import text as texts
from tiercache.errors import EnvironmentUnsupportedError, StoreError, TiercacheError, UsageError
from tiercache.quality import command, measure, modes, report
from tiercache.quality.command import quality
from tiercache.stats.neurons import NeuronStats

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
TEXT = Path(__file__)
TOKENS, WINDOW = 300, 128

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(pico_store: Path) -> Path:
    return pico_store


@pytest.fixture(scope="module")
def result(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(store, tmp_path_factory.mktemp("scratch"), modes=["int8,int4", "int3"], decode=4)


def run(model: Path, scratch: Path, **options: Any) -> dict[str, Any]:
    given = {"tokens": TOKENS, "window": WINDOW, "decode": 0, "scratch": scratch, "show_progress": False}
    return quality(model, TEXT, **{**given, **options})


def windows() -> list[torch.Tensor]:
    return texts.read(TEXT, texts.load_tokenizer(PICO), tokens=TOKENS, vocabulary=2048).windows(WINDOW)


def held_files(folder: Path) -> list[str]:
    """What lies in a folder, named or not."""
    links = []
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - closed while it is read
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
        except OSError:
            continue
    return [*map(str, folder.iterdir()), *(link for link in links if link.startswith(str(folder)))]


def logits_of(store: Path, precision: Any) -> list[torch.Tensor]:
    with tiercache.offload(store, precision=precision, context=256, logits=256) as model, torch.inference_mode():
        return [model(window[None]).logits[0, :-1] for window in windows()]


def test_shape_of_the_result(result: dict[str, Any]) -> None:
    assert result["schema"] == "tiercache.quality/1"
    assert result["reference"] == "int8"
    assert result["text"]["tokens"] == TOKENS == result["predicted"]  # pico's tokenizer begins with a bos
    assert len(result["text"]["sha256"]) == 64
    assert [row["mode"] for row in result["rows"]] == ["int8", "int4", "int3"]
    keys = {"mode", "bytes_per_token", "perplexity", "kl", "top1", "tokens_per_s", "hit_rate", "chance", "belady"}
    for row in result["rows"]:
        assert keys <= row.keys()
        assert row["tokens_per_s"] > 0
        assert row["hit_rate"] is None
    assert json.loads(json.dumps(result)) == result
    assert [row["bytes_per_token"] for row in result["rows"]] == [5_607_424, 3_248_128, 2_658_304]
    eight, four, two = result["rows"]
    assert (eight["kl"], eight["top1"], eight["reference"]) == (0, 1, True)
    assert 0 < four["kl"] < two["kl"]
    assert 1 > four["top1"] > two["top1"]
    told = report.report(result)
    assert all(row["mode"] in told for row in result["rows"])


def test_perplexity_is_transformers_own(tmp_path: Path) -> None:
    (row,) = run(PICO, tmp_path, modes=["source"], reference="source")["rows"]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(PICO)
    total = count = 0.0
    with torch.inference_mode():
        for window in windows():
            logits = model(window[None]).logits[0, :-1].double()
            total += float(functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    assert row["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-9)


def test_distance_is_the_slow_computation(store: Path, result: dict[str, Any]) -> None:
    kl = same = count = 0.0
    for exact, rounded in zip(logits_of(store, "int8"), logits_of(store, "int4"), strict=True):
        for one, other in zip(exact.double(), rounded.double(), strict=True):
            p, q = one.softmax(-1), other.softmax(-1)
            kl += float((p * (p / q).log()).sum())
            same += int(one.argmax()) == int(other.argmax())
            count += 1
    row = result["rows"][1]
    assert row["kl"] == pytest.approx(kl / count, rel=1e-6)
    assert row["top1"] == same / count


def test_the_same_mode_again_is_no_distance_away(store: Path, tmp_path: Path) -> None:
    inputs = measure.batches(windows(), 2)
    assert [tuple(batch.shape) for batch in inputs] == [(2, WINDOW), (1, 47)]
    with measure.kept_logits(tmp_path, 1 << 20) as kept:
        for first in (True, False):
            with tiercache.offload(store, precision="int3", context=512, logits=512) as model:
                compared = {"keep": kept} if first else {"reference": kept}
                score = measure.score(model, inputs, **compared)
    assert (score.kl, score.same, score.tokens) == (0, TOKENS, TOKENS)


def test_batches_change_nothing(store: Path, tmp_path: Path, result: dict[str, Any]) -> None:
    together = run(store, tmp_path, modes=["int4"], batch=2)["rows"][1]
    for name in ("perplexity", "kl", "top1"):
        assert together[name] == pytest.approx(result["rows"][1][name], rel=0.02)


def test_extremes_of_a_score() -> None:
    score = measure.Score()
    logits = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    score.add(logits, torch.tensor([0, 1]), logits)
    assert (score.kl, score.same) == (0, 2)
    assert score.to_dict() == {"loss": None, "perplexity": None, "kl": 0, "top1": 1}  # the impossible happened


def test_nothing_is_left_behind(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def look(model: Any, prompt: Any, tokens: int) -> float:
        seen.append(len(held_files(tmp_path)))
        if len(seen) > 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(measure, "decoding_speed", look)
    run(store, tmp_path, modes=["int3"])
    assert seen == [1, 1]  # the logits, without a name
    assert held_files(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        run(store, tmp_path, modes=["int3"])
    assert held_files(tmp_path) == []


def test_too_little_disk(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    missing = TOKENS * 2048 * 2 - 1000  # pico is bf16
    with pytest.raises(EnvironmentUnsupportedError, match=f"{missing} bytes are missing"):
        run(store, tmp_path, modes=["int3"])
    run(store, tmp_path, modes=["int8"])  # nothing to compare, nothing to keep


def test_scratch_that_cannot_be_used(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnsupportedError, match="--scratch"):
        run(store, tmp_path / "file", modes=["int3"])


def test_mixed_modes_are_asked_of_the_engine(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, entered = [], []
    real = tiercache.offload

    @contextmanager
    def stand_in(model: Any, *, mode: str = "exact", bytes_per_token: Any = None, max_loss: Any = None, **others: Any):
        asked.append((mode, bytes_per_token, max_loss, others["precision"]))
        with real(model, **others) as offloaded:
            attached: Any = offloaded.tiercache
            if mode == "mixed":
                attached.every_token = lambda: entered.append(mode) or nullcontext()
                attached.recording = nullcontext
                attached.mixed = SimpleNamespace(read_bytes=800)
                attached.pass_bytes = lambda: {"needed": 1000, "ssd": 0}
                attached.stats().neurons = NeuronStats(
                    tokens=3, read_bytes=900, requests=4, hits=2, chance_hits=1.0, belady_hits=3, belady_requests=4
                )
            yield offloaded

    monkeypatch.setattr(tiercache, "offload", stand_in)
    monkeypatch.setattr(command, "_check_stores", lambda folder, modes, store: None)
    rows = run(store, tmp_path, modes=["mixed:0.5/int4", "mixed:<=0.01"])["rows"]
    assert asked == [("exact", None, None, "int8"), ("mixed", 0.5, None, "int4"), ("mixed", None, 0.01, "int8")]
    assert entered == ["mixed"] * 2 * len(windows())
    assert [row["hit_rate"] for row in rows] == [None, 0.5, 0.5]
    assert [row["bytes_per_token"] for row in rows[1:]] == [500, 500]
    assert rows[1]["neurons"]["lift"] == 2
    assert "chance 0.250, Belady 0.750" in report.line(rows[1])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("source", {"precision": "source"}),
        (" int3 ", {"precision": "int3"}),
        ("mixed:0.5", {"mode": "mixed", "bytes_per_token": 0.5, "max_loss": None, "precision": "int8"}),
        ("mixed:50%/int4", {"mode": "mixed", "bytes_per_token": 0.5, "max_loss": None, "precision": "int4"}),
        ("mixed:1.2GB", {"mode": "mixed", "bytes_per_token": "1.2GB", "max_loss": None, "precision": "int8"}),
        ("mixed:<= 0.01/int3", {"mode": "mixed", "bytes_per_token": None, "max_loss": 0.01, "precision": "int3"}),
    ],
)
def test_modes(text: str, options: dict[str, Any]) -> None:
    assert modes.parse(text).options() == options


@pytest.mark.parametrize(
    "text",
    [
        *("", "int2", "INT8 ", "mixed", "mixed:", "mixed:/int4", "mixed:auto", "mixed:1.5", "mixed:0", "exact:0.5"),
        *("mixed:0.5/source", "mixed:0.5/", "mixed:<=", "mixed:<=0", "mixed:<=nan", "mixed:<=inf", "mixed:5XB"),
    ],
)
def test_modes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"mixed:0\.5"):
        modes.parse(text)


def test_lists_of_modes() -> None:
    assert [mode.name for mode in modes.parse_all(["int8, int4", "int8", "mixed:0.5"])] == ["int8", "int4", "mixed:0.5"]
    with pytest.raises(UsageError, match="no mode"):
        modes.parse_all([" , "])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not there"), (b"", "empty"), (b" \n", "empty"), (b"a\0b", "binary"), (b"\xff\xfea", "UTF-8"), (b"a", "2")],
)
def test_texts_that_are_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        texts.read(file, texts.load_tokenizer(PICO), tokens=100, vocabulary=2048)


def test_a_folder_and_a_foreign_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder"):
        texts.read(tmp_path, texts.load_tokenizer(PICO), tokens=100, vocabulary=2048)
    with pytest.raises(StoreError, match="another model"):
        texts.read(TEXT, texts.load_tokenizer(PICO), tokens=100, vocabulary=131)
    with pytest.raises(StoreError, match="tokenizer"):
        texts.load_tokenizer(tmp_path)


def test_windows_hold_each_token_once() -> None:
    tokenizer = texts.load_tokenizer(PICO)
    read = texts.read(TEXT, tokenizer, tokens=TOKENS, vocabulary=2048)
    assert read.bos == tokenizer.bos_token_id
    cut = read.windows(WINDOW)
    assert [len(window) for window in cut] == [128, 128, 46 + 1]
    assert torch.equal(torch.cat([window[1:] for window in cut]), read.ids)
    assert {int(window[0]) for window in cut} == {read.bos}
    whole = tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    assert read.ids.tolist() == whole[1 : TOKENS + 1]
    bare = texts.Text(TEXT, "", TOKENS, torch.arange(129), None)
    assert [window.tolist() for window in bare.windows(WINDOW)] == [list(range(128))]  # one token alone predicts none


def test_a_text_shorter_than_asked_is_said(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text"
    file.write_text("def read_lines(path):\n    return path\n")
    options: dict[str, Any] = {"decode": 0, "scratch": tmp_path, "show_progress": True}
    found = quality(store, file, modes=["int8"], **options)
    assert found["text"]["tokens"] < found["text"]["asked"] == 8192
    assert "fewer than the 8192" in capsys.readouterr().err
    assert "all it holds" in report.report(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 513}, "512 positions"),
        ({"window": 1}, "--window"),
        ({"tokens": 1}, "--tokens"),
        ({"batch": 0}, "--batch"),
        ({"decode": 2}, "--decode"),
        ({"decode": 500}, "positions"),
        ({"limit": 3}, "--tasks"),
        ({"modes": ["int5"]}, "unknown mode"),
        ({"modes": ["source"]}, "plane store"),
        ({"reference": "source"}, "plane store"),
        ({"reference": "int4"}, "reference"),
        ({"modes": ["mixed:0.5"]}, "tiercache calibrate"),
        ({"plot": Path("picture.jpg")}, "png"),
        ({"plot": Path("/nowhere/at/all.png")}, "no folder"),
    ],
)
def test_numbers_that_cannot_be_meant(options: dict[str, Any], message: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(store, tmp_path, **options)


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_plots(name: str, result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mixed = {**result["rows"][2], "mode": "mixed:0.5", "kl": 0.01, "tokens_per_s": None, "hit_rate": 0.5}
    report.check_plot(tmp_path / name)
    report.plot({**result, "rows": [*result["rows"], mixed]}, tmp_path / name)
    start = (tmp_path / name).read_bytes()[:5]
    assert start in (b"\x89PNG\r", b"<?xml")
    assert "matplotlib.pyplot" not in sys.modules


def test_front() -> None:
    rows = [{"bytes_per_token": size, "kl": kl} for size, kl in ((3, 0.1), (1, 1.0), (2, 2.0), (3, 0.2), (4, None))]
    assert [row["bytes_per_token"] for row in report.front(rows)] == [1, 3]
    assert report.front(rows)[1]["kl"] == 0.1


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the optional packages are not installed."""
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("options", "line"),
    [({"plot": Path("plot.png")}, "pip install 'matplotlib"), ({"tasks": Path()}, "pip install 'lm-eval")],
)
def test_missing_packages(options: dict[str, Any], line: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnsupportedError, match=line) as caught:
        run(store, tmp_path, **options)
    assert isinstance(caught.value, TiercacheError)
