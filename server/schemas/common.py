"""What all bodies share: strictness, bounded strings and lists, and errors that name a field.

Requests are validated once, strictly, from JSON. Lists stop at the first bad item, so that a hostile body cannot make a
million error reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from prompts_store.reference import MAX_NAME

MAX_TEXT = 4_000_000  # characters
MAX_IDS = 1_000_000  # token ids of one text
MAX_TEXTS = 256  # texts of one request
MAX_SEQUENCES = 256  # texts times n
MAX_MESSAGES = 2048
MAX_REFERENCE = MAX_NAME * 2 + 1

T = TypeVar("T")
Policy = Literal["exact", "transfer", "optional", "none"]

SoftTokens = Annotated[
    int, Field(ge=1, le=1_000_000, description="use the first positions of the prompt alone, so many of them")
]


class Body(BaseModel):
    """A request body: nothing unknown, nothing coerced, nothing infinite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Answer(BaseModel):
    """An answer as it is documented and tested. Routes build plain dicts of this form: it is never on the hot path."""

    model_config = ConfigDict(protected_namespaces=())


def example(**body: Any) -> ConfigDict:
    """The configuration of a body with an example for the documentation."""
    return ConfigDict(json_schema_extra={"examples": [body]})


def refuse(param: str, message: str, code: str = "invalid_value") -> PydanticCustomError:
    """The error of a rule that spans fields. `param` is the JSON pointer of the one to change."""
    return PydanticCustomError("refused", "{why}", {"why": message, "param": param, "code": code})


def _no_null(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not hold a null character")
    return value


NoNull = AfterValidator(_no_null)
NO_NULL_SCHEMA: dict[str, Any] = {"pattern": r"^[^\x00]*$"}

Text = Annotated[str, NoNull, Field(max_length=MAX_TEXT, json_schema_extra=NO_NULL_SCHEMA)]
Short = Annotated[str, NoNull, Field(max_length=512, json_schema_extra=NO_NULL_SCHEMA)]
ModelName = Annotated[str, NoNull, Field(min_length=1, max_length=MAX_REFERENCE, json_schema_extra=NO_NULL_SCHEMA)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_IDS)]


def one_of(message: str, *kinds: tuple[str, Callable[[Any], bool]]) -> Discriminator:
    """Chooses the branch of a union by the JSON type, so that an error speaks of one branch only.

    Tags are written `<…>`: `errors.invalid_value` leaves them out of JSON pointers.
    """

    def tag(value: Any) -> str | None:
        return next((name for name, holds in kinds if holds(value)), None)

    return Discriminator(tag, custom_error_type="wrong_type", custom_error_message=f"must be {message}")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def list_of(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    """True for a list that begins with such an item."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], kind)

    return holds


StopText = Annotated[str, NoNull, Field(min_length=1, max_length=256, json_schema_extra=NO_NULL_SCHEMA)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")] | Annotated[list[StopText], Field(fail_fast=True, max_length=16), Tag("<list>")],
    one_of("a string or a list of strings", ("<text>", is_text), ("<list>", is_list)),
]


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), Tag("<list>")],
    one_of("a string or a list of text parts", ("<text>", is_text), ("<list>", is_list)),
]


class Message(Body):
    """One turn. `developer` is rendered as `system`; a `name` has no effect."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Short | None = None
    # What clients send back of an answer.
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def rendered(self) -> dict[str, str]:
        """The message as the chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": content}


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class Usage(Answer):
    """Tokens as OpenAI counts them; the soft ones apart."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    soft_tokens: int
    prompt_tokens_details: dict[str, int]


class StitchedPrompt(Answer):
    """Which prompt stands in front of the text, and why."""

    task: str
    version: int
    digest: str
    level: str
    resolution: Literal["exact", "transferred"]
    same_weights: bool | None
    same_chat_template: bool
    measured: bool | None = None


class ErrorInfo(Answer):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None


class ErrorAnswer(Answer):
    """The one form of every error."""

    error: ErrorInfo
