"""The command line as a user meets it: data on stdout, text on stderr, and the exit code of each kind of trouble."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
import typer
from tokenizers import decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from tiercache import cli

PROMPT = "def read_lines(path):\n"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def save_tokenizer(folder: Path, *, chats: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token per byte, 0 and 1 for the specials; a chat template if it `chats`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", *alphabet])}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE if chats else None
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, *, hidden: int = 64, layers: int = 3, dtype: torch.dtype = torch.float32) -> None:
    """A random Llama that never wants to stop."""
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    save_model(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chatting(checkpoint: Path) -> Path:
    """The same model, with a chat template."""
    folder = shutil.copytree(checkpoint, checkpoint.parent / "chatting")
    save_tokenizer(folder, chats=True)
    return folder


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "store"
    assert call("convert", checkpoint, folder, "--compress", "off").exit_code == 0
    return folder


def call(*arguments: object, given: str | None = None) -> Result:
    plain = {"FORCE_COLOR": None, "NO_COLOR": "1"}
    return CliRunner(env=plain).invoke(cli.app, [str(argument) for argument in arguments], input=given)


def data(result: Result) -> dict[str, Any]:
    """The one line of JSON on stdout; anything else there is an error."""
    (line,) = result.stdout.splitlines()
    plain: dict[str, Any] = json.loads(line)
    return plain


def refused(result: Result, exit_code: int, kind: str) -> str:
    """The message of an error that was told in both ways."""
    assert result.exit_code == exit_code, result.output
    error = data(result)
    assert (error["schema"], error["error"], error["exit_code"]) == ("tiercache.error/1", kind, exit_code)
    message: str = error["message"]
    assert f"error: {message}" in result.stderr
    assert "Traceback" not in result.stderr
    return message


def start(*arguments: object) -> subprocess.Popen[str]:
    code = (  # a shell that runs tests in the background has its children ignore interrupts
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tiercache.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resident(checkpoint: Path, tokens: int, prompt: str = PROMPT) -> tuple[str, list[int]]:
    """What transformers itself generates."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    new = new[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new


