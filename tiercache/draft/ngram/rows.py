"""Finds the two tokens that precede each row of the target's likeliest tokens."""

import numpy as np

from tiercache.draft.base import Context, Feedback

NONE = -1  # no token


def likeliest(feedback: Feedback, most: int) -> np.ndarray | None:
    """The target's likeliest tokens of each row, best first [rows, most]; `NONE` where it told fewer.

    Returns:
        None where it told none.
    """
    if feedback.topk is None:
        return None
    told = feedback.topk[:, :most].numpy(force=True)
    found = np.full((len(told), most), NONE, dtype=np.int32)
    found[:, : told.shape[1]] = told
    return found


def newest(context: Context, feedback: Feedback, rows: int) -> np.ndarray:
    """The two newest tokens before what each of the feedback's rows predicts [rows, 2]; `NONE` before the first."""
    root = len(context.tokens) - len(feedback.emitted) - 1
    nodes = len(feedback.tree)
    if not nodes:  # a prompt: rows are of its last tokens
        tokens = [NONE, *context.tokens[max(0, root - rows) : root + 1]]
        return np.array(list(zip(tokens[-rows - 1 : -1], tokens[-rows:], strict=True)), dtype=np.int64).reshape(-1, 2)
    before = context.tokens[root - 1] if root else NONE
    tokens_of = np.array([*feedback.tree.tokens, context.tokens[root]], dtype=np.int64)  # the root is number -1
    found = np.empty((nodes + 1, 2), dtype=np.int64)
    found[0] = before, context.tokens[root]
    found[1:, 0] = tokens_of[np.array(feedback.tree.parents)]
    found[1:, 1] = tokens_of[:-1]
    return found
