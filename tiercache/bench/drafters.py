"""Every drafter against plain decoding of the same model in the same setting, as a table; see `drafters_contest`.

Speeds are of the tokens after the first, whose seconds stand beside.
"""

import os
from typing import Any

import torch

from tiercache import __version__
from tiercache.bench import drafters_capped
from tiercache.bench.drafters_contest import Contest, Visitor
from tiercache.bench.drafters_options import Options
from tiercache.doctor.checks import processor_name

SCHEMA = "tiercache.drafters/1"


def bench(options: Options, visit: Visitor = drafters_capped.visit) -> dict[str, Any]:
    """Measure.

    Args:
        options: what.
        visit: measures one way of decoding under a cap.

    Raises:
        TiercacheError: a drafted text is not what it should be, or a process under the cap failed.
        UsageError, StoreError, DoesNotFitError: as `offload` has them.
    """
    contests = [Contest(options, model, visit) for model in options.models]
    for contest in contests:
        contest.run()
    measured = [each for contest in contests for each in contest.measured]
    return {
        "schema": SCHEMA,
        "rows": [each.row() for each in measured],
        "details": [each.details() for each in measured],
        "auto": [duel for contest in contests for duel in contest.duels],
        "left_out": [each for contest in contests for each in contest.left_out],
        "models": [contest.describe() for contest in contests],
        "tiercache": __version__,
        "torch": torch.__version__,
        "hardware": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        "seeds": list(options.seeds),
        "prompts": options.prompts,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "plain_tokens": options.plain_tokens or options.tokens,
        "repeats": options.repeats,
    }
