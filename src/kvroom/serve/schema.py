"""What a client may say: bodies of the three generating routes become one `Call`, or one `BadRequest` naming the field.

Keys that we do not know are allowed, because routers add some. Keys that we know and cannot honour (`UNSUPPORTED`)
are refused unless they hold the value that asks for nothing: a feature is never dropped in silence.
Field names and defaults are those of the OpenAI API (`/v1/...`) and of SGLang (`/generate`).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from kvroom.core.messages import RoomNumber
from kvroom.status.answers import BadRequest
from kvroom.wire.address import HostPort

Route = Literal["generate", "completions", "chat"]
"""Which of the three generating routes a body came by."""

MAX_SEQUENCES = 128
MAX_STOP_STRINGS = 16
_SHOWN_CHARS = 80


TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, lt=2**31)]
MaxTokens = Annotated[int, Meta(ge=1, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Sequences = Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None
Port = Annotated[int, Meta(ge=1, lt=65536)]
Host = Annotated[str, Meta(min_length=1, max_length=255)]
T = TypeVar("T")


class _Routed(msgspec.Struct, kw_only=True):
    """What the router adds. One value, or a list with one per sequence."""

    bootstrap_host: Host | list[Host] | None = None
    bootstrap_port: Port | list[Port] | None = None
    bootstrap_room: RoomNumber | list[RoomNumber] | None = None
    model: str = ""
    stream: bool = False


class StreamOptions(msgspec.Struct, kw_only=True):
    """`include_usage`: end the stream with a chunk that has no choices and the token counts."""

    include_usage: bool = False


class _OpenAI(_Routed, kw_only=True):
    n: Sequences | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: Stop = None
    ignore_eos: bool = False
    max_tokens: MaxTokens | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None


class CompletionBody(_OpenAI, kw_only=True):
    """`POST /v1/completions`. A prompt is text or token ids; a list of them is one choice each."""

    prompt: str | list[str | TokenId | list[TokenId]]


class TextPart(msgspec.Struct, kw_only=True):
    """One part of a message's content. Only text can be answered."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, kw_only=True):
    """One turn; the tokenizer's chat template decides which roles it accepts."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """Role and content as the chat template takes them."""
        parts = self.content if isinstance(self.content, list) else None
        text = "".join(part.text for part in parts) if parts is not None else self.content
        return {"role": self.role, "content": str(text or "")}


class ChatBody(_OpenAI, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None


class SamplingParams(msgspec.Struct, kw_only=True):
    """SGLang's `sampling_params`."""

    n: Sequences | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    max_new_tokens: MaxTokens | None = None
    sampling_seed: Seed | None = None
    stop: Stop = None
    ignore_eos: bool | None = None


class GenerateBody(_Routed, kw_only=True):
    """`POST /generate`. Exactly one of `text` and `input_ids`."""

    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: SamplingParams | None = None


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio_data": (None, []),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0, 0.0),
    "functions": (None, []),
    "image_data": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "response_format": (None, {"type": "text"}),
    "return_logprob": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
"""Known keys that this engine cannot honour -> the values that ask for nothing."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when they end. `max_tokens` None: as many as the model's context leaves room for."""

    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    max_tokens: int | None


Prompt = str | list[int] | list[ChatMessage]


@dataclass(frozen=True)
class Call:
    """One HTTP request, checked as far as that is possible without a tokenizer.

    `prompts[i]` belongs to `rooms[i]` and `addresses[i]` (`host:port` of the prefill worker's bootstrap directory);
    `n` choices of one prompt are `n` equal prompts in a row, because each is handed over in a room of its own.
    """

    route: Route
    model: str
    prompts: tuple[Prompt, ...]
    rooms: tuple[int, ...]
    addresses: tuple[str, ...]
    batched: bool
    sampling: Sampling
    stream: bool
    include_usage: bool
    return_token_ids: bool


