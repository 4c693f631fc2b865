"""What a request asks of the generator: its prompts as tokens, within what the model can do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiercache.errors import UsageError
from tiercache.generation.chat_template import templated
from tiercache.generation.request import GenerationRequest
from tiercache.serve.refusal import RefusalError
from tiercache.serve.schema import ChatRequest, CompletionRequest, Sampling
from tiercache.serve.served import Served

_COMPLETION_TOKENS = 16  # where a request for completions does not say; as OpenAI's API has it


@dataclass(frozen=True)
class Part:
    """One prompt.

    Attributes:
        ids: its tokens.
        text: what `echo` repeats; None where nothing is repeated.
        score: for so many likeliest tokens, log-probabilities of the prompt's own are wanted; None for none.
        request: what is generated; None for nothing.
    """

    ids: tuple[int, ...]
    text: str | None
    score: int | None
    request: GenerationRequest | None


def of_chat(served: Served, body: ChatRequest) -> tuple[Part, ...]:
    """A chat's messages in the model's template.

    Raises:
        RefusalError: no template, messages that it does not take, or more tokens than the context.
    """
    _check_model(served, body)
    ids = _ids(served.tokenizer, body)
    tops = (body.top_logprobs or 0) if body.logprobs else None
    tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    return (Part(ids, None, None, _request(served, body, ids, tokens, tops)),)


def of_completion(served: Served, body: CompletionRequest) -> tuple[Part, ...]:
    """Each prompt as it is.

    Raises:
        RefusalError: an empty prompt, a token that the model does not know, or more tokens than the context.
    """
    _check_model(served, body)
    return tuple(_part(served, body, prompt) for prompt in body.prompt)


def _part(served: Served, body: CompletionRequest, prompt: str | list[int]) -> Part:
    ids = tuple(served.tokenizer(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt)
    if ids and not 0 <= min(ids) <= max(ids) < served.vocabulary:
        raise RefusalError(400, f"token ids are from 0 to {served.vocabulary - 1}", param="prompt")
    tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    request = None if tokens == 0 else _request(served, body, ids, tokens, body.logprobs)
    _check_room(served, ids, 0, "prompt")
    if not body.echo:
        return Part(ids, None, None, request)
    text = prompt if isinstance(prompt, str) else served.tokenizer.decode(ids)
    return Part(ids, text, body.logprobs, request)


def _request(
    served: Served, body: Sampling, ids: tuple[int, ...], tokens: int | None, logprobs: int | None
) -> GenerationRequest:
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    _check_room(served, ids, 1, param)
    if tokens is None:
        tokens = min(served.max_tokens, served.generator.context - len(ids))
    if tokens > served.max_tokens:
        raise RefusalError(
            400, f"max_tokens {tokens} is above this server's {served.max_tokens}; ask for fewer", param="max_tokens"
        )
    _check_room(served, ids, tokens, param)
    default = served.defaults
    temperature = default.temperature if body.temperature is None else body.temperature
    greedy = temperature == 0  # whatever a share of the likeliest tokens is, the likeliest is among them
    return GenerationRequest(
        ids,
        tokens,
        temperature,
        1.0 if greedy else default.top_p if body.top_p is None else body.top_p,
        0 if greedy else min(default.top_k if body.top_k is None else body.top_k, served.vocabulary),
        body.seed,
        body.stops,
        logprobs,
    )


def _check_model(served: Served, body: Sampling) -> None:
    if body.model is not None and body.model != served.name:
        raise RefusalError(
            404, f"this server has the model {served.name!r} and no other", code="model_not_found", param="model"
        )


def _check_room(served: Served, ids: Sequence[int], new: int, param: str) -> None:
    if not ids:
        raise RefusalError(400, "the prompt holds no token to start from; give some text", param=param)
    if len(ids) + new > served.generator.context:
        raise RefusalError(
            400,
            f"a prompt of {len(ids)} tokens and {new} new ones are more than the context of "
            f"{served.generator.context}; ask for fewer, or start the server with a larger --context",
            code="context_length_exceeded",
            param=param,
        )


def _ids(tokenizer: Any, body: ChatRequest) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        raise RefusalError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
    talk = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in body.messages
    ]
    try:
        return templated(tokenizer, talk)
    except UsageError as error:
        raise RefusalError(400, str(error), param="messages") from error
