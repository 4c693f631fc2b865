"""What an offload leaves behind: nothing, whether it ends well, with an exception or with Ctrl-C."""

import gc
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import build, save
from torch import nn

import tiercache
from tiercache import errors

CONTEXT = 64
IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkpoint")
    save("llama", place)
    return place


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that an offload may not change."""
    return {
        "parameters": {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "forwards": {name: module.forward.__func__ for name, module in model.named_modules()},
        "hooks": {
            name: [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._state_dict_pre_hooks)]
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "padding": [module.padding_idx for module in model.modules() if isinstance(module, nn.Embedding)],
        "training": model.training,
    }


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    values = [side.pop("values") for side in (one, other)]
    return one == other and all(torch.equal(value, values[1][name]) for name, value in values[0].items())


def surroundings() -> tuple[set[str], int]:
    gc.collect()
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("tiercache")}
    return names, len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the folder changes while it is read


class BoomError(Exception):
    pass


def end_well(model: tf.PreTrainedModel) -> None:
    model.generate(IDS, max_new_tokens=3, do_sample=False)


def end_with_exception(model: tf.PreTrainedModel) -> None:
    def boom(*_: object) -> None:
        raise BoomError

    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(boom)
    try:
        model(input_ids=IDS)
    finally:
        handle.remove()


def end_with_ctrl_c(model: tf.PreTrainedModel) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    try:
        model(input_ids=IDS)
    finally:
        handle.remove()


ENDINGS = {end_well: None, end_with_exception: BoomError, end_with_ctrl_c: KeyboardInterrupt}
TIERS = {"cpu": {}, "hbm": {"hbm": "2MiB"}}


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
@pytest.mark.parametrize("precision", ["source", "int4"])
def test_a_given_model_is_restored(ending: object, precision: str, tiers: dict, tmp_path: Path) -> None:
    model = build("llama-tied-bias")
    model.config.pad_token_id = None
    want = model(input_ids=IDS).logits
    before, around = snapshot(model), surroundings()
    error = ENDINGS[ending]

    def use() -> None:
        store = {} if precision == "source" else {"store": tmp_path / "store"}
        with tiercache.offload(model, dram="8MiB", context=CONTEXT, precision=precision, **store, **tiers) as offloaded:
            assert offloaded is model
            if precision == "source":
                assert torch.equal(offloaded(input_ids=IDS).logits, want)
            ending(offloaded)

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert same(snapshot(model), before)
    assert surroundings() == around
    assert torch.equal(model(input_ids=IDS).logits, want)


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_a_path_leaves_no_thread_or_descriptor(ending: object, folder: Path) -> None:
    around = surroundings()
    error = ENDINGS[ending]
    with tiercache.offload(folder, hbm="580KiB", dram="700KiB", context=CONTEXT) as model:
        want = model(input_ids=IDS).logits
        if error is None:
            ending(model)
        else:
            with pytest.raises(error):
                ending(model)
        assert torch.equal(model(input_ids=IDS).logits, want), "the pass after an interrupted one"
    assert surroundings() == around
    with pytest.raises(errors.ClosedError):
        model(input_ids=IDS)
    assert not hasattr(model, "tiercache")


def test_the_memory_goes_back(folder: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    sizes = []
    for _ in range(3):
        with tiercache.offload(folder, dram="64MiB", hbm="64MiB", context=CONTEXT) as model:
            model(input_ids=IDS)
        del model
        gc.collect()
        sizes.append(resident())
    assert sizes[2] - sizes[0] < 8 << 20


def test_double_and_nested_use_is_refused() -> None:
    model = build("llama")
    with tiercache.offload(model, context=CONTEXT) as offloaded:
        with pytest.raises(errors.UsageError, match="already"), tiercache.offload(offloaded):
            pass
        offloaded(input_ids=IDS)
    with tiercache.offload(model, context=CONTEXT) as offloaded:
        offloaded(input_ids=IDS)


def test_two_models_at_once(folder: Path) -> None:
    with (
        tiercache.offload(folder, dram="1100KiB", context=CONTEXT) as one,
        tiercache.offload(folder, dram="8MiB", context=CONTEXT) as other,
    ):
        assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_two_threads_at_once_are_refused(folder: Path) -> None:
    with tiercache.offload(folder, dram="8MiB", context=CONTEXT) as model:
        inside, go_on = threading.Event(), threading.Event()

        def wait(*_: object) -> None:
            inside.set()
            go_on.wait(10)

        model.model.layers[0].register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: model(input_ids=IDS))
        thread.start()
        inside.wait(10)
        with pytest.raises(errors.UsageError, match="another thread"):
            model(input_ids=IDS)
        go_on.set()
        thread.join()
        model(input_ids=IDS)  # and afterwards from this one


def test_accelerate_models_are_refused(folder: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    accelerate.disk_offload(model, tmp_path)
    with pytest.raises(errors.UsageError, match="accelerate"), tiercache.offload(model):
        pass


def test_saving_from_inside_is_refused(folder: Path, tmp_path: Path) -> None:
    with tiercache.offload(folder, dram="8MiB", context=CONTEXT) as model:
        with pytest.raises(errors.UsageError, match="no weights"):
            model.state_dict()
        with pytest.raises(errors.UsageError, match="no weights"):
            model.save_pretrained(tmp_path / "saved")


def test_a_model_from_pretrained_is_lent_and_restored(folder: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()  # mapped: its parameters are aligned to nothing
    want, before = model(input_ids=IDS).logits, snapshot(model)
    for options in ({}, {"hbm": "2MiB"}):
        with tiercache.offload(model, dram="8MiB", context=CONTEXT, **options) as offloaded:
            output = offloaded(input_ids=IDS)
            assert torch.equal(output.logits, want)
            assert not output.logits.requires_grad, "gradients through passing weights would be wrong"
    assert same(snapshot(model), before)


def test_checks_of_a_given_model_s_store(tmp_path: Path) -> None:
    model = build("llama")
    options = {"precision": "int8", "store": tmp_path / "deep" / "store", "dram": "8MiB", "context": CONTEXT}
    with tiercache.offload(model, **options) as offloaded:
        offloaded(input_ids=IDS)
    target = tmp_path / "deep" / "store" / "plane-0.bin"
    data = bytearray(target.read_bytes())
    data[100] ^= 1
    target.write_bytes(data)
    with pytest.raises(errors.StoreError, match="corrupt"), tiercache.offload(model, checks=True, **options):
        pass
