"""A model whose weights lie in their tiers, before its modules know of it. Knows the parts; decides nothing."""

from contextlib import ExitStack
from dataclasses import dataclass

from policies.plan import Plan
from tiercache.config.options import OffloadConfig
from tiercache.engine.machine import Machine
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.source import Opened
from tiercache.tiers.link import Link
from tiercache.tiers.stack import TierStack


@dataclass(frozen=True)
class Loaded:
    """See the module.

    Attributes:
        stack: closes what is opened, in reverse order, when the model is closed.
        config: the options.
        machine: where the model runs.
        opened: the model.
        asked: what it asked of memory.
        plan: what lies where.
        tiers: hold the weights.
        link: what copies to the HBM tier cross.
    """

    stack: ExitStack
    config: OffloadConfig
    machine: Machine
    opened: Opened
    asked: MemoryRequirements
    plan: Plan
    tiers: TierStack
    link: Link
