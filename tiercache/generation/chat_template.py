"""Messages as the tokens of a model's chat template. Knows no model, and not who asks."""

from typing import Any

from tiercache.errors import UsageError

_LONGEST = 200  # letters of a template's own words


def templated(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """Tokens up to where the answer begins.

    Args:
        tokenizer: carries the template.
        messages: of each its `role` and `content`.

    Raises:
        UsageError: the template does not take them, and why.
    """
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template is a program of the model's makers, and refuses by whatever it raises
        reason = str(error).partition("\n")[0][:_LONGEST]
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise UsageError(f"this model's chat template refuses messages of {roles}: {reason}; leave one out") from error
    return tuple(found["input_ids"])