def test_help_and_import_need_no_torch() -> None:
    code = (
        "import sys, tiercache.cli\n"
        "try: tiercache.cli.app(['run', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "name",
    [*("convert", "verify", "inspect", "run", "doctor"), *("bench model", "bench kernels", "bench drafters")],
)
def test_every_command_has_help_and_json(name: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    for word in name.split():
        command = command.commands[word]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet"} <= options
    assert command.help
    assert call(*name.split(), "--help").exit_code == 0


def test_version() -> None:
    assert call("--version").stdout == "tiercache 0.1.0\n"


def test_convert_verify_inspect(checkpoint: Path, tmp_path: Path) -> None:
    made = call("convert", checkpoint, tmp_path / "store", "--group", 32, "--json")
    assert data(made)["schema"] == "tiercache.convert/1"
    assert data(made)["bits"]["int4"] > 4 + 1  # groups of 32 have a bit of scales for each weight
    assert "bits a weight, scales and factors included: int8 9." in made.stderr
    assert "MB/s" in made.stderr
    again = call("convert", checkpoint, tmp_path / "store", "--group", 32)
    assert "is there already" in again.stderr
    assert again.stdout == ""
    other = call("convert", checkpoint, tmp_path / "store", "--group", 64, "--json")
    assert "group" in refused(other, 4, "StoreError")

    checked = call("verify", tmp_path / "store", "--json")
    assert data(checked)["extents"] > 0
    found = call("inspect", tmp_path / "store", "--json")
    assert data(found)["group"] == 32
    assert data(found)["bits"] == data(made)["bits"]
    assert "codes calibrated on " in found.stderr
    assert "a pass at int4 reads" in found.stderr
    assert call("inspect", tmp_path / "store", "--quiet").output == ""


def test_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    result = call("convert", checkpoint, tmp_path / "store", "--dry-run", "--json")
    assert data(result)["store_bytes"] > 0
    assert "would make a store" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_run_equals_transformers(checkpoint: Path) -> None:
    text, tokens = resident(checkpoint, 8)
    result = call("run", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
    found = data(result)
    assert (found["schema"], found["text"], found["tokens"]) == ("tiercache.run/1", text, tokens)
    assert found["prompt_tokens"] == len(PROMPT)
    assert found["stats"]["schema"] == "tiercache.stats/1"
    assert found["plan"]["schema"] == "tiercache.plan/2"
    assert "the original weights" in result.stderr
    assert "peak RSS" in result.stderr


def test_run_streams_within_tight_budgets(checkpoint: Path) -> None:
    text, _ = resident(checkpoint, 8)
    budgets = ("--hbm", "1MiB", "--dram", "34MiB")
    result = call("run", checkpoint, "--prompt", "-", "--max-new-tokens", 8, *budgets, given=PROMPT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == text + "\n"
    assert "hbm " in result.stderr
    assert call("run", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 8, "--quiet").output == text + "\n"


def test_run_a_store(checkpoint: Path, store: Path) -> None:
    options = ("--prompt", PROMPT, "--precision", "int8", "--max-new-tokens", 4, "--json")
    result = call("run", store, "--checks", *options)
    assert len(data(result)["tokens"]) == 4
    assert "int8 weights" in result.stderr
    own = call("run", checkpoint, "--store", store, *options)
    assert data(own)["tokens"] == data(result)["tokens"]
    assert "ask for --precision int8" in refused(call("run", store, "--prompt", PROMPT, "--json"), 2, "UsageError")


def test_sampling_follows_its_seed(checkpoint: Path) -> None:
    def sample(seed: int, *more: object) -> list[int]:
        options = ("--temperature", 1.5, "--seed", seed, "--max-new-tokens", 4, "--json", *more)
        tokens: list[int] = data(call("run", checkpoint, "--prompt", PROMPT, *options))["tokens"]
        return tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, "--top-k", 1) == resident(checkpoint, 4)[1]


@pytest.mark.parametrize(
    ("options", "seen", "says"),
    [
        ((), "<user>hello<assistant>", "in the chat template (--raw"),
        (("--chat",), "<user>hello<assistant>", "in the chat template"),
        (("--raw",), "hello", "prompt as it is"),
    ],
)
def test_the_template_is_the_default(
    chatting: Path, checkpoint: Path, options: tuple[str, ...], seen: str, says: str
) -> None:
    _, tokens = resident(checkpoint, 4, seen)
    result = call("run", chatting, "--prompt", "hello", "--max-new-tokens", 4, "--json", *options)
    assert data(result)["tokens"] == tokens
    assert says in result.stderr


def test_templates_that_are_not_there_or_not_wanted(checkpoint: Path, chatting: Path) -> None:
    plain = call("run", checkpoint, "--prompt", "hello", "--max-new-tokens", 2)
    assert "the tokenizer has no chat template" in plain.stderr
    without = call("run", checkpoint, "--chat", "--prompt", "hello", "--json")
    assert "chat template" in refused(without, 2, "UsageError")
    both = call("run", chatting, "--chat", "--raw", "--prompt", "hello", "--json")
    assert "contradict" in refused(both, 2, "UsageError")
    assert "tiercache run" in refused(call("chat", checkpoint, "--json", given="hello\n"), 2, "UsageError")


def test_the_bundled_model_is_the_default(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.running, "PICO", checkpoint)
    assert len(data(call("run", "--max-new-tokens", 2, "--json"))["tokens"]) == 2
    monkeypatch.setattr(cli.running, "PICO", checkpoint / "nowhere")
    assert "tiercache run MODEL" in refused(call("run", "--json"), 2, "UsageError")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--hbm", "22 parsecs"), "22 parsecs"),
        (("--precision", "int5"), "int5"),
        (("--device", "tpu"), "tpu"),
        (("--top-p", "0"), "--top-p"),
        (("--top-k", "5"), "--temperature 0"),
        (("--prompt", ""), "no token"),
    ],
)
def test_bad_values_are_usage_errors(checkpoint: Path, options: tuple[str, str], says: str) -> None:
    assert says in refused(call("run", checkpoint, "--prompt", PROMPT, *options, "--json"), 2, "UsageError")


