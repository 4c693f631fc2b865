"""The benchmarks of drafters on a toy: their schema, who is compared with whom and when, that texts are checked."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cgroup import writable_cgroup  # noqa: F401 - a fixture
from test_cli import call, data, refused, save_model, save_tokenizer

from benchmarks import drafters as contests
from benchmarks import drafters_capped
from benchmarks.drafters import Place
from benchmarks.drafters_capped import CappedSetting, Visit
from benchmarks.larger_model import Size
from tiercache.bench import drafters, drafters_report
from tiercache.bench.drafters_options import Options
from tiercache.bench.drafters_rows import NEAR_TIE, DrafterRow, Judge, Turn, rate
from tiercache.bench.drafting_prompts import Prompts
from tiercache.bench.timed_generation import PLAIN, Cell, Entry, ModelSetting, Sample
from tiercache.commands import old_bench
from tiercache.commands.bench import arguments
from tiercache.errors import TiercacheError, UsageError
from tiercache.store.convert import convert

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = ["drafter", "grower", "temperature", "nodes", "tokens_per_pass", "tokens_per_s", "plain_tokens_per_s", "setting"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafters") / "toy"
    save_model(folder, layers=2)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("planes")
    convert(checkpoint, folder, compress="off")
    return folder


@pytest.fixture(scope="module")
def options(store: Path) -> Options:
    """Two texts of each temperature, small."""
    sizes: dict[str, Any] = {"prompts": 1, "prompt_tokens": 24, "tokens": 10, "seeds": (3, 4)}
    return Options(models=(store,), **sizes, drafters=("suffix",), nodes=(4,), show_progress=False)


def test_a_table(options: Options) -> None:
    wanted = replace(options, drafters=("suffix", "resident", "auto"), nodes=(4, None), hbm="6MB", link_gbps=2.0)
    result = json.loads(json.dumps(contests.bench(wanted, Place())))
    assert result["schema"] == "tiercache.drafters/1"
    assert [list(row) for row in result["rows"]] == [KEYS] * 12
    ways = [("none", 0), ("suffix", 4), ("suffix", "auto"), ("resident", 4), ("resident", "auto"), ("auto", "auto")]
    found = [(row["temperature"], row["drafter"], row["nodes"]) for row in result["rows"]]
    assert found == [(temperature, *way) for temperature in (0.8, 0.0) for way in ways]
    assert {row["setting"] for row in result["rows"]} == {
        f"{_name(options)} int8, hbm=6MB, dram=auto, link 2 GB/s emulated"
    }
    assert all(row["tokens_per_s"] > 0 < row["plain_tokens_per_s"] for row in result["rows"])

    for row, more in zip(result["rows"], result["details"], strict=True):
        assert more["tokens"] == 2 * 9  # of the first token nobody knows the seconds
        assert more["plain_tokens"] == 3 * 9  # before, between and after
        assert more["speed_up"] == pytest.approx(row["tokens_per_s"] / row["plain_tokens_per_s"])
        assert more["texts_that_differ"] == 0
        greedy, first = row["temperature"] == 0, row["drafter"] == "none"
        assert more["texts_checked"] == 2 * (not first) + 3 * greedy  # each, and plain ones
        assert row["tokens_per_pass"] == 1 if first else row["tokens_per_pass"] >= 1
        assert more["nodes_per_pass"] <= (64 if row["nodes"] == "auto" else 4)
    resident = next(row for row in result["rows"] if (row["drafter"], row["nodes"]) == ("resident", 4))
    assert resident["tokens_per_pass"] > 1.2  # planes of a toy guess what all of it says

    assert [duel["temperature"] for duel in result["auto"]] == [0.8, 0.0]
    assert all(duel["ratio"] > 0 and duel["best"]["drafter"] in ("suffix", "resident") for duel in result["auto"])
    text = contests.report(result)
    assert text.count("resident") >= 4
    assert "of the best row" in text
    assert result["models"][0]["exact"]


def _name(options: Options) -> str:
    return "/".join(options.models[0].parts[-2:])


def test_under_a_cap_plain_runs_lie_around_each_row(options: Options) -> None:
    seen: list[tuple[str, int, int]] = []

    def visit(setting: CappedSetting, entry: Entry, cells: Sequence[Cell], warm: Cell, tokens: int) -> Visit:
        seen.append((entry.drafter, len(cells), tokens))
        return drafters_capped.measure(setting, entry, cells, warm, tokens)

    wanted = replace(options, drafters=("ngram", "auto"), nodes=(None,), plain_tokens=5, temperatures=(0.0,))
    result = contests.bench(wanted, Place(cap_bytes=1 << 40, visit=visit))
    plain = ("plain", 2, 5)
    assert seen == [plain, ("ngram", 2, 10), plain, ("auto", 2, 10), plain]
    assert [(row["drafter"], row["nodes"]) for row in result["rows"]] == [("ngram", "auto"), ("auto", "auto")]
    assert [more["plain_tokens"] for more in result["details"]] == [2 * 2 * 4] * 2
    assert [more["texts_checked"] for more in result["details"]] == [2 + 2, 2 + 2]
    assert "cap 1.0 TiB" in result["rows"][0]["setting"]


@pytest.mark.cgroup
@pytest.mark.usefixtures("writable_cgroup")
def test_a_process_under_a_cap(store: Path) -> None:
    setting = CappedSetting(name="toy", store=str(store), context=64, cap_bytes=800 << 20)
    cell, entry = Cell(prompt=(5, 6, 7, 5, 6), temperature=0.8, seed=1), Entry(drafter="ngram", nodes=4)
    found = drafters_capped.visit(setting, entry, [cell], replace(cell, seed=2), 12)
    here = drafters_capped.measure(replace(setting, cap_bytes=None), entry, [cell], replace(cell, seed=2), 12)
    assert [sample.text for sample in found.samples] == [sample.text for sample in here.samples]
    assert 100 << 20 < found.peak_bytes <= 800 << 20
    assert found.exact


def test_a_process_that_cannot_ends_with_its_code(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = {"setting": {"name": "toy", "store": str(store)}, "entry": {"drafter": "nobody"}, "cells": [], "tokens": 4}
    warm = {"prompt": [5], "temperature": 0.0, "seed": 0}
    with pytest.raises(SystemExit) as ended:
        drafters_capped.main(json.dumps({**case, "warm": warm}))
    assert ended.value.code == 2
    assert "nobody" in capsys.readouterr().err


def test_what_does_not_fit_is_left_out_and_said(options: Options) -> None:
    tight = replace(options, drafters=("resident", "suffix"), nodes=(2, 256), temperatures=(0.0,), hbm="3600KB")
    result = drafters.bench(tight)
    assert {(way["drafter"], way["nodes"]) for way in result["left_out"]} == {("resident", 256), ("suffix", 256)}
    assert [(row["drafter"], row["nodes"]) for row in result["rows"]] == [("none", 0), ("resident", 2), ("suffix", 2)]
    assert "left out: resident (best-first) with 256 nodes at temperature 0" in drafters_report.report(result)


def test_a_wider_model_says_so(options: Options, checkpoint: Path, tmp_path: Path) -> None:
    wanted = replace(options, models=(checkpoint,), seeds=(0,), temperatures=(0.0,))
    result = contests.bench(wanted, Place(widen=Size(256, 256, 3), folder=tmp_path))
    assert "widened to 256x256x3" in result["rows"][0]["setting"]
    assert "changes nothing that the model says" in contests.report(result)
    assert result["models"][0]["model"] == str(checkpoint)
    assert result["models"][0]["store"].startswith(str(tmp_path))


def _sample(*text: int, seconds: float = 1.0) -> Sample:
    return Sample(text=text, first_s=0.1, seconds=seconds, passes=2)


def test_the_judge() -> None:
    greedy, drawn = (Cell(prompt=(1, 2), temperature=temperature, seed=0) for temperature in (0.0, 0.8))
    plain, own = Entry(drafter=PLAIN), Entry(drafter="suffix")
    gaps = iter((NEAR_TIE, 2 * NEAR_TIE))
    asked: list[tuple[int, ...]] = []

    def gap(cell: Cell, text: tuple[int, ...]) -> float:
        asked.append(text)
        return next(gaps)

    judge, row = Judge(gap=gap), DrafterRow(ModelSetting(name="toy", store=""), own, 0.0)

    def counted() -> tuple[int, int, int, int]:
        return row.checked, row.differ, row.near_ties, row.no_ties

    judge.judge(row, plain, greedy, _sample(5, 6, 7), 3)
    judge.judge(row, own, greedy, _sample(5, 6, 7, 8), 4)  # more of the same
    assert counted() == (1, 0, 0, 0)
    judge.judge(row, own, greedy, _sample(5, 6, 7, 9), 4)
    judge.judge(row, own, greedy, _sample(5), 4)  # ended too early
    assert counted() == (3, 2, 1, 1)
    assert asked == [(5, 6, 7), (5,)]
    judge.judge(row, own, drawn, _sample(1, 2), 2)
    judge.judge(row, plain, drawn, _sample(3, 4), 2)  # transformers' own loop draws otherwise
    judge.judge(row, Entry(drafter="resident", grower="rsd-c"), drawn, _sample(3, 4), 2)
    assert row.checked == 3
    judge.judge(row, own, drawn, _sample(1, 3), 2)
    assert (row.differ, row.near_ties + row.no_ties) == (3, 2)
    judge.exact = True
    with pytest.raises(TiercacheError, match=r"suffix at temperature 0\.8, seed 0, wrote another text .* token 1 on"):
        judge.judge(row, own, drawn, _sample(1, 3), 2)


def test_speeds_are_all_tokens_over_all_seconds() -> None:
    assert rate([_sample(1, 2, 3, seconds=1.0), _sample(1, 2, seconds=2.0)]) == pytest.approx(3 / 3)
    assert rate([_sample(1)]) == 0
    assert Turn([_sample(1, 2, seconds=2.0)], [_sample(1, 2, 3)]).speed_up == pytest.approx(4)
    assert Turn([_sample(1)], [_sample(1, 2)]).speed_up == 0


def test_no_prompt_comes_twice(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{number:04d} " for number in range(60)), encoding="utf-8")  # 300 tokens
    found = Prompts.read(checkpoint, file, 30, 10)
    assert len(set(found.ids)) == 30
    assert {len(ids) for ids in found.ids} == {10}
    assert len(set(Prompts.read(checkpoint, file, 7, 10).ids)) == 7
    assert len(set(Prompts.read(checkpoint, None, 10, 64).ids)) == 10
    with pytest.raises(UsageError, match="holds 30 prompts of 10 tokens, 31 are needed"):
        Prompts.read(checkpoint, file, 31, 10)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        Prompts.read(checkpoint, file, 1, 10)
    with pytest.raises(UsageError, match="a folder"):
        Prompts.read(checkpoint, tmp_path, 1, 10)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"drafters": ("nobody",)}, "neither a drafter nor"),
        ({"growers": ("tall",)}, "unknown grower 'tall'"),
        ({"nodes": (0,)}, "trees of 0 nodes"),
        ({"tokens": 1}, "write 2 at least"),
        ({"plain_tokens": 1}, "write 2 at least"),
        ({"temperatures": (-1.0,)}, "temperature of -1"),
        ({"prompts": 0}, "0 prompts measure nothing"),
        ({"drafters": ("auto",), "nodes": (4,)}, "add auto to the nodes"),
        ({"nodes": ()}, "0 sizes of trees"),
    ],
)
def test_options_that_measure_nothing_are_refused(options: Options, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        replace(options, **wrong)


def test_lists() -> None:
    plain: dict[str, Any] = {"as_json": False, "quiet": False, "seed": 3, "hbm": None}
    lists = {"nodes": "4, auto", "seeds": "1", "temperatures": "0.5,0", "drafters": None, "growers": "rsd-c"}
    assert arguments(plain | lists) == {
        "show_progress": None,
        "seed": 3,
        "nodes": (4, None),
        "seeds": (1,),
        "temperatures": (0.5, 0.0),
        "growers": ("rsd-c",),
    }
    for wrong in ({"seeds": "x"}, {"nodes": "1.5"}, {"drafters": ","}, {"token_counts": "1,many"}):
        with pytest.raises(UsageError, match="list of"):
            arguments(plain | wrong)


def test_drawn_trees_are_for_drafters_with_a_model(options: Options) -> None:
    wanted = replace(options, drafters=("suffix", "resident", "auto"), growers=("best-first", "rsd-c"), nodes=(4, None))
    ways = [(entry.drafter, entry.grower, entry.nodes) for entry in wanted.entries()]
    assert ways == [
        *(("suffix", "own", nodes) for nodes in (4, None)),
        *(("resident", grower, nodes) for grower in ("best-first", "rsd-c") for nodes in (4, None)),
        ("auto", "best-first", None),
    ]


def test_the_budgeter_is_bound_as_a_user_s_is_whatever_sizes_stand_beside_it(options: Options) -> None:
    for nodes, most in (((16, None), 64), ((None,), 64), ((256, None), 256)):
        assert {entry.most for entry in replace(options, nodes=nodes).entries()} == {most}


def test_the_command(store: Path) -> None:
    sizes = ("--prompts", 1, "--seeds", 0, "--temperatures", 0, "--prompt-tokens", 8, "--tokens", 4)
    lookup = ("--model", store, *sizes, "--drafter-names", "lookup", "--draft-nodes", 2)
    result = call("bench", "drafters", *lookup)
    assert [row["drafter"] for row in data(result)["rows"]] == ["none", "lookup"]
    assert "texts that differ" in result.stderr
    assert "two benchmarks" in refused(call("bench", "--drafters", "--kernels", "--json"), 2, "UsageError")
    for foreign in (("drafters", "--shape", "tiny"), ("model", "--seeds", "1"), ("kernels", "--hbm", "1GB")):
        assert data(call("bench", *foreign, "--json"))["error"] == "NoSuchOption"


def test_options_that_moved_are_handed_to_the_benchmarks(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--prompts", 1, "--seeds", 0, "--temperatures", 0, "--prompt-tokens", 8, "--tokens", 4)
    lookup = ("--model", store, *sizes, "--drafter-names", "lookup", "--draft-nodes", 2, "--folder", tmp_path)
    for spelling in (("drafters", *lookup), (*lookup, "--drafters")):
        moved = call("bench", *spelling)
        assert [row["drafter"] for row in data(moved)["rows"]] == ["none", "lookup"]
        assert "deprecated; write: python -m benchmarks.drafters --model" in moved.stderr
    for bad, says in ((("--cap", "auto"), "no size"), (("--widen=3x4",), "HIDDENxNEURONSxLAYERS")):
        assert says in refused(call("bench", "drafters", *bad, "--json"), 2, "UsageError")
    assert data(call("bench", "drafters", "--folder", tmp_path, "--shape", "tiny", "--json"))["error"] == "NoSuchOption"
    monkeypatch.setattr(old_bench, "CHECKOUT", tmp_path)
    refusal = refused(call("bench", "drafters", "--cap", "1GiB", "--json"), 5, "EnvironmentUnsupportedError")
    assert "python -m benchmarks.drafters" in refusal
    assert "--cap" not in call("bench", "drafters", "--help").output


def test_under_a_cap_three_drafters_choose_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Options, Place]] = []

    def bench(options: Options, place: Place) -> dict[str, Any]:
        asked.append((options, place))
        raise TiercacheError("enough")

    monkeypatch.setattr(contests, "bench", bench)
    for names in ((), ("--drafter-names", "suffix", "--draft-nodes", "4")):
        with pytest.raises(TiercacheError, match="enough"):
            contests.run(["--cap", "1GiB", *names])
    assert [(options.drafters, options.nodes) for options, _ in asked] == [
        (("ngram", "resident", "auto"), (None,)),
        (("suffix",), (4,)),
    ]
    assert {place.cap_bytes for _, place in asked} == {1 << 30}


def test_what_an_entry_asks_for() -> None:
    assert Entry(drafter=PLAIN).options() is None
    fixed, free = (Entry(drafter="resident", nodes=nodes, most=32).options() for nodes in (4, None))
    assert fixed is not None
    assert free is not None
    assert (fixed.nodes, fixed.depth, fixed.width, fixed.fixed) == (4, 4, 4, True)
    assert (free.nodes, free.depth, free.width, free.fixed) == (32, 16, 8, False)
    drawn = Entry(drafter="resident", grower="rsd-s", nodes=4).options()
    assert drawn is not None
    assert (drawn.grower, drawn.verify) == ("rsd-s", "rejection")
