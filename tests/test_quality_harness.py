"""lm-evaluation-harness, unchanged, over local tasks: the attached model scores as the resident one does."""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_cli import save_tokenizer

import tiercache
from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.quality.command import quality
from tiercache.quality.harness import Harness
from tiercache.quality.report import report
from tiercache.text import load_tokenizer

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
ITEMS, LENGTH = 20, 64

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: items.jsonl
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
{rest}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITING = """
output_type: generate_until
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    words = ["return x", "import os", "pass", "self.value", "raise ValueError"]
    rows = [
        {"question": f"def f{number}(x):\n    ", "choices": draw.sample(words, 3), "right": draw.randrange(3)}
        for number in range(ITEMS)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, rest in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rest=rest), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is its embedding, which the harness would tie anew."""
    folder = tmp_path_factory.mktemp("tied")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=258, num_attention_heads=4, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def resident(folder: Path, harness: Harness) -> dict[str, dict[str, float]]:
    """The same tasks with the model that transformers loads."""
    return harness.run(transformers.AutoModelForCausalLM.from_pretrained(folder), mixed=False, show=False)


def attached(folder: Path, harness: Harness, **options: Any) -> dict[str, dict[str, float]]:
    sizes = {"context": harness.tokens, "logits": harness.tokens}
    with tiercache.offload(folder, **sizes, **options) as model:
        return harness.run(model, mixed=False, show=False)


@pytest.mark.parametrize("kind", ["pico", "tied"])
def test_scores_of_the_resident_model(kind: str, tasks: Path, tied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = PICO if kind == "pico" else tied
    with Harness.open(tasks, load_tokenizer(folder), limit=None, length=LENGTH) as harness:
        found, wanted = attached(folder, harness), resident(folder, harness)
        about = harness.describe()
    assert found == wanted
    assert {name: set(metrics) for name, metrics in found.items()} == {
        "choice": {"acc", "acc_norm"},
        "rolling": {"bits_per_byte"},
        "writing": {"exact_match"},
    }
    assert found["rolling"]["bits_per_byte"] > 0
    assert about["items"] == dict.fromkeys(found, ITEMS)
    assert about["cut"] == 0
    assert capfd.readouterr() == ("", "")


def test_the_harness_by_hand(tasks: Path) -> None:
    """As its own documentation has it, without `Harness`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    def score(model: Any) -> Any:
        config = {
            "task": "by_hand",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tasks / "items.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "right",
        }
        client = HFLM(pretrained=model, tokenizer=load_tokenizer(PICO), batch_size=2)
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        found = lm_eval.simple_evaluate(model=client, tasks=[config], task_manager=manager, limit=4)
        return [(sample["resps"], sample["acc"]) for sample in found["samples"]["by_hand"]]

    with tiercache.offload(PICO, context=2 * LENGTH, logits=2 * LENGTH) as model:
        found = score(model)
    assert len(found) == 4
    assert found == score(transformers.AutoModelForCausalLM.from_pretrained(PICO))


def test_tasks_of_each_mode(tasks: Path, tmp_path: Path, pico_store: Path) -> None:
    shutil.copytree(pico_store, tmp_path / "store")  # making one takes a minute
    options: dict[str, Any] = {"tokens": 64, "window": 64, "decode": 0, "tasks": tasks, "limit": 8, "length": LENGTH}
    found = quality(
        PICO, Path(__file__), modes=["int3"], store=tmp_path / "store", scratch=tmp_path, show_progress=False, **options
    )
    assert [set(row["tasks"]) for row in found["rows"]] == [{"choice", "rolling", "writing"}] * 2
    eight, two = (row["tasks"]["rolling"]["bits_per_byte"] for row in found["rows"])
    assert eight != two
    assert found["harness"]["items"]["choice"] == found["harness"]["limit"] == 8
    assert "choice (8 items): acc" in report(found)
    assert json.loads(json.dumps(found)) == found


def test_everything_is_as_before(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def state() -> tuple[Any, ...]:
        settings = (hub.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_CACHE, os.environ.get("HF_DATASETS_OFFLINE"))
        draws = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        return (*settings, *draws, Path.cwd(), logging.getLogger("lm_eval").level, list(tmp_path.iterdir()))

    before = state()
    with Harness.open(tasks, load_tokenizer(PICO), limit=2, length=LENGTH) as harness:
        assert list(tmp_path.iterdir()) != []
        attached(PICO, harness)
    assert state() == before


def test_long_requests_are_counted(tasks: Path) -> None:
    with Harness.open(tasks, load_tokenizer(PICO), limit=2, length=8) as harness:
        assert harness.tokens == 8
        assert harness.describe()["cut"] > 0


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder.rmdir(), "no folder"),
        (lambda folder: None, "no task was found"),
        (lambda folder: (folder / "a.yaml").write_text("task: [unclosed"), "no task was found"),
        (lambda folder: (folder / "a.yaml").write_text(TASK.format(name="a", rest=CHOICE)), "cannot be loaded"),
    ],
)
def test_folders_without_tasks(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder)
    with (
        pytest.raises(UsageError, match=message),
        Harness.open(folder, load_tokenizer(PICO), limit=None, length=LENGTH),
    ):
        pass


def test_a_task_from_the_hub_is_refused(tmp_path: Path) -> None:
    task = TASK.format(name="a", rest=CHOICE).replace("dataset_path: json", "dataset_path: someone/some-data")
    (tmp_path / "a.yaml").write_text(task)
    with (
        pytest.raises((EnvironmentUnsupportedError, UsageError), match=r"network|cannot be loaded"),
        Harness.open(tmp_path, load_tokenizer(PICO), limit=None, length=LENGTH),
    ):
        pass