def test_missing_things_are_usage_errors(checkpoint: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for command in (("run", nowhere, "--prompt", "x"), ("convert", nowhere, tmp_path / "store"), ("verify", nowhere)):
        assert "nowhere" in refused(call(*command, "--json"), 2, "UsageError")
    assert "--prompt" in refused(call("run", checkpoint, "--json"), 2, "UsageError")
    unknown = call("run", checkpoint, "--speed", "ludicrous", "--json")
    assert unknown.exit_code == 2
    assert data(unknown)["error"] == "NoSuchOption"
    assert call("frobnicate").exit_code == 2


def test_too_little_memory_says_how_much(checkpoint: Path) -> None:
    result = call("run", checkpoint, "--prompt", PROMPT, "--dram", "100KB", "--json")
    message = refused(result, 3, "DoesNotFitError")
    assert data(result)["missing_bytes"] > 0
    assert f"{data(result)['missing_bytes']} bytes" in message
    few = call("run", checkpoint, "--prompt", PROMPT, "--context", 8, "--json")
    assert "--context" in refused(few, 3, "ContextExceededError")


def test_verify_finds_one_flipped_byte(checkpoint: Path, tmp_path: Path) -> None:
    call("convert", checkpoint, tmp_path / "store", "--compress", "off")
    file = max((tmp_path / "store").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "corrupt" in refused(call("verify", tmp_path / "store", "--json"), 4, "StoreError")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    refused(call("verify", tmp_path, "--json"), 4, "StoreError")
    refused(call("run", tmp_path, "--prompt", "x", "--json"), 4, "StoreError")
    save_model(tmp_path, layers=1)
    assert "tokenizer" in refused(call("run", tmp_path, "--prompt", "x", "--json"), 4, "StoreError")


def test_absent_gpu_is_an_environment_error(checkpoint: Path) -> None:
    result = call("run", checkpoint, "--prompt", PROMPT, "--device", "cuda:77", "--json")
    assert "doctor" in refused(result, 5, "EnvironmentUnsupportedError")


def test_the_unexpected_is_one_line_unless_debugged(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug\nwith details")

    monkeypatch.setattr(cli.running, "_encode", break_down)
    command = ("run", checkpoint, "--prompt", PROMPT)
    assert "ZeroDivisionError: a bug;" in refused(call(*command, "--json"), 1, "ZeroDivisionError")
    assert "Traceback" in call("--debug", *command).stderr


def test_bench(tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--tokens", 2, "--folder", tmp_path / "models", "--json")
    result = call("bench", "model", *options)
    assert data(result)["schema"] == "tiercache.bench/1"
    assert "the roof" in result.stderr
    old = call("bench", *options)
    assert data(old)["schema"] == "tiercache.bench/1"
    assert "deprecated; write: tiercache bench model --shape tiny" in old.stderr
    refused(call("bench", "model", "--shape", "galaxy", "--folder", tmp_path, "--json"), 2, "UsageError")
    short = refused(call("bench", "model", "--context", "64", "--folder", tmp_path / "none", "--json"), 2, "UsageError")
    assert "--context 88" in short
    assert not (tmp_path / "none").exists(), "nothing was made"


def test_more_than_main_memory_for_a_stand_in_is_refused_by_its_name(checkpoint: Path) -> None:
    told = refused(call("run", checkpoint, "--hbm", "1000TiB", "--prompt", "a", "--json"), 3, "DoesNotFitError")
    assert "--hbm 1000.0 TiB, but main memory, which stands in for a card, has" in told
    assert "lower --hbm" in told


def test_run_drafts(checkpoint: Path, store: Path) -> None:
    _, expected = resident(checkpoint, 24)
    result = call("run", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 24, "--drafter", "ngram", "--json")
    assert data(result)["tokens"] == expected
    drafting = data(result)["stats"]["drafting"]
    assert drafting["drafters"] == ["ngram"]
    assert drafting["tokens"] == 23
    assert f"{drafting['tokens_per_pass']:.2f} tokens a pass of {drafting['rounds']}" in result.stderr
    assert data(result)["stats"]["tokens_per_s"] == drafting["tokens_per_s"]
    assert data(result)["tokens_per_pass"] == drafting["tokens_per_pass"]
    assert f"then {drafting['tokens_per_s']:.2f} tokens/s" in result.stderr

    small = ("--drafter", "resident", "--draft-nodes", 4, "--draft-depth", 2, "--precision", "int8")
    result = call("run", store, "--prompt", PROMPT, "--max-new-tokens", 12, *small, "--json")
    assert len(data(result)["stats"]["drafting"]["tried_by_depth"]) <= 2
    idle = call("run", checkpoint, "--prompt", PROMPT, "--draft-depth", 2, "--json")
    assert "--draft-depth does nothing without a drafter" in refused(idle, 2, "UsageError")
    nobody = call("run", checkpoint, "--prompt", PROMPT, "--drafter", "nobody", "--json")
    assert "nobody" in refused(nobody, 2, "UsageError")


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_an_interrupted_run_tells_what_it_has(checkpoint: Path, option: tuple[str, ...]) -> None:
    expected, _ = resident(checkpoint, 200)
    with start("run", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 20_000, *option) as process:
        assert process.stderr is not None
        while "each pass needs" not in process.stderr.readline():
            pass
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    text = stdout.removesuffix("\n")
    if option:
        found = json.loads(stdout)
        assert found["finish_reason"] == "cancelled"
        text = found["text"]
    assert len(text) > 10
    assert expected.startswith(text[:100])
    assert "interrupted: this is what was written until then" in stderr
    assert "tokens/s; kernels" in stderr
    assert "Traceback" not in stderr


def test_interrupted_conversion_goes_on(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", hidden=512, layers=8, dtype=torch.bfloat16)
    partial = tmp_path / "store.partial"
    command = ("convert", tmp_path / "checkpoint", tmp_path / "store", "--compress", "off")
    with start(*command) as process:
        while not list(partial.glob("plane*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert str(partial) in stderr
    assert partial.is_dir()
    assert call(*command).exit_code == 0
    assert not partial.exists()


def test_a_closed_pipe_is_no_crash(checkpoint: Path) -> None:
    with start("run", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 4, "--quiet") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        stderr = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in stderr