def decode_json(raw: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises `BadRequest` for anything else."""
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError as fault:
        raise BadRequest(f"the body is not valid JSON: {fault}; send one JSON object") from fault
    except RecursionError as fault:
        raise BadRequest("the body is nested too deeply; send one flat JSON object") from fault
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {_shown(body)}; send one JSON object")
    return body


def parse(route: Route, body: dict[str, Any]) -> Call:
    """Check a decoded body. Raises `BadRequest` naming the field, its value and the remedy."""
    _refuse_unsupported(body)
    if route == "generate":
        return _parse_generate(_converted(body, GenerateBody))
    if route == "completions":
        completion = _converted(body, CompletionBody)
        prompts, batched = _split_prompts(completion.prompt, "prompt")
        return _parse_openai(route, completion, prompts, batched, completion.max_tokens or 16)
    chat = _converted(body, ChatBody)
    limit = chat.max_completion_tokens or chat.max_tokens
    return _parse_openai(route, chat, [chat.messages], False, limit)


def _parse_openai(route: Route, body: _OpenAI, prompts: list[Prompt], batched: bool, max_tokens: int | None) -> Call:
    sampling = Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=0 if body.top_k is None else body.top_k,
        seed=body.seed,
        stop=_stops(body.stop),
        ignore_eos=body.ignore_eos,
        max_tokens=max_tokens,
    )
    return _call(
        route,
        body,
        prompts,
        body.n or 1,
        batched,
        sampling,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        return_token_ids=bool(body.return_token_ids),
    )


def _parse_generate(body: GenerateBody) -> Call:
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("give exactly one of `text` and `input_ids`", "text")
    given, name = (body.text, "text") if body.text is not None else (body.input_ids, "input_ids")
    prompts, batched = _split_prompts(given, name)
    asked = body.sampling_params or SamplingParams()
    sampling = Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=0 if asked.top_k is None else asked.top_k,
        seed=asked.sampling_seed,
        stop=_stops(asked.stop),
        ignore_eos=bool(asked.ignore_eos),
        max_tokens=asked.max_new_tokens or 128,
    )
    return _call("generate", body, prompts, asked.n or 1, batched, sampling)


def _call(
    route: Route,
    body: _Routed,
    prompts: list[Prompt],
    n: int,
    batched: bool,
    sampling: Sampling,
    include_usage: bool = False,
    return_token_ids: bool = False,
) -> Call:
    repeated = tuple(prompt for prompt in prompts for _ in range(n))
    if len(repeated) > MAX_SEQUENCES:
        raise BadRequest(
            f"{len(prompts)} prompts with n={n} are {len(repeated)} sequences; send at most {MAX_SEQUENCES}", "n"
        )
    rooms, addresses = _rendezvous(body, len(prompts), n)
    return Call(
        route=route,
        model=body.model,
        prompts=repeated,
        rooms=rooms,
        addresses=addresses,
        batched=batched or n > 1,
        sampling=sampling,
        stream=body.stream,
        include_usage=include_usage,
        return_token_ids=return_token_ids,
    )


def _rendezvous(body: _Routed, prompts: int, n: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """One room and one bootstrap address per sequence, in the order of the sequences.

    Routers give a room to each sequence (smg: `n` chat choices) or only to each prompt (smg: completions); in the
    latter case both workers derive the same further rooms from it.
    """
    given = _one_each(body.bootstrap_room, prompts, n, "bootstrap_room")
    per_prompt = not isinstance(body.bootstrap_room, list) or len(body.bootstrap_room) == prompts
    rooms = tuple(derived_room(room, index % n) for index, room in enumerate(given)) if per_prompt else given
    if len(set(rooms)) != len(rooms):
        raise BadRequest(
            f"bootstrap_room holds a room twice: {_shown(list(rooms))}; give each sequence its own", "bootstrap_room"
        )
    hosts = _one_each(body.bootstrap_host, prompts, n, "bootstrap_host")
    ports = _one_each(body.bootstrap_port, prompts, n, "bootstrap_port")
    return rooms, tuple(str(HostPort(host, port)) for host, port in zip(hosts, ports, strict=True))


def derived_room(room: int, index: int) -> int:
    """The room of the choice `index` of a prompt that was given `room`: that one, then others as random as it was."""
    if index == 0:
        return room
    digest = hashlib.blake2b(room.to_bytes(8, "big") + index.to_bytes(8, "big"), digest_size=8, person=b"kvroom choice")
    return int.from_bytes(digest.digest(), "big") >> 1


def _one_each(given: T | list[T] | None, prompts: int, n: int, name: str) -> tuple[T, ...]:
    """The values of a routed field spread over `prompts * n` sequences: one each, or one for the `n` of each prompt."""
    if given is None:
        raise BadRequest(f"{name} is missing; send the request to the router, which chooses it", name)
    values = given if isinstance(given, list) else [given]
    if len(values) == prompts * n:
        return tuple(values)
    if len(values) != prompts:
        raise BadRequest(
            f"{name} has {len(values)} value(s) for {prompts} prompt(s) with n={n}; give one for each prompt", name
        )
    return tuple(value for value in values for _ in range(n))


def _split_prompts(given: Any, name: str) -> tuple[list[Prompt], bool]:
    """A prompt or a list of prompts -> the prompts, and whether it was a list of them."""
    if isinstance(given, str):
        return [given], False
    if not given:
        raise BadRequest(f"{name} is empty; give at least one token", name)
    if all(isinstance(item, int) for item in given):
        return [given], False
    if any(isinstance(item, int) for item in given):
        raise BadRequest(f"{name} mixes token ids with whole prompts; give one or the other", name)
    return list(given), True


def _stops(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def _refuse_unsupported(body: dict[str, Any]) -> None:
    nested = body.get("sampling_params")
    for fields in (body, nested if isinstance(nested, dict) else {}):
        for name, neutral in UNSUPPORTED.items():
            value = fields.get(name)
            if not any(type(value) is type(good) and value == good for good in neutral):
                raise BadRequest(f"{name}={_shown(value)} is not supported by this server; leave {name} out", name)


_PATH = re.compile(r" - at `(key in )?\$\.?(?P<path>.*)`$")


def _converted(body: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as fault:
        text = str(fault)
        found = _PATH.search(text)
        path = found["path"] if found else ""
        what = text[: found.start()] if found else text
        missing = re.match(r"Object missing required field `(.+)`", what)
        if missing:
            where = f"{path}.{missing[1]}" if path else missing[1]
            raise BadRequest(f"{where} is missing; add it to the body", where) from fault
        shown = _shown(_at(body, path))
        raise BadRequest(f"{path}={shown} is not allowed: {what[:1].lower()}{what[1:]}", path) from fault


def _at(body: Any, path: str) -> Any:
    """The value that msgspec's error path (`a.b[2].c`, `a[...]` where it does not know which) points at."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        if name:
            body = body.get(name) if isinstance(body, dict) else body
        elif index != "..." and isinstance(body, list):
            body = body[int(index)]
    return body


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
