"""What may be asked: the bodies of requests, checked to the last field.

A field that this server cannot act on is refused unless its value asks for nothing; so nothing is ever ignored that
would change an answer. What changes none is listed as harmless.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 64  # of one request for completions
MAX_TOP_LOGPROBS = 20

# Fields that no answer depends on here, in every request; any value is taken.
HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")

# Fields that would change the answer, and the values of theirs that ask for nothing; null always does.
_OF_BOTH: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
OF_CHAT = _OF_BOTH | {
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),  # of tools, which there are none of
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
OF_COMPLETIONS = _OF_BOTH | {"best_of": (1,), "suffix": ("",)}
_OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}

_INT64 = 2**63


def _declare_fields(schema: dict[str, Any], cls: type[Any]) -> None:
    """Tell OpenAPI of the fields that are checked by table."""
    neutral = {name: {"enum": [None, *values]} for name, values in cls.neutral.items()}
    schema["properties"] |= neutral | {name: {} for name in cls.harmless}


class Strict(BaseModel):
    """A body without unknown fields; `neutral` and `harmless` are checked, and dropped."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_declare_fields)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    harmless: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, values in cls.neutral.items():
            if name in given and given[name] is not None and given[name] not in values:
                only = " or ".join(map(repr, values)) or "null"
                raise PydanticCustomError(
                    "unsupported",
                    "{field} is not supported here; leave it out (or {only})",
                    {"field": name, "only": only},
                )
        return {name: value for name, value in given.items() if name not in cls.neutral and name not in cls.harmless}


def _letters(text: str) -> str:
    """JSON can carry halves of letters, which no tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("text", "half of a surrogate pair is no Unicode; send whole letters")
    return text


Text = Annotated[str, AfterValidator(_letters)]


def _texts(given: Any) -> Any:
    """One text, or several parts of text, as one."""
    if not isinstance(given, list):
        return given
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "unsupported", "a content part of type {kind} is not supported; give text", {"kind": repr(kind)[:40]}
            )
    return "".join(part["text"] for part in given)


_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    },
}
Content = Annotated[Text, BeforeValidator(_texts), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})]


class Message(Strict):
    """One message of a chat. Tools are refused, so there are no messages of theirs."""

    neutral = _OF_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(Strict):
    """How an answer is streamed."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}
    include_usage: bool | None = None


Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Sampling(Strict):
    """What requests of both kinds have in common."""

    harmless = HARMLESS
    model: Annotated[str, Field(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _meant(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("unmeant", "stream_options does nothing without stream; set stream to true")
        if self.temperature is not None and 0 < self.temperature < 1e-4:
            raise PydanticCustomError("unmeant", "a temperature between 0 and 0.0001 overflows; give 0")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


_Tokens = Annotated[int, Field(lt=_INT64)]


class ChatRequest(Sampling):
    """The body of `/v1/chat/completions`."""

    neutral = OF_CHAT
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[_Tokens, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[_Tokens, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("unmeant", "top_logprobs does nothing without logprobs; set logprobs to true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("unmeant", "max_tokens and max_completion_tokens differ; give one")
        return self


def _prompts(given: Any) -> list[str] | list[list[int]]:
    """One or several prompts, each a text or tokens, as a list."""
    several: Any = [given] if isinstance(given, str) or _all(given, int) else given
    if _all(several, str) or (_all(several, list) and all(_all(tokens, int) for tokens in several)):
        found: list[str] | list[list[int]] = several
        if len(found) <= MAX_PROMPTS:
            return found
    raise PydanticCustomError(
        "prompt",
        "prompt must be a text, a list of texts, a list of token ids or a list of such lists, {most} at most and none "
        "of them empty",
        {"most": MAX_PROMPTS},
    )


def _all(given: Any, kind: type) -> bool:
    """Whether it is a list of such things, and not empty; true and false are no numbers."""
    return isinstance(given, list) and bool(given) and all(type(one) is kind for one in given)


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
Prompts = Annotated[list[Text] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionRequest(Sampling):
    """The body of `/v1/completions`. With `echo`, `max_tokens` may be 0: the prompt alone is scored."""

    neutral = OF_COMPLETIONS
    prompt: Prompts
    max_tokens: Annotated[_Tokens, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _asks(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("unmeant", "max_tokens 0 asks for nothing without echo; give 1 or more")
        return self
