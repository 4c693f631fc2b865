"""How sharply a drafter's scores tell which token will be accepted, learnt from what was.

A drafter that is nearly the target is right almost always, whatever probability it gives its best guess: where both
are given the same noise, only the gap between scores counts, against the drafter's own error in them. One factor on
the scores before their softmax makes confidences as high, on average, as guesses are accepted (temperature scaling,
Guo et al., arXiv 1706.04599, section 4.2, here step by step).
"""

import math

_FIRST_STEP, _LAST_STEP = 1.5, 0.2
_LEAST, _MOST = 0.125, 32.0


class TemperatureScaling:
    """The factor; see the module.

    Attributes:
        value: to multiply scores by; 1 before anything was seen.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._seen = 0

    def observe(self, confidence: float, accepted: bool) -> None:
        """What became of the best guess at one node: a step up if it was accepted more surely than thought, or down.

        Raises:
            ValueError: a confidence that is no probability.
        """
        if not 0 <= confidence <= 1 + 1e-6:
            raise ValueError(f"confidence {confidence}; give a probability")
        self._seen += 1
        step = max(_LAST_STEP, _FIRST_STEP / math.sqrt(self._seen))
        self.value = min(_MOST, max(_LEAST, self.value * math.exp(step * (accepted - confidence))))
