"""`offload(..., drafter=...)`: the same tokens whoever drafts and wherever the weights lie; else clear words."""

import gc
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers as tf
from test_drafted_decoding import GROWERS, PROMPT, Oracle, drafting, generate, plain
from test_lifetime import BoomError, same, snapshot, surroundings
from test_resident_planes import Folders, Least, offloaded, traced_once  # noqa: F401 - a fixture of every test here
from tokenizers import Tokenizer, models

import tiercache
from policies import room
from policies.budgeter import Budgeter
from policies.drafting import RoundPlan
from policies.plan import Plan
from tiercache.compat import cache_kwargs, cache_out
from tiercache.draft.base import Context, Drafter, DrafterRequirements, Feedback, TreeBudget
from tiercache.draft.cascade import Cascade
from tiercache.draft.grow import grower
from tiercache.draft.lm import LmDrafter
from tiercache.draft.ngram.learned import Learned
from tiercache.draft.ngram.lookup import PromptLookup
from tiercache.draft.ngram.recycling import TokenRecycling
from tiercache.draft.ngram.suffix import SuffixAutomaton
from tiercache.draft.ngram.trigram import AdaptiveTrigram
from tiercache.draft.resident import ResidentDrafter
from tiercache.draft.tree import DraftTree
from tiercache.draft.union import Union
from tiercache.errors import ClosedError, ContextExceededError, DoesNotFitError, DraftError, StoreError, UsageError
from tiercache.kv.cache import support
from tiercache.store.convert import convert

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 64
NEW = 16
SEEDS = (None, 3)
IDS = torch.tensor([PROMPT])
PICO = Path(__file__).parents[1] / "examples" / "pico"
KINDS = ("ngram", "resident", "auto", "path", "drafter", "nested")
Texts = Callable[[str], dict[int | None, list[int]]]


def opened(model: Any, **options: Any) -> Any:
    """`offload` on the CPU with plenty of memory, but for `options`."""
    known: dict[str, Any] = {"precision": "int8", "hbm": None, "dram": "64MiB", "context": CONTEXT, "cpu_tokens": 0}
    return tiercache.offload(model, **{**known, "device": "cpu", "show_progress": False, **options})


@pytest.fixture(scope="module")
def texts(plane_store: Folders) -> Texts:
    """What plain decoding of an architecture's int8 store writes, by seed; greedy by `generate` itself."""
    made: dict[str, dict[int | None, list[int]]] = {}

    def get(name: str) -> dict[int | None, list[int]]:
        if name not in made:
            with opened(plane_store(name)) as model:
                made[name] = {None: generate(model, None, NEW), 3: plain(model, 3, NEW)}
        return made[name]

    return get


@pytest.fixture
def who(plane_store: Folders, checkpoint: Folders) -> Callable[[str, str], Any]:
    """`who(kind, name)`: a context with what `drafter=` is given for an architecture."""

    @contextmanager
    def get(kind: str, name: str) -> Iterator[Any]:
        if kind == "nested":
            with opened(plane_store(name), precision="int4", context=256) as small:
                yield LmDrafter(small, grower("best-first"))
        else:
            known = {"path": checkpoint(name), "drafter": SuffixAutomaton()}
            yield known.get(kind, kind)

    return get


