"""The base class of the neuron cache's eviction policies; they answer in slots and neurons, whole arrays at a time.

`policies.neurons` asks them, and `policies.eviction` knows them all by name.
"""

from __future__ import annotations

from policies.arrays import BoolArray, IntArray, np


def nothing() -> IntArray:
    """No neurons, or no slots: [0]."""
    return np.empty(0, dtype=np.int64)


class Eviction:
    """Decides which neurons come and which leave. A policy is a subclass that has `victims`; the rest has defaults.

    Of a step, `admit`, `victims` and `loaded` are called once each, in this order, even when there is nothing to
    load. Every slot that `victims` names is emptied and filled in that step. Arrays that a policy is given may be
    read until it returns; `slots` of `loaded` and `hits` of `victims` may be kept, and are never written to. Before the
    first step `loaded` is called once for the neurons that fill the slots at the start, least important first. Each
    layer and plane has an instance of its own. After `reset` the same calls give the same answers.
    """

    def reset(self, neurons: int, slots: int) -> None:
        """Forget everything: `slots` empty slots for the neurons of [0, `neurons`). Called before anything else."""

    def preload(self) -> IntArray:
        """Neurons [at most slots] that this policy would start with, most important first; empty: no opinion."""
        return nothing()

    def admit(self, wanted: IntArray, misses: IntArray) -> IntArray:
        """Which of `misses` are worth bringing, first first; all of them unless the policy says otherwise.

        Args:
            wanted: the neurons of this step [wanted], most important first.
            misses: those of them that are in no slot, in the same order.
        """
        return misses

    def victims(self, hits: IntArray, evictable: BoolArray, count: int) -> IntArray:
        """At most `count` distinct slots to empty.

        Args:
            hits: slots of the wanted neurons that are here, most important first.
            evictable: [slots], True for a slot that is full and whose neuron is not wanted now.
            count: at most the number of True; often 0.
        """
        raise NotImplementedError

    def loaded(self, neurons: IntArray, slots: IntArray) -> None:
        """Neurons that were brought just now, in this order, and the slot of each."""
