"""Opening a model is quick and finds what it found slowly; commands load torch and transformers in their own way."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers as tf

import tiercache
from benchmarks import first_token
from tiercache.kv.cache import cache_of
from tiercache.model import meta_model, trace
from tiercache.model.trace import MetaTrace, trace_on_meta

HOUSE = Path(__file__).parents[1]


class EachRun:
    """The oracle: torch works out the shape of every result."""

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def traced(model: tf.PreTrainedModel, tokens: int, logits: int, *, drafted: bool) -> MetaTrace:
    watched = [matrix.module for matrix in meta_model.matrices(model)]
    return trace_on_meta(model, watched, tokens, logits, cache_of(model, tokens) if drafted else None)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_a_trace_counts_the_same_whether_it_knows_results_from_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = meta_model.build(architectures.CONFIGS[name](), torch.bfloat16)
    questions = [(1, 1, False), (33, 8, False), (33, 8, True)]
    found = [traced(model, tokens, logits, drafted=drafted) for tokens, logits, drafted in questions]
    monkeypatch.setattr(trace, "_Results", EachRun)
    assert found == [traced(model, tokens, logits, drafted=drafted) for tokens, logits, drafted in questions]


def test_a_trace_knows_most_results_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run = [], []
    makes_one_tensor, described = trace._makes_one_tensor, trace._remade
    monkeypatch.setattr(trace, "_makes_one_tensor", lambda func: asked.append(func) or makes_one_tensor(func))
    monkeypatch.setattr(trace, "_remade", lambda *given: run.append(given) or described(*given))
    traced(meta_model.build(architectures.CONFIGS["llama"](), torch.bfloat16), 33, 8, drafted=False)
    assert 0 < len(run) < len(asked) / 2


def test_results_that_may_be_something_else_are_run_anew() -> None:
    results, ones = trace._Results(), torch.ones(2, 3)
    meta = ones.to("meta")
    add, view = torch.ops.aten.add.Tensor, torch.ops.aten.view.default
    assert results(add, (ones, ones), {}).tolist() == results(add, (ones, ones), {}).tolist() == (2 * ones).tolist()
    kept = [results(torch.ops.aten._unsafe_view.default, (meta, [3, 2]), {}) for _ in range(2)]
    kept += [results(view, (meta, [3, 2]), {}) for _ in range(2)]
    assert {part.untyped_storage()._cdata for part in kept} == {meta.untyped_storage()._cdata}
    whole, half = (results(torch.ops.aten.mul.Scalar, (meta.int(), by), {}).dtype for by in (2, 2.0))
    assert (whole, half) == (torch.int32, torch.float32)  # 2 and 2.0 are equal, but what they make is not


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_a_model_without_weights_is_the_model_but_for_these(name: str) -> None:
    bare, full = (
        meta_model.build(architectures.CONFIGS[name](), torch.float16),
        architectures.build(name, torch.float16),
    )
    own, other = dict(bare.named_parameters()), dict(full.named_parameters())
    assert {name: (part.shape, part.dtype) for name, part in own.items()} == {
        name: (part.shape, part.dtype) for name, part in other.items()
    }
    assert all(part.is_meta for part in own.values())
    buffers = dict(bare.named_buffers())
    assert buffers.keys() == dict(full.named_buffers()).keys()
    assert all(torch.equal(buffers[name], part) for name, part in full.named_buffers())


def in_a_process(code: str) -> Any:
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=HOUSE).stdout)


def test_a_command_loads_what_it_needs_and_leaves_the_process_as_it_was() -> None:
    code = """
import gc, json, sys
from tiercache.commands import loading
before = loading.loaded()
loading.load()
found = {"before": before, "after": loading.loaded(), "collects": gc.isenabled(), "frozen": gc.get_freeze_count()}
found["left out"] = not [name for name in sys.modules if name.split(".")[0] == "scipy"]
import scipy, transformers
found["scipy"], found["model"] = scipy.__version__ != "", transformers.LlamaForCausalLM.__name__
print(json.dumps(found))
"""
    found = in_a_process(code)
    assert found.pop("frozen") > 100_000
    assert found == {
        "before": False,
        "after": True,
        "collects": True,
        "left out": True,
        "scipy": True,
        "model": "LlamaForCausalLM",
    }


def test_a_command_that_failed_to_load_leaves_the_process_as_it_was() -> None:
    code = """
import gc, json, sys
from tiercache.commands import loading
sys.modules["transformers"] = None
try:
    loading.load()
except Exception as error:
    print(json.dumps([type(error).__name__, gc.isenabled(), "scipy" in sys.modules]))
"""
    assert in_a_process(code) == ["ModuleNotFoundError", True, False]


def test_the_model_of_a_store_is_built_once(plane_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plane_store("llama")
    built: list[str] = []
    build = meta_model.build
    monkeypatch.setattr(meta_model, "build", lambda *given: built.append("") or build(*given))
    with tiercache.offload(folder, precision="int8", context=32, show_progress=False):
        assert len(built) == 1


def test_the_benchmark_of_starts_times_first_byte_and_end(tmp_path: Path) -> None:
    slow = "import time; print('x', flush=True); time.sleep(0.3)"
    found = first_token.start([sys.executable, "-c", slow], HOUSE)
    assert 0 < found.first_s < found.whole_s - 0.2
    assert found.processor_s > 0
    (tmp_path / "tiercache.py").write_text("raise SystemExit(3)")  # the code of that checkout, not of this one
    with pytest.raises(RuntimeError, match="ended with 3"):
        first_token.start([sys.executable, "-c", "import tiercache"], tmp_path)
    with pytest.raises(RuntimeError, match="ended with 3"):
        first_token.start([sys.executable, "-c", "raise SystemExit(3)"], HOUSE)
    table, line = first_token.report({"one": [found, found]}).rsplit("\n", 1)
    assert "one" in table
    assert json.loads(line)["one"][1]["whole_s"] == found.whole_s