@pytest.fixture
def at_any_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for drafting always pays, and every pass waits for a slower tier."""
    monkeypatch.setattr(room, "pays", lambda *_: True)
    monkeypatch.setattr(Plan, "still", False)


@pytest.fixture
def turns(at_any_price: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drafter has its turn, and a plain pass, with trees of all sizes."""
    rounds: dict[int, int] = {}

    def decide(budgeter: Budgeter, room: int | None = None) -> RoundPlan:
        turn = rounds[id(budgeter)] = rounds.get(id(budgeter), -1) + 1
        drafters = [*range(len(budgeter._histories)), None]
        size = (1, 7, 33)[turn // len(drafters) % 3]
        return RoundPlan(drafters[turn % len(drafters)], size, 1 + turn % 5, 1 + turn % 4, 0.0, 0.0)

    monkeypatch.setattr(Budgeter, "decide", decide)


def places(model: tf.PreTrainedModel) -> dict[str, dict[str, int]]:
    """Budgets for what a model asks: an HBM region with DRAM below it, and DRAM alone; both too small for all of it."""
    least = Least(model.tiercache._asked.needs)
    return {"hbm": least.two(66_000), "ssd": least.streaming(66_000)}


# ---------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("kind", KINDS)
def test_drafters_change_nothing_wherever_the_weights_lie(
    kind: str, plane_store: Folders, who: Any, texts: Texts
) -> None:
    budgets: dict[str, dict[str, Any]] = {"near": {}}
    for place in ("near", "hbm", "ssd"):
        with (
            who(kind, "llama") as drafter,
            opened(plane_store("llama"), drafter=drafter, draft_fixed=True, **budgets[place]) as model,
        ):
            assert {seed: generate(model, seed, NEW) for seed in SEEDS} == texts("llama"), place
            stats = model.tiercache.stats()
            if place == "near":
                budgets |= places(model)
            assert (stats.tiers["dram"].misses > 0) == (place != "near")
            for tier in stats.tiers.values():
                assert tier.peak_bytes <= tier.capacity_bytes
        drafted = stats.drafting
        assert drafted.tokens == sum(len(text) - len(PROMPT) - 1 for text in texts("llama").values())
        assert drafted.nodes >= drafted.accepted == drafted.tokens - drafted.rounds
        if kind in ("resident", "path", "nested"):
            assert drafted.tokens_per_pass > 1.5


@pytest.mark.parametrize("place", ["hbm", "ssd"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3", "gpt2", "opt"])
def test_teams_change_nothing_on_other_architectures(
    name: str, place: str, plane_store: Folders, texts: Texts, turns: None
) -> None:
    with opened(plane_store(name), drafter="auto") as model:
        sizes = places(model)[place]
    with opened(plane_store(name), drafter="auto", **sizes) as model:
        assert {seed: generate(model, seed, NEW) for seed in SEEDS} == texts(name)
        stats = model.tiercache.stats()
    assert min(stats.drafting.arm_rounds) >= 1
    assert stats.drafting.accepted > 0
    assert stats.draft_passes > 0
    assert stats.tiers["dram"].misses > 0


@pytest.mark.parametrize("kind", ["path", "nested"])
def test_a_small_model_drafts_beside_windows_and_ties(
    kind: str, plane_store: Folders, who: Any, texts: Texts, turns: None
) -> None:
    for name in ("gemma2", "qwen3"):
        with who(kind, name) as drafter, opened(plane_store(name), drafter=drafter) as model:
            assert {seed: generate(model, seed, NEW) for seed in SEEDS} == texts(name)
            assert model.tiercache.stats().drafting.accepted > 0


@pytest.mark.parametrize("kind", ["ngram", "auto", "path", "drafter", "nested"])
def test_a_model_in_memory_at_source_precision(kind: str, who: Any, turns: None) -> None:
    model = architectures.build("llama")
    want = {None: generate(model, None, NEW), 3: plain(model, 3, NEW)}
    before, kept = snapshot(model), type(model)
    sizes: dict[str, int] = {}
    for _ in range(2):
        with who(kind, "llama") as drafter, opened(model, precision="source", drafter=drafter, **sizes) as lent_model:
            sizes = {"hbm": places(lent_model)["hbm"]["hbm"]}
            assert type(lent_model) is not kept
            assert isinstance(lent_model, kept)
            assert {seed: generate(lent_model, seed, NEW) for seed in SEEDS} == want
            assert lent_model.tiercache.stats().drafting.nodes > 0
        assert type(model) is kept
        assert generate(model, None, NEW) == want[None]
    assert same(snapshot(model), before)


@pytest.mark.parametrize("name", GROWERS)
@pytest.mark.parametrize("kind", ["resident", "lm"])
def test_growers_and_budgets_change_nothing(kind: str, name: str, plane_store: Folders, texts: Texts) -> None:
    store, want = plane_store("llama"), texts("llama")
    with (
        offloaded(store, context=700, logits=513) as model,
        offloaded(store, "int4", resident=False, context=700) as other,
    ):
        drafter: Drafter = LmDrafter(other, grower(name))
        if kind == "resident":
            drafter = ResidentDrafter(lambda: model.tiercache.passes("resident"), grower(name))
        for nodes in (1, 7, 512):
            with drafting(model, [drafter], nodes, depth=4) as stats:
                for seed in SEEDS:
                    assert generate(model, seed, NEW) == want[seed], (nodes, seed)
            assert 0 < stats.nodes <= nodes * stats.rounds
            if nodes >= (512 if name.startswith("rsd") else 7):
                assert stats.accepted > 0
        assert (model.tiercache.stats().draft_passes > 0) == (kind == "resident")


def tables(folder: Path) -> list[Drafter]:
    """Every drafter without weights, alone and combined."""
    size = 131

    def several() -> list[Drafter]:
        return [PromptLookup(), SuffixAutomaton(), TokenRecycling(size), AdaptiveTrigram(size, slots=256)]

    learned = Learned(folder, identity="toy", vocabulary=size, batch=8, max_bytes=1 << 22)
    return [*several(), learned, Union(several()), Cascade(several(), 0.5), Cascade(several(), 0.0)]


def test_tables_and_budgets_change_nothing(checkpoint: Folders, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
    want = {seed: plain(model, seed, NEW) for seed in SEEDS}
    accepted = set()
    for number, drafter in enumerate(tables(tmp_path)):
        drafter.close, close = lambda: None, drafter.close  # it is to remember from call to call
        for nodes in (1, 2, 7, 64, 512):
            with drafting(model, [drafter], nodes) as stats:
                for seed in SEEDS:
                    assert generate(model, seed, NEW) == want[seed], (drafter.name, nodes, seed)
            assert stats.nodes <= nodes * stats.rounds
            if stats.accepted:
                accepted.add(number)
        close()
    assert len(accepted) == 8, "some never guessed a token that came, so nothing was tested"


def test_bf16_differs_only_at_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16 a tree's pass adds up in another order, so two logits that are all but equal may change places."""
    epsilon = 2**-6  # of the logits' size: two steps from one number of bf16 to the next
    convert(PICO / "checkpoint", tmp_path / "store", plain=True, compress="off", show_progress=False)
    tokenizer = tf.AutoTokenizer.from_pretrained(PICO / "checkpoint")
    words = ("def read(self, path):\n    ", "class Tree:\n    def __init__(self", "for x in range(10):\n")
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in words]
    greedy: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def write(model: Any) -> list[list[int]]:
        return [model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0].tolist() for ids in prompts]

    drafted = []
    for kind in ("resident", "ngram"):
        options = {"drafter": kind, "draft_nodes": 24, "draft_depth": 8, "draft_fixed": True}
        with opened(tmp_path / "store", context=256, **options) as model:
            drafted += zip(prompts, write(model), strict=True)
            assert model.tiercache.stats().drafting.tokens_per_pass > 1.5
    excused = 0
    with opened(tmp_path / "store", context=256) as model, torch.no_grad():
        assert model.dtype == torch.bfloat16
        for prompt, text in drafted:  # each token is held against what plain decoding would have chosen in its place
            logits, cache = None, None
            for place, token in enumerate(text):
                if place >= prompt.shape[1]:
                    best = logits.max()
                    assert best - logits[token] <= epsilon * logits.abs().max()
                    excused += int(token != int(logits.argmax()))
                if place + 1 >= prompt.shape[1]:
                    new = torch.tensor([text[: place + 1] if cache is None else [token]])
                    made = model(new, use_cache=True, logits_to_keep=1, **cache_kwargs(model, cache))
                    logits, cache = made.logits[0, -1].float(), cache_out(made)
    with capsys.disabled():
        print(f"\n{excused} of {48 * len(drafted)} tokens differ in bf16, each at a tie")
    assert excused <= len(drafted)


def test_a_small_model_that_takes_chains_alone(plane_store: Folders, texts: Texts, tmp_path: Path) -> None:
    """The target takes trees, but the drafter, which is recurrent, can only grow chains."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 131, "hidden_size": 56, "intermediate_size": 104, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    config = tf.Lfm2Config(**sizes, **heads, bos_token_id=1, eos_token_id=2)
    small = tf.AutoModelForCausalLM.from_config(config)
    if support(small).takes == "nothing":
        pytest.skip("this transformers' recurrent models take one token a pass")
    small.save_pretrained(tmp_path / "small")
    with opened(plane_store("llama"), drafter=tmp_path / "small", draft_fixed=True, draft_width=4) as model:
        assert {seed: generate(model, seed, NEW) for seed in SEEDS} == texts("llama")
        assert model.tiercache.stats().drafting.nodes > 0


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("name", ["rsd-c", "rsd-s"])
def test_rejection_is_reproducible(name: str, plane_store: Folders, texts: Texts) -> None:
    options = {"drafter": "resident", "grower": name, "verify": "rejection", "draft_fixed": True, "draft_nodes": 12}
    with opened(plane_store("llama"), **options) as model:
        assert generate(model, None, NEW) == texts("llama")[None]
        first = [generate(model, seed, NEW) for seed in (3, 4)]
        assert [generate(model, seed, NEW) for seed in (3, 4)] == first
        stats = model.tiercache.stats()
    assert first[0] != first[1]
    drafted = stats.drafting
    assert (drafted.rule, drafted.grower, drafted.lossy, stats.lossy) == ("rejection", name, "", False)
    assert stats.drafting.accepted > 0
    with opened(plane_store("llama"), **options) as model:
        assert generate(model, 3, NEW) == first[0], "in a new run"


def test_a_shifted_target_is_named(plane_store: Folders) -> None:
    options = {"drafter": "resident", "verify": "rejection", "grower": "rsd-s", "draft_fixed": True, "draft_nodes": 8}
    written = []
    for eta in (0.0, 2000.0):  # the toy and its own planes hardly differ
        with opened(plane_store("llama"), **options, shift=eta, lossless=not eta) as model:
            written.append(generate(model, 3, NEW))
            assert generate(model, 3, NEW) == written[-1]
            stats = model.tiercache.stats()
        assert (stats.lossy, stats.drafting.lossy) == ((True, "shift=2000") if eta else (False, ""))
    assert written[0] != written[1]


def test_typical_acceptance_is_named(plane_store: Folders, texts: Texts) -> None:
    options = {"drafter": "resident", "verify": "typical", "draft_fixed": True}
    with pytest.raises(UsageError, match="lossless=False"), opened(plane_store("llama"), **options):
        pass
    with opened(plane_store("llama"), **options, lossless=False) as model:
        assert generate(model, None, NEW) == texts("llama")[None]  # the likeliest token is always good enough
        assert generate(model, 3, NEW) == generate(model, 3, NEW)
        stats = model.tiercache.stats()
    assert (stats.lossy, stats.drafting.lossy, stats.to_dict()["drafting"]["lossy"]) == (True, "typical", "typical")
    with opened(plane_store("llama"), drafter="ngram", lossless=False) as model:
        stats = model.tiercache.stats()
        assert (stats.lossy, stats.drafting.lossy, stats.drafting.rule) == (False, "", "walk")


# ---------------------------------------------------------------- refusals


class Foreign(Drafter):
    name = "foreign"
    requirements = DrafterRequirements(vocabulary=97)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"drafter": "residnet"}, r"auto, resident, ngram, lookup, .*'residnet' is neither"),
    ({"drafter": Path("no/such/folder")}, "'no/such/folder' is neither"),
    ({"drafter": 7}, r"drafter=7 is no drafter; give 'auto'"),
    ({"drafter": SuffixAutomaton}, r"SuffixAutomaton is a class; make one of it: drafter=SuffixAutomaton\(\.\.\.\)"),
    ({"drafter": "resident", "precision": "int3"}, "than precision='int3'.* ask for 'int8'"),
    ({"drafter": "resident", "kernels": "decode"}, "no kernels"),
    ({"drafter": "ngram", "mode": "mixed", "bytes_per_token": 1.0}, r"mode='mixed'.*leave one"),
    ({"drafter": "resident", "mode": "mixed", "bytes_per_token": 1.0}, r"mode='mixed'.*leave one"),
    ({"drafter": "ngram", "logits": 1}, r"logits=1.* give logits=65"),
    ({"drafter": "ngram", "draft_nodes": 0}, "draft_nodes=0"),
    ({"drafter": "ngram", "draft_nodes": 40, "logits": 40, "draft_fixed": True}, "give logits=41"),
    ({"draft_nodes": 8}, "draft_nodes= does nothing without a drafter"),
    ({"drafter": None, "verify": "walk"}, "verify= does nothing without a drafter"),
    ({"drafter": "ngram", "verify": "rejection", "grower": "rsd-c"}, r"n-grams.*choose 'resident'"),
    ({"drafter": "auto", "verify": "rejection", "grower": "rsd-s"}, r"n-grams.*choose 'resident'"),
    ({"drafter": "lookup", "verify": "rejection", "grower": "rsd-s"}, r"'lookup' looks tokens up"),
    ({"drafter": "resident", "verify": "rejection"}, r"'best-first' does not; choose 'rsd-c'"),
    ({"drafter": Foreign()}, "foreign drafts 97 tokens, the target has 131"),
]


def test_what_cannot_be_meant_is_refused(plane_store: Folders) -> None:
    before, store = surroundings(), plane_store("llama")
    for options, words in BAD:
        with pytest.raises(UsageError, match=words), opened(store, **options):
            pass
    assert surroundings() == before


def test_source_weights_have_no_planes_to_draft_by(checkpoint: Folders) -> None:
    refused = pytest.raises(UsageError, match=r"precision='source'.* ask for 'int8'")
    with refused, opened(checkpoint("llama"), precision="source", drafter="resident"):
        pass


def test_a_small_model_must_mean_the_same_tokens(checkpoint: Folders, plane_store: Folders, tmp_path: Path) -> None:
    config = architectures.CONFIGS["llama"]()
    config.vocab_size = 97
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    refused = pytest.raises(UsageError, match=r"small has 97 tokens and the target 131.*target's tokenizer")
    with refused, opened(plane_store("llama"), drafter=tmp_path / "small"):
        pass
    with pytest.raises(StoreError, match=r"no config\.json"), opened(plane_store("llama"), drafter=tmp_path):
        pass
    for name, tokens in (("one", "abc"), ("two", "acb"), ("three", "abc")):
        shutil.copytree(checkpoint("llama"), tmp_path / name)
        made = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="a"))
        made.save(str(tmp_path / name / "tokenizer.json"))
    refused = pytest.raises(UsageError, match="they mean others")
    with refused, opened(tmp_path / "one", precision="source", drafter=tmp_path / "two"):
        pass
    with opened(tmp_path / "one", precision="source", drafter=str(tmp_path / "three")) as model:
        assert model.tiercache.stats().drafting.drafters == ("lm",)


# ---------------------------------------------------------------- budgets


def asked(store: Path, **options: Any) -> Least:
    with opened(store, **options) as model:
        return Least(model.tiercache._asked.needs)


@pytest.mark.usefixtures("at_any_price")
@pytest.mark.parametrize("learned", [False, True])
def test_auto_without_room_for_planes_drafts_by_tables_and_says_so(
    learned: bool, plane_store: Folders, texts: Texts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"drafter": "auto", "learned": tmp_path / "tables" if learned else None}
    store = plane_store("llama")
    sizes = asked(store, **options).streaming(-1)
    with opened(store, show_progress=None, **options, **sizes) as model:
        assert model.tiercache.stats().drafting.drafters == ("ngram",)
        assert generate(model, None, NEW) == texts("llama")[None]
    said = capsys.readouterr().err
    assert said.count("drafting by n-grams alone") == 1
    assert "1 B more of dram" in said
    with opened(store, show_progress=None, **options, **asked(store, **options).streaming(0)) as model:
        assert model.tiercache.stats().drafting.drafters != ("ngram",)
        assert model.tiercache.run.resident_bytes > 0
    assert "n-grams alone" not in capsys.readouterr().err


def decoded_plainly(store: Path, want: dict[int | None, list[int]], sizes: dict[str, int], said: str) -> Any:
    """Opens with "auto", which is to take plain decoding's placement for what `said` matches; the statistics."""
    with opened(store, **sizes) as model:
        plan = model.tiercache.plan
    with opened(store, drafter="auto", **sizes) as model:
        assert model.tiercache.plan == plan
        assert {seed: generate(model, seed, NEW) for seed in SEEDS} == want, "room to draft changes no text"
        torch.manual_seed(3)
        both = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        out = model.generate(IDS, do_sample=True, temperature=0.5, top_k=0, max_new_tokens=4, pad_token_id=0, **both)
        for scores, logits in zip(out.scores, out.logits, strict=True):
            torch.testing.assert_close(scores, logits / 0.5)
        stats = model.tiercache.stats().drafting
    ((reason, calls),) = stats.plain_reasons.items()
    assert re.search(said, reason)
    assert (calls, stats.rounds, stats.drafters) == (3, 0, ())
    return stats


def test_auto_decodes_plainly_where_drafting_has_no_room(plane_store: Folders, texts: Texts) -> None:
    store = plane_store("llama")
    for sizes in (asked(store).streaming(0), asked(store).two(0)):
        stats = decoded_plainly(store, texts("llama"), sizes, r"^to draft at all takes \d.* more of (hbm|dram)$")
        assert stats.room_price is None


def test_auto_decodes_plainly_where_its_room_costs_more_than_it_can_win(
    plane_store: Folders, texts: Texts, capsys: pytest.CaptureFixture[str]
) -> None:
    store = plane_store("llama")
    sizes = {"hbm": asked(store, drafter="resident").two(66_000)["hbm"]}  # copies there are as fast as products
    assert decoded_plainly(store, texts("llama"), sizes, "^its room would make a pass take 1").room_price > 1
    with opened(store, show_progress=None, drafter="auto", **sizes):
        assert "decoding without drafting, for its room would make" in capsys.readouterr().err


def test_auto_drafts_by_tables_where_its_room_costs_nothing(
    plane_store: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(plane_store("llama"), show_progress=None, drafter="auto") as model:
        stats = model.tiercache.stats().drafting
        assert (stats.drafters, stats.room_price) == (("ngram",), 1.0)
    assert "n-grams alone: no pass waits for a slower tier" in capsys.readouterr().err


def test_auto_drafts_by_its_own_planes_where_passes_wait_for_a_link(
    plane_store: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = plane_store("llama")
    monkeypatch.setattr(room, "TOKENS", 3.0)  # beside weights of a toy any room is large
    # Beside halves of a toy's layers, held at once, uncut units leave less room than planes do, and that decides.
    small: dict[str, Any] = {"draft_nodes": 1, "draft_depth": 1, "kernels": "unfused"}
    sizes = {"hbm": asked(store, drafter="resident", **small).two(20_000)["hbm"]}
    with opened(store, drafter="auto", link_gbps=0.05, **small, **sizes) as model:
        stats = model.tiercache.stats().drafting
    assert stats.drafters == ("cascade",)
    assert 1 < stats.room_price < 3
    stats.tokens, stats.verify_s, stats.plain_passes_s = 30, 10.0, [0.5]
    assert stats.speed_up == pytest.approx(1.5 / stats.room_price)
    with opened(store, drafter="auto", link_gbps=0.05, cpu_tokens=None, **small, **sizes) as model:
        assert "cascade" not in model.tiercache.stats().drafting.drafters  # the CPU multiplies in DRAM: no pass waits


def test_auto_where_there_are_no_planes_says_so(plane_store: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(plane_store("llama"), show_progress=None, drafter="auto", precision="int3") as model:
        assert model.tiercache.stats().drafting.drafters == ("ngram",)
    assert capsys.readouterr().err.count("n-grams alone at precision='int3'") == 1


def test_resident_says_how_much_is_missing(plane_store: Folders) -> None:
    store = plane_store("llama")
    for sizes in (asked(store, drafter="resident").streaming(0), asked(store, drafter="resident").two(0, 0)):
        for tier in sizes:
            less = sizes | {tier: sizes[tier] - 7}
            with pytest.raises(DoesNotFitError, match=rf"{tier}=.*\(7 bytes\)") as refusal:
                opened(store, drafter="resident", **less).__enter__()
            assert (refusal.value.missing_bytes, refusal.value.tier) == (7, tier)
        with opened(store, drafter="resident", draft_fixed=True, **sizes) as model:
            generate(model, None, NEW)
            assert model.tiercache.stats().drafting.accepted > 0


def test_a_refusal_leaves_the_tables_closed(plane_store: Folders, tmp_path: Path) -> None:
    options = {"drafter": "ngram", "learned": tmp_path / "tables"}
    with pytest.raises(DoesNotFitError) as refusal, opened(plane_store("llama"), dram="1B", **options):
        pass
    with opened(plane_store("llama"), **options) as model:
        generate(model, None, 4)
    assert refusal.value.__traceback__ is not None, "and all that it held was still alive"


# ---------------------------------------------------------------- lifetime


def interrupted(model: Any, error: type, after: int, seed: int | None) -> None:
    """`generate` until some layer has run so many times."""
    left = after

    def boom(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise error

    handle = model.get_submodule("model.layers.1.mlp.up_proj").register_forward_pre_hook(boom)
    try:
        with pytest.raises(error):
            generate(model, seed, NEW)
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
def test_a_call_that_is_cut_off_leaves_the_model_usable(
    error: type, plane_store: Folders, texts: Texts, turns: None
) -> None:
    around, want = surroundings(), texts("llama")
    with opened(plane_store("llama"), drafter="auto") as model:
        sizes = places(model)["hbm"]
    with opened(plane_store("llama"), drafter="auto", **sizes) as model:
        for after in (1, 2, 4, 9):  # in the prompt, in drafting passes and in verifying ones
            interrupted(model, error, after, 3)
            assert not model.tiercache.run.next_pass.resident
            assert {seed: generate(model, seed, NEW) for seed in SEEDS} == want
        with pytest.raises(UsageError, match="no weights"):
            model.state_dict()
    assert surroundings() == around


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # of older transformers, for a closed model
def test_leaving_by_an_exception(plane_store: Folders, tmp_path: Path) -> None:
    around, tables = surroundings(), tmp_path / "tables"
    kept = type(architectures.build("llama"))
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(BoomError))
        model = stack.enter_context(opened(plane_store("llama"), drafter="auto", learned=tables))
        generate(model, None, NEW)
        assert type(model) is not kept
        raise BoomError
    assert type(model) is kept
    assert not hasattr(model, "tiercache")
    with pytest.raises(ClosedError):
        generate(model, None, NEW)
    assert surroundings() == around


def test_drafters_go_when_the_context_ends(checkpoint: Folders, plane_store: Folders) -> None:
    gc.collect()
    gc.disable()  # a small model is not to wait for a collection of garbage
    try:
        for drafter in (checkpoint("llama"), "auto"):
            with opened(plane_store("llama"), drafter=drafter) as model:
                generate(model, 3, NEW)
                (hook,) = (cell.cell_contents for cell in type(model)._sample.__closure__)
                found = [weakref.ref(one) for one in hook._scheduler._drafters]
                del hook
            assert not any(one() for one in found)
    finally:
        gc.enable()


def test_what_was_written_is_learnt(plane_store: Folders, texts: Texts, tmp_path: Path) -> None:
    around, want = surroundings(), texts("llama")[None]
    options = {"drafter": "ngram", "draft_fixed": True, "learned": tmp_path / "tables"}
    passes = []
    for _ in range(2):
        with opened(plane_store("llama"), **options) as model:
            assert generate(model, None, NEW) == want
            passes.append(model.tiercache.stats().drafting.rounds)
        assert surroundings() == around
    assert passes[1] < passes[0] - 2
    kept = Learned(tmp_path / "tables", identity="llama of 131 tokens", vocabulary=131)
    kept.begin(Context(want[: len(PROMPT) + 2], 131))
    tree = kept.propose(TreeBudget(8, depth=4, width=1))
    kept.close()
    assert list(tree.tokens) == want[len(PROMPT) + 2 :][:4]
    refused = pytest.raises(StoreError, match="another folder")
    with refused, opened(plane_store("gpt2"), **options):
        pass


@pytest.mark.parametrize("new", [1, 2, NEW, 40])
def test_plain_passes_are_learnt_from_as_well(
    new: int, plane_store: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budgeter, "decide", lambda budgeter, room=None: RoundPlan(None, 0, 0, 8, 0.0, 0.0))
    with opened(plane_store("llama"), drafter="ngram", learned=tmp_path) as model:
        text = generate(model, 3, new)
        assert model.tiercache.stats().drafting.nodes == 0
    kept = Learned(tmp_path, identity="llama of 131 tokens", vocabulary=131)
    kept.begin(Context(text[:-1], 131))
    tree = kept.propose(TreeBudget(8, depth=1, width=8))
    kept.close()
    assert text[-1] in tree.tokens


def test_the_context_is_the_limit_that_it_is_for_plain_decoding(plane_store: Folders, turns: None) -> None:
    def run(model: Any, length: int, new: int) -> str:
        ids = torch.arange(3, 3 + length)[None]
        options = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False}
        try:
            return str(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist())
        except ContextExceededError as error:
            return error.args[0].split(";")[1]

    outcomes: dict[str | None, list[str]] = {}
    calls = [(9, 4), (9, 5), (9, 40), (12, 1), (12, 2), (13, 1), (20, 3), (9, 4)]
    for drafter in (None, "resident", "ngram"):
        with opened(plane_store("llama"), context=12, drafter=drafter) as model:
            outcomes[drafter] = [run(model, *call) for call in calls]
    assert outcomes["resident"] == outcomes["ngram"] == outcomes[None]
    assert sum("context=" in outcome for outcome in outcomes[None]) == 5


# ---------------------------------------------------------------- what a drafter is told


class Curious(Oracle):
    """Knows what comes, writes down what it is told, and checks it."""

    name = "curious"
    requirements = DrafterRequirements(topk=3, logits=True, host_bytes=12345, device_bytes=777)

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__(text)
        self.calls: list[str] = []

    def propose(self, budget: TreeBudget) -> DraftTree:
        self.calls.append("propose")
        path = super().propose(budget).tokens[:3]
        beside = [(token + 1) % 131 for token in path]  # each has a sibling that is wrong
        parents = [parent for depth in range(len(path)) for parent in [2 * depth - 2 if depth else -1] * 2]
        return DraftTree(tuple(token for pair in zip(path, beside, strict=True) for token in pair), tuple(parents))

    def observe(self, feedback: Feedback) -> None:
        self.calls.append("observe")
        self._check(feedback)

    def _check(self, feedback: Feedback) -> None:
        assert feedback.topk is not None
        assert feedback.logits is not None
        assert feedback.logits.shape == (1 + len(feedback.tree), 131)
        assert torch.equal(feedback.topk, feedback.logits.topk(3).indices)


@pytest.mark.parametrize("piece", [None, 3])
def test_a_drafter_gets_what_it_asks_for(piece: int | None, checkpoint: Folders) -> None:
    resident = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
    want = generate(resident, None, NEW)
    drafter = Curious(want)
    with opened(checkpoint("llama"), precision="source", drafter=drafter, draft_fixed=True) as model:
        assert generate(model, None, NEW, prefill_chunk_size=piece) == want
        stats, plan = model.tiercache.stats().drafting, model.tiercache.plan
    assert drafter.calls == ["observe", *["propose", "observe"] * stats.rounds]
    assert stats.rounds > 1
    assert stats.accepted == stats.tokens - stats.rounds > stats.rounds
    assert plan.dram.reserved_bytes["tables of the drafter"] == 12345
    assert plan.dram.reserved_bytes["drafter and trees"] > 777


def test_what_a_drafter_raises_is_raised(checkpoint: Folders) -> None:
    class Breaks(Drafter):
        def propose(self, budget: TreeBudget) -> DraftTree:
            raise BoomError

    with opened(checkpoint("llama"), precision="source", drafter=Breaks(), draft_fixed=True) as model:
        with pytest.raises(BoomError):
            generate(model, None, NEW)
        assert model(IDS).logits.shape == (1, len(PROMPT), 131)


# ---------------------------------------------------------------- drafters of one's own, and by name


class Wrong(Drafter):
    name = "wrong"

    def propose(self, budget: TreeBudget) -> Any:
        return [1, 2, 3]


def test_a_drafter_by_name_and_one_that_proposes_no_tree(plane_store: Folders, texts: Texts) -> None:
    with opened(plane_store("llama"), drafter="lookup", draft_fixed=True) as model:
        assert generate(model, None, NEW) == texts("llama")[None]
        assert model.tiercache.stats().drafting.drafters == ("lookup",)
    refused = pytest.raises(DraftError, match="proposed a list, not a DraftTree")
    with opened(plane_store("llama"), drafter=Wrong(), draft_fixed=True) as model, refused:
        generate(model, None, NEW)


def test_one_may_watch_the_drafts(plane_store: Folders, texts: Texts) -> None:
    with opened(plane_store("llama"), drafter="resident", draft_fixed=True) as model:
        with model.tiercache.drafts() as rounds:
            written = generate(model, None, NEW)
        nodes, told = model.tiercache.stats().drafting.nodes, model.tiercache.explain()
        generate(model, None, NEW)  # nobody watches any longer
    assert written == texts("llama")[None]
    assert told["tokens_per_pass"] == NEW / (1 + len(rounds)) > 1
    assert [token for each in rounds for token in each.emitted] == written[1 - NEW :]
    assert sum(len(each.tree) for each in rounds) == nodes > 0
    assert all(
        [each.tree.tokens[node] for node in each.path] == list(each.emitted[: len(each.path)]) for each in rounds
    )
    assert all(each.logits is None and each.topk is None for each in rounds)
    with opened(plane_store("llama")) as model, pytest.raises(UsageError, match="nobody drafts"):
        model.tiercache.drafts()
