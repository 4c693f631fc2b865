"""Plans of runs: the fastest way is picked, says why, and a file gives the same placement again or is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_resident_planes import Least
from typer.testing import CliRunner

import tiercache
from policies.plan import PlanInputs, fill_tiers
from policies.run_plan import PlanError, RunPlan
from policies.settings import DEFAULT, Settings
from profiler import planner
from profiler.cost_model import Prediction, pass_time
from profiler.figure import Figure
from profiler.hardware import Hardware, Memory, ReadRate
from profiler.planner import Refused, Way
from profiler.workload import Matmul, Workload
from tiercache.bench import settling
from tiercache.cli import app
from tiercache.commands import profiler
from tiercache.engine import this_hardware
from tiercache.errors import UsageError
from tiercache.tiers import stack
from tiercache.tiers.slab import Slab

pytestmark = pytest.mark.usefixtures("one_thread")
GIB, MIB = 1 << 30, 1 << 20
Folders = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8]])
PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"


DEFAULT_READS = ReadRate(DEFAULT.read_threads, DEFAULT.read_bytes, Figure(1.0, "measured", "a test", 0.1))


def machine(**changed: Any) -> Hardware:
    figure = Figure(1.0, "measured", "a test", 0.1)
    dram = Memory(8 * GIB, figure.scaled(20))
    made = Hardware(None, dram, figure.scaled(100), figure, figure.scaled(0.5), figure.scaled(1e-3))
    return replace(made, **changed)


def workload(units: int, nbytes: int = 16 * MIB) -> Workload:
    sizes = dict.fromkeys(range(units), nbytes)
    needs = PlanInputs(sizes, [str(n) for n in sizes], tuple(sizes), frozenset(), None, {"KV cache": 0}, {})
    return Workload("int8", units, tuple(Matmul((n,), nbytes) for n in sizes), needs, sizes, 100, 0, 0)


def ways(model: Workload, dram_bytes: int, tries: list[Settings]) -> list[Way]:
    found = []
    for each in tries:
        reads = {key: (each.read_bytes,) * (nbytes // each.read_bytes) for key, nbytes in model.payload.items()}
        read = replace(model, reads=reads, readers=each.read_threads)
        found.append(Way({"prefetch": str(each.prefetch_bytes)}, read, _plan(read, dram_bytes, each), each))
    return found


def _plan(model: Workload, dram_bytes: int, settings: Settings) -> Any:
    return fill_tiers(model.needs, hbm_bytes=None, dram_bytes=dram_bytes, prefetch_bytes=settings.prefetch_bytes)


@given(st.integers(6, 40), st.floats(0.3, 0.99))
def test_the_pick_is_the_fastest_but_for_ties_and_the_rest_is_in_order(units: int, share: float) -> None:
    model, on = workload(units), machine(reads=(DEFAULT_READS,))
    found = ways(model, max(int(share * units * 16 * MIB), 48 * MIB), planner.settings_to_try(on))
    ranked = planner.rank(found, on)
    seconds = [pass_time(each.way.workload, each.way.plan, on).total_s for each in ranked]
    assert {id(each.way) for each in ranked} == {id(way) for way in found}
    assert seconds[0] <= min(seconds) * (1 + planner.TIE) + 1e-12
    assert seconds[1:] == sorted(seconds[1:])
    if pass_time(model, found[0].plan, on).total_s <= min(seconds) * (1 + planner.TIE):
        assert ranked[0].way is found[0], "the rule of thumb where nothing is faster by more than runs differ"


def test_a_decision_names_the_best_alternative_its_gain_and_the_seconds_that_it_saves() -> None:
    model, on = workload(12), machine()
    found = ways(model, 120 * MIB, [DEFAULT, Settings(8 * MIB)])
    ranked = planner.rank(found, on)
    assert ranked[0].way.settings == Settings(8 * MIB), "a smaller ring keeps a unit more"
    (decision,) = planner.decisions(ranked)
    plain, small = (pass_time(model, way.plan, on) for way in found)
    assert (decision.choice, decision.alternative) == (str(8 * MIB), str(DEFAULT.prefetch_bytes))
    assert decision.gain == pytest.approx(plain.total_s / small.total_s - 1)
    assert f"{(plain.busy_s['ssd'] - small.busy_s['ssd']) * 1e3:.1f} ms less of the SSD" in decision.reason
    alone = planner.rank(found[:1], on)
    (refused,) = planner.decisions(alone, [Refused({"prefetch": "0"}, "dram", 77)])
    assert (refused.gain, refused.reason) == (None, "the other lacks 77 bytes of dram")


def test_a_decision_is_held_against_the_way_that_differs_in_it_alone() -> None:
    def ranked(who: str, how: str, speed: float) -> planner.Ranked:
        made = pass_time(model, plan, machine())
        way = Way({"drafting": who, "weights": how}, model, plan)
        return planner.Ranked(way, Prediction(speed, speed, speed, speed, made, "spec"))

    model = workload(4)
    plan = fill_tiers(model.needs, hbm_bytes=None, dram_bytes=8 * GIB)
    four = [ranked("a tree", "copied", 4.0), ranked("nobody", "cpu", 3.0), ranked("nobody", "copied", 2.0)]
    found = planner.decisions([*four, ranked("a tree", "cpu", 1.0)])
    assert {each.what: each.gain for each in found} == {"drafting": 1.0, "weights": 3.0}
    assert [each.gain for each in planner.decisions(four[:2])] == [pytest.approx(1 / 3)] * 2, "for want of such a way"


def test_reads_are_changed_only_where_the_probe_found_others_faster_than_its_noise() -> None:
    def rate(threads: int, block: int, gbps: float) -> ReadRate:
        return ReadRate(threads, block, Figure(gbps, "measured", "a test", 0.1))

    ours, others = rate(DEFAULT.read_threads, DEFAULT.read_bytes, 1.0), rate(8, MIB, 1.05)
    assert {each.read_threads for each in planner.settings_to_try(machine(reads=(ours, others)))} == {4}
    a_little = machine(reads=(ours, rate(8, MIB, 1.15)))  # more than the noise, less than a prediction's error
    assert {each.read_threads for each in planner.settings_to_try(a_little)} == {4}
    faster = machine(reads=(ours, rate(8, MIB, 1.5)))
    tries = planner.settings_to_try(faster)
    assert tries[0] == DEFAULT
    assert planner.settings_to_try(machine()) == [DEFAULT], "a data sheet does not tell them apart"
    assert {each.read_threads for each in tries[1:]} == {8}
    model = workload(12)
    best = planner.rank(ways(model, 120 * MIB, tries), faster)[0]
    assert best.way.settings.read_threads == 8
    assert best.prediction.pass_time.busy_s["ssd"] == pytest.approx(
        sum(model.payload[key] for key in best.way.plan.streamed) / 1.5e9
    )


def opened(store: Any, **options: Any) -> Any:
    known: dict[str, Any] = {"precision": "int8", "hbm": None, "dram": "64MiB", "context": 64, "cpu_tokens": 0}
    return tiercache.offload(store, **{**known, "device": "cpu", "show_progress": False, **options})


def budgets(store: Path, **options: Any) -> list[dict[str, int]]:
    with opened(store, **options) as model:
        least = Least(model.tiercache._asked.needs)
        return [least.two(66_000), least.streaming(66_000)]


@pytest.mark.parametrize("drafter", [None, "auto", "ngram", "resident"])
def test_a_plan_file_places_everything_again_without_the_options_that_made_it(
    drafter: str | None, plane_store: Folders, tmp_path: Path
) -> None:
    store, path = plane_store("llama"), tmp_path / "plan.json"
    options: dict[str, Any] = {} if drafter is None else {"drafter": drafter, "draft_nodes": 7}
    for sizes in budgets(store, **options):
        with opened(store, **options, **sizes) as model:
            before = model.tiercache.run_plan
            placed, logits = model.tiercache.plan, model(IDS).logits
            drafts = model.tiercache.stats().drafting
            path.write_text(json.dumps(before.to_dict()))
        with tiercache.offload(store, plan=path, device="cpu", show_progress=False) as model:
            stats = model.tiercache.stats()
            assert model.tiercache.plan == placed
            assert model.tiercache.run_plan.hash == before.hash == stats.plan
            assert (stats.drafting and stats.drafting.drafters) == (drafts and drafts.drafters)
            assert torch.equal(model(IDS).logits, logits)
        with tiercache.offload(store, plan=before, device="cpu", show_progress=False) as model:
            assert model.tiercache.run_plan.hash == before.hash


def test_tiers_allocate_what_the_plan_says_to_the_byte(plane_store: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = plane_store("llama"), list[int]()

    class Counted(Slab):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self.bytes.nbytes)

    given = budgets(store)
    monkeypatch.setattr(stack, "Slab", Counted)
    for sizes in given:
        made.clear()
        with opened(store, **sizes) as model:
            plan = model.tiercache.plan
            assert sorted(made) == sorted(tier.slab_bytes for tier in (plan.hbm, plan.dram) if tier)
            for name, tier in (("hbm", plan.hbm), ("dram", plan.dram)):
                assert tier is None or model.tiercache.stats().tiers[name].peak_bytes <= tier.allocated_bytes


def test_what_a_plan_does_not_say_or_says_otherwise_is_refused(
    plane_store: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = plane_store("llama"), tmp_path / "plan.json"
    with opened(store) as model:
        plan = model.tiercache.run_plan
    path.write_text(json.dumps(plan.to_dict()))

    def refused(match: str, place: Any = store, **options: Any) -> None:
        options = {"plan": path, "device": "cpu", "show_progress": False, **options}
        with pytest.raises(UsageError, match=match), tiercache.offload(place, **options):
            pytest.fail("opened")

    refused("context=128 is not what the plan has, 64; leave context= out", context=128)
    refused("dram=1024 is not what the plan has", dram=1024)
    refused("options of drafting are not the plan's", drafter="ngram")
    refused("made for another model", place=plane_store("qwen2"))
    moved = replace(plan, placement={**plan.placement, "dram": {**plan.placement["dram"], "table": False}})
    refused("places units otherwise", plan=moved)
    elsewhere = replace(plan, machine={**plan.machine, "processor": "another"})
    refused("another machine: its processor is 'another'", plan=elsewhere)
    with tiercache.offload(store, plan=elsewhere, force_plan=True, device="cpu", show_progress=False) as model:
        assert model.tiercache.run_plan.hash == plan.hash
    refused("No such file", plan=tmp_path / "none.json")
    refused("none of 'auto'", plan=3)


def test_plans_survive_json_and_hostile_files_are_told_apart(plane_store: Folders, tmp_path: Path) -> None:
    with opened(plane_store("llama")) as model:
        plan = model.tiercache.run_plan
    plain = json.loads(json.dumps(plan.to_dict()))
    assert RunPlan.from_dict(plain).to_dict() == plain
    settings = {**plain["settings"], "read_threads": 8}
    assert RunPlan.from_dict({**plain, "settings": settings}).hash != plan.hash
    assert RunPlan.from_dict({**plain, "predicted": None}).hash == plan.hash
    broken: list[Any] = [None, [], {**plain, "schema": "tiercache.plan/1"}, {**plain, "placement": 3}]
    broken += [{name: value for name, value in plain.items() if name != left} for left in ("options", "settings")]
    broken += [
        {**plain, "settings": {**plain["settings"], name: bad}} for name, bad in product(settings, (0, "x", None))
    ]
    for found in broken:
        with pytest.raises(PlanError):
            RunPlan.from_dict(found)
    path = tmp_path / "plan.json"
    options = [
        {"context": "x"},
        {"dram": -1},
        {"precision": "int5"},
        {"hbm": 1.5},
        {"draft": 4},
        {"bytes_per_token": 3},
    ]
    texts = [
        "{",
        "\udcff",
        "[" * 100_000,
        *(json.dumps({**plain, "options": {**plain["options"], **o}}) for o in options),
    ]
    edited = {**plain, "hash": RunPlan.from_dict(plain).hash, "settings": {**plain["settings"], "prefetch_bytes": MIB}}
    for text in [*texts, json.dumps({**plain, "options": {}}), json.dumps(edited)]:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UsageError), tiercache.offload(plane_store("llama"), plan=path, device="cpu"):
            pytest.fail("opened")


def test_auto_searches_with_what_was_measured_and_default_does_not(
    plane_store: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = plane_store("llama")
    slow = machine(ssd_gbps=(rate := Figure(1e-3, "measured")), reads=(replace(DEFAULT_READS, gbps=rate),))
    monkeypatch.setattr(this_hardware, "measured_machine", lambda: slow)
    monkeypatch.setattr(planner, "_RINGS", (1 / 1024,))  # a toy is smaller than any ring
    (_, sizes) = budgets(store)
    read = {}
    for how in ("default", "auto"):
        with opened(store, plan=how, **sizes) as model:
            model(IDS)
            found = model.tiercache.run_plan
            read[how] = model.tiercache.pass_bytes()["ssd"]
            logits = model(IDS).logits
            assert found.predicted["pass_s"] > 0
        if how == "default":
            assert (found.settings, found.decisions) == (DEFAULT, ())
            want = logits
    assert read["auto"] <= read["default"]
    assert torch.equal(logits, want)
    assert {each.what for each in found.decisions} == {"prefetch"}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(profiler.planning.profile, ["plan", *arguments])


def test_the_command_plans_here_and_offload_takes_its_file(plane_store: Folders, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    given = ["--context", "64", "--logits", "8", "--dram", "64MiB", "--precision", "int4,int8"]
    result = run(str(plane_store("llama")), *given, "--out", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["options"]["precision"] == "int4", "the first of two that tie, as a toy's do"
    assert plan["decisions"][0]["alternative"] == "int8"
    other = json.loads(run(str(plane_store("llama")), *given[:-1], "int8,int4", "--json").stdout)["decisions"][0]
    assert (other["choice"], "liked better" in other["reason"]) == ("int8", True)
    assert (other["gain"] <= 0, plan["decisions"][0]["gain"] >= 0) == (True, True)
    assert plan["predicted"]["basis"] == "spec"
    assert "basis: spec; nobody measured this machine" in run(str(plane_store("llama")), *given).stderr
    assert json.loads(out.read_text())["hash"] == plan["hash"]
    assert run(str(plane_store("llama")), *given, "--past", "9").exit_code == 2
    with tiercache.offload(plane_store("llama"), plan=out, device="cpu", show_progress=False) as model:
        assert model.tiercache.run_plan.hash == plan["hash"]


def test_run_takes_a_plans_file(pico_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    given = ["--context", "64", "--logits", "1", "--precision", "int8"]
    assert run(str(pico_store), *given, "--out", str(out), "--quiet").exit_code == 0
    arguments = ["run", str(pico_store), "--prompt", "def ", "--max-new-tokens", "4", "--plan", str(out), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["plan"]["placement"] == json.loads(out.read_text())["placement"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "99"])
    assert result.exit_code == 3, "the plan has room for 64 tokens"


def test_the_command_plans_for_machines_elsewhere_and_names_the_second_best(tmp_path: Path) -> None:
    result = run("llama-2-70b", "--gpu", "p40", "--precision", "int8,int4", "--json", "--out", str(tmp_path / "plan"))
    plan = json.loads(result.stdout)
    assert plan["options"]["precision"] == "int4"
    assert plan["predicted"]["tokens_per_s"] >= plan["runner_up"]["tokens_per_s"] / (1 + planner.TIE)
    by_what = {each["what"]: each for each in plan["decisions"]}
    assert by_what["weights beyond the card"]["choice"].startswith("multiplied by the CPU")
    assert by_what["precision"]["gain"] > 0.5
    with pytest.raises(UsageError, match="was not there"), tiercache.offload(PICO, plan=tmp_path / "plan"):
        pytest.fail("opened")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("llama-2-70b", "--gpu", "3090", "--settle"), 2),
        (("llama-2-70b", "--ssd", "9GB/s"), 2),
        (("llama-2-70b", "--gpu", "3090", "--drafter", "tinyllama-1.1b"), 2),
        (("llama-2-70b", "--gpu", "3090", "--dram", "8GiB", "--context", "100000", "--past", "9"), 3),
        ((str(PICO), "--precision", "source", "--out", "/proc/none/plan.json"), 2),
        ((str(PICO), "--precision", "int5"), 2),
        ((str(PICO), "--precision", "source", "--dram", "1MiB"), 3),
    ],
)
def test_what_cannot_be_planned_is_said_with_its_code(arguments: tuple[str, ...], code: int) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.stderr


def test_settling_takes_the_faster_and_keeps_the_first_within_noise(
    pico_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiercache.config.options import OffloadConfig
    from tiercache.config.sizes import Budget
    from tiercache.engine.session import plan_model

    config = OffloadConfig(hbm=None, dram=Budget.parse("64MiB"), precision="int8", context=128, logits=1)
    plan = plan_model(pico_store, config, show_progress=False)
    other = {**(plan.predicted or {}), "settings": {**plan.to_dict()["settings"], "prefetch_bytes": MIB}}
    plan = replace(plan, runner_up=other)
    times = {"as predicted": [0.02, 0.02, 0.021], "other": [0.01, 0.01, 0.011]}

    def measured(place: Path, ways: Any, **_: Any) -> list[settling.Measured]:
        seconds = times.values() if faster else [[0.02, 0.02, 0.021], [0.0199, 0.02, 0.0195]]
        return [settling.Measured(n, c, tuple(s)) for (n, c), s in zip(ways, seconds, strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(settling, "in_turn", measured)
        faster = True
        found = settling.settle(pico_store, config, plan, show_progress=False)
        assert found.settings.prefetch_bytes == MIB
        assert found.decisions[-1].gain == pytest.approx(1.0)
        faster = False
        assert settling.settle(pico_store, config, plan, show_progress=False).hash == plan.hash
    monkeypatch.setattr(settling, "TOKENS", 2)
    found = settling.settle(pico_store, config, plan, show_progress=False)  # runs both
    assert "measured, 3 texts of 2 tokens each in turn" in found.decisions[-1].reason


def test_a_given_models_own_plan_is_taken_again(plane_store: Folders, checkpoint: Folders) -> None:
    own = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    with opened(own, precision="source", dram="16MiB") as model:
        plan = model.tiercache.run_plan
    with tiercache.offload(own, plan=plan, device="cpu", show_progress=False) as model:
        assert model.tiercache.run_plan.hash == plan.hash


@pytest.mark.parametrize(
    "changed",
    [
        {"options": {"draft": {}}},
        {"options": {"draft": {"drafter": "ngram", "x": 1}}},
        {"options": {"drafts": "foo"}},
        {"options": {"bytes_per_token": {"fraction": "x"}}},
        {"options": {"link_gbps": 0}},
        {"settings": {"prefetch_bytes": 10**400}},
        {"settings": {"read_bytes": 1000}},
        {"settings": {"read_threads": 10**6}},
    ],
)
def test_a_plan_that_asks_for_what_cannot_be_is_refused(
    changed: dict[str, Any], plane_store: Folders, tmp_path: Path
) -> None:
    with opened(plane_store("llama")) as model:
        plain = json.loads(json.dumps(model.tiercache.run_plan.to_dict()))
    for part, values in changed.items():
        plain[part] |= values
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(UsageError), tiercache.offload(plane_store("llama"), plan=path, device="cpu"):
        pytest.fail("opened")


def test_a_plan_for_a_machine_that_was_not_there_is_for_reading(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert run("tinyllama-1.1b", "--gpu", "3090", "--quiet", "--out", str(out)).exit_code == 0
    with pytest.raises(UsageError, match="was not there"), tiercache.offload(PICO, plan=out, force_plan=True):
        pytest.fail("opened")


def test_settling_leaves_out_what_does_not_fit(pico_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    given = ["--precision", "int8", "--context", "128", "--logits", "65", "--drafter", "auto", "--dram"]
    told = run(str(pico_store), *given, "1MiB", "--json")
    assert told.exit_code == 3
    tight = (1 << 20) + json.loads(told.stdout)["missing_bytes"]  # enough for plain decoding and for nothing else
    result = run(str(pico_store), *given, str(tight), "--settle", "--json", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    decisions = {each["what"]: each["choice"] for each in json.loads(result.stdout)["decisions"]}
    assert decisions == {"drafting": "nobody", "settled": "not run"}
