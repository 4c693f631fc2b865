"""Where the milliseconds of a token go: sums that are the pass, what binds next, and files of earlier commands."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tiercache
from policies.plan import Plan, PlanInputs, fill_tiers
from profiler.cost_model import Drafting, pass_time, upgrades
from profiler.explanation import KV_CACHE, busy_by_kind, exposed_s, kind_of
from profiler.figure import Figure
from profiler.hardware import Hardware, catalogue
from profiler.read_rates import ReadRate
from profiler.workload import Matmul, Workload
from tiercache.cli import main as tiercache_main
from tiercache.commands.profiler import profile
from tiercache.engine.explanation import explanation
from tiercache.engine.prediction import Case, PredictedDrafting, bottlenecks
from tiercache.errors import UsageError

GIB = 1 << 30
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp neurons", "model.layers.1.mlp neurons", "lm_head")
UNIT = 1_000_000_000


def workload() -> Workload:
    sizes = dict.fromkeys(range(len(NAMES)), UNIT)
    needs = PlanInputs(sizes, NAMES, tuple(sizes), frozenset(), None, {}, {})
    matmuls = tuple(Matmul((key,), 2 * UNIT) for key in sizes)
    return Workload("int4", 2, matmuls, needs, sizes, 1000, 10_000_000, 4096)


def machine(gpu: str | None = "3090", **given: Any) -> Hardware:
    return catalogue().machine(gpu, dram_bytes=64 * GIB, **given)


def placed(hbm_units: float | None, dram_units: float) -> Plan:
    hbm = None if hbm_units is None else int(hbm_units * UNIT)
    return fill_tiers(workload().needs, hbm_bytes=hbm, dram_bytes=int(dram_units * UNIT))


CASES = [
    ("3090", 3.2, 8, 0),
    ("3090", 3.2, 8, 1),
    ("p40", 3.2, 3.1, 0),
    (None, None, 8, 0),
    (None, None, 3.1, 0),
]


@pytest.mark.parametrize(("gpu", "hbm", "dram", "cpu_tokens"), CASES)
def test_kinds_and_parts_sum_to_the_pass(gpu: str | None, hbm: float | None, dram: float, cpu_tokens: int) -> None:
    on, plan = machine(gpu), placed(hbm, dram)
    given: dict[str, int] = {"tokens": 1, "past": 500, "cpu_tokens": cpu_tokens}
    time = pass_time(workload(), plan, on, **given)
    kinds = busy_by_kind(workload(), plan, on, **given)
    assert set(kinds) == {"attention", "feed-forward", "head", KV_CACHE}
    latency = len(plan.copied) * on.link_latency_s if not cpu_tokens else 0.0
    for name, seconds in time.busy_s.items():
        of_none = latency if name == "link" else 0.0
        assert sum(each[name] for each in kinds.values()) == pytest.approx(seconds - of_none, abs=1e-9), name
    adds = exposed_s(time, on.overlap.value)
    assert sum(adds.values()) == pytest.approx(time.total_s)
    assert all(seconds >= 0 for seconds in adds.values())
    assert adds["dram"] == pytest.approx(0, abs=1e-9), "its traffic lies within that of others"


def test_reads_that_were_measured_are_of_the_kinds_that_are_read() -> None:
    rate = ReadRate(4, UNIT, Figure(2.0, "measured"))
    on, plan = replace(machine(None), reads=(rate,)), placed(None, 3.1)
    read = replace(workload(), reads=dict.fromkeys(range(len(NAMES)), (UNIT,)), readers=4)
    found = {kind: each["ssd"] for kind, each in busy_by_kind(read, plan, on).items() if each["ssd"]}
    assert found
    assert sum(found.values()) == pytest.approx(pass_time(read, plan, on).busy_s["ssd"])
    assert {kind_of(NAMES[key]) for key in plan.streamed} == set(found)


def test_what_binds_adds_all_of_its_seconds_and_the_rest_what_does_not_overlap() -> None:
    on, plan = machine(), placed(3.2, 8)
    time = pass_time(workload(), plan, on)
    adds = exposed_s(time, 0.85)
    assert time.binding == "link"
    assert adds["link"] == pytest.approx(time.busy_s["link"])
    assert adds["compute"] == pytest.approx(0.15 * time.busy_s["compute"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.o_proj.weight", "attention"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("model.layers.3.mlp neurons", "feed-forward"),
        ("model.decoder.layers.0.fc1.weight", "feed-forward"),
        ("model.embed_tokens.weight", "head"),
        ("something.else", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def case(drafting: Drafting | None = None, gpu: str | None = "3090") -> Case:
    drafts = None if drafting is None else PredictedDrafting(drafting, None, 8)
    return Case(workload(), machine(gpu), placed(3.2, 8), 0, drafts)


def test_bottlenecks_follow_one_another() -> None:
    made = case()
    first, second, *_ = bottlenecks(made)
    assert first["tokens_per_s"] == made.best().prediction.tokens_per_s
    part = "link" if first["binding_tier"] == "link" else "cpu and main memory"
    assert first["twice_as_fast"]["tokens_per_s"] == made.best(upgrades(made.machine)[part]).prediction.tokens_per_s
    gone = made.best(upgrades(made.machine, 1e9)[part]).prediction
    assert first["infinitely_fast"]["tokens_per_s"] == second["tokens_per_s"] == gone.tokens_per_s
    assert second["binding_tier"] == first["infinitely_fast"]["binding_tier"] != first["binding_tier"]
    for each in (first, second):
        assert each["tokens_per_s"] < each["twice_as_fast"]["tokens_per_s"]


def test_drafting_binds_where_it_takes_longest() -> None:
    drafting = Drafting(16, 4.0, 5.0)
    first = bottlenecks(case(drafting))[0]
    assert first["binding_tier"] == "drafting"
    free = case(replace(drafting, draft_s=0.0)).best().prediction.tokens_per_s
    assert first["infinitely_fast"]["tokens_per_s"] == pytest.approx(free)


def test_nothing_is_left_when_all_is_infinitely_fast() -> None:
    made = Case(workload(), machine(None), placed(None, 8), 0, None)
    steps = bottlenecks(made, most=9)
    assert steps[-1]["infinitely_fast"] is None
    assert len({step["binding_tier"] for step in steps}) == len(steps)


# The command.


def run(*arguments: str) -> Any:
    return CliRunner().invoke(profile, list(arguments))


DRAFTED = ("--gpu", "p40", "--draft-nodes", "8", "--tokens-per-pass", "2", "--draft-s", "0.01")


def test_a_file_explains_as_the_question_does(tmp_path: Path) -> None:
    file = tmp_path / "prediction.json"
    file.write_text(run("predict", "tiny", *DRAFTED, "--json").stdout)
    asked, read = (
        json.loads(run("explain", *arguments, "--json").stdout) for arguments in (("tiny", *DRAFTED), (str(file),))
    )
    assert asked == read
    assert asked["schema"] == "tiercache.explanation/1"
    assert sum(asked["adds_ms"].values()) == pytest.approx(asked["token_ms"])
    assert asked["token_ms"] == pytest.approx(1e3 / asked["tokens_per_s"])
    assert asked["adds_ms"]["drafting"] == pytest.approx(5)
    assert asked["binding_tier"] == asked["bottlenecks"][0]["binding_tier"]
    text = run("explain", str(file)).stderr
    assert "feed-forward" in text
    assert "bound by" in text


def test_a_run_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tiercache", "run", "--dram", "4MiB", "--max-new-tokens", "6", "--device", "cpu", "--json", "--quiet"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as left:
        tiercache_main()
    assert not left.value.code
    file = tmp_path / "run.json"
    file.write_text(capsys.readouterr().out)
    stats = json.loads(file.read_text())["stats"]
    found = json.loads(run("explain", str(file), "--json").stdout)
    assert found["of"] == "run"
    assert sum(found["adds_ms"].values()) == pytest.approx(found["token_ms"])
    tokens = 1 + stats["decode_tokens"]
    assert (stats["prefills"], stats["prefill_s"]) == (1, stats["first_pass_s"])
    assert found["token_ms"] == pytest.approx(1e3 * (stats["prefill_s"] + stats["decode_s"]) / tokens)
    assert found["adds_ms"]["dram waits for ssd"] == pytest.approx(
        1e3 * stats["tiers"]["dram"]["stall_s"]["ssd"] / tokens
    )
    assert found["bytes_per_token"]["from the SSD"] == stats["ssd_bytes"] / tokens
    assert "dram waits for ssd" in run("explain", str(file)).stderr


def test_a_drafted_run_counts_its_drafting() -> None:
    tier = {"stall_s": {"ssd": 1.0}, "miss_bytes": 100}
    stats = {"precision": "int8", "device": "cpu", "passes": 3, "tiers": {"dram": tier}, "ssd_bytes": 100}
    stats |= {"prefills": 1, "prefill_s": 1.0, "decode_s": 0.0, "decode_tokens": 0}
    stats |= {"drafting": {"rounds": 2, "tokens": 9, "draft_s": 2.0, "verify_s": 4.0}}
    found = explanation({"schema": "tiercache.run/1", "stats": stats})
    assert found["token_ms"] == pytest.approx(700)
    assert found["adds_ms"] == pytest.approx(
        {"dram waits for ssd": 100, "drafting": 200, "products, Python and launches": 400}
    )
    assert found["tokens_per_s"] == pytest.approx(10 / 7)
    first, second, third = found["bottlenecks"]
    assert first["infinitely_fast"] == pytest.approx({"tokens_per_s": 10 / 3, "binding_tier": "drafting"})
    assert (second["binding_tier"], third["binding_tier"]) == ("drafting", "dram waits for ssd")
    assert third["infinitely_fast"] is None


def test_all_texts_of_a_model_count(checkpoint: Callable[..., Path]) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with tiercache.offload(checkpoint("llama"), dram="1MiB", context=32, show_progress=False) as model:
        for _ in range(4):
            model(ids)
        stats = model.tiercache.stats()
        assert stats.prefills == stats.passes == 4
        assert stats.prefill_s > stats.first_pass_s
        stats.tiers["dram"].stall_s["ssd"] = 0.9 * stats.prefill_s
        found = model.tiercache.explain()
    assert found["tokens_per_pass"] == 1
    assert json.loads(json.dumps(found)) == found
    assert "ms a token" in str(found).splitlines()[0], "it shows itself as tables"
    assert "dram waits for ssd" in found._repr_html_()
    assert all(0 < each["twice_as_fast"]["tokens_per_s"] < 1e6 for each in found["bottlenecks"])


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "no JSON"), ("[1]", "list"), ("{}", "no JSON of tiercache"), ('{"schema": "tiercache.sweep/1"}', "sweep")],
)
def test_files_that_say_nothing(text: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text(text)
    found = run("explain", str(file))
    assert found.exit_code == 2, found.output
    assert word in found.stderr


def test_another_version_s_file_is_refused() -> None:
    with pytest.raises(UsageError, match="another version"):
        explanation({"schema": "tiercache.prediction/1", "drafting": None})
    stats = {"drafting": None, "decode_tokens": 0, "prefills": 0, "prefill_s": 0, "decode_s": 0, "tiers": {}}
    with pytest.raises(UsageError, match="made no pass"):
        explanation({"schema": "tiercache.run/1", "stats": stats})
