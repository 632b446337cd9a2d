"""The bodies of the three generating routes: every option that a client or a router may send, and its effect.

This is an allow list. An option is one of three things, and any other option is refused with an error that names it:

- a field of a struct below. Its description states how it changes the answer or, if it is `inert`, why it has no effect
  here;
- an entry of a struct's `NEUTRAL`: an option that this engine does not support, allowed only with the values that
  request nothing, because many clients and routers send their defaults;
- any option with the value null, which means the default, as in OpenAI's API.

Names and defaults are those of OpenAI (`/v1/...`), with the additions of vLLM and SGLang, and those of SGLang
(`/generate`). `scripts/list_options.py` generates `docs/http-api.md` from this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from kvroom import RoomNumber

MAX_SEQUENCES = 128
MAX_STOP_STRINGS = 16
MAX_BIASES = 1024
MAX_SALT_CHARS = 512

Neutral = Mapping[str, tuple[Any, ...]]
"""Option -> the values that request nothing."""


def does(effect: str) -> Meta:
    """Describe a field that changes the answer."""
    return Meta(description=effect)


def inert(why: str) -> Meta:
    """Describe a field that has no effect here, with the reason."""
    return Meta(description=why, extra={"inert": True})


TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, lt=2**31)]
MaxTokens = Annotated[int, Meta(ge=1, lt=2**31)]
MinTokens = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Sequences = Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
LogitBias = Annotated[dict[str, Bias], Meta(max_length=MAX_BIASES)]
Salt = Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)]
Port = Annotated[int, Meta(ge=1, lt=65536)]
Label = str | list[str]

_TEMPERATURE = does("0 chooses the most likely token; 1 samples from the model's distribution")
_TOP_P = does("sample from the fewest most likely tokens whose probabilities add up to this")
_TOP_K = does("sample from this many of the most likely tokens; 0 and -1 mean all")
_MIN_P = does("sample from tokens at least this fraction as likely as the most likely one")
_MIN_TOKENS = does("no end token comes before this many tokens; a stop string still ends the answer")
_LOGIT_BIAS = does("adds -100 to 100 to the logits of tokens; the keys are token ids as strings")
_SEED = does("the same seed gives the same answer; sequence i of a request uses seed + i")
_STOP = does("the answer ends before the first of these strings")
_IGNORE_EOS = does("an end token does not end the answer")
_SEQUENCES = does("number of answers to each prompt, each in a room of its own")


class Body(msgspec.Struct, kw_only=True):
    """One JSON object of a request. `NESTED` has the types of members that are such objects, or lists of them."""

    NEUTRAL: ClassVar[Neutral] = {}
    NESTED: ClassVar[Mapping[str, type[Body]]] = {}


class Routed(Body, kw_only=True):
    """Fields of all three routes: those that routers set, and identifiers of a request that kvroom does not use."""

    NEUTRAL: ClassVar[Neutral] = {
        "priority": (0,),
        # the engine has one rank
        "data_parallel_rank": (0,),
        "routed_dp_rank": (0,),
        "disagg_prefill_dp_rank": (0,),
        "return_hidden_states": (False,),
        "return_routed_experts": (False,),
        "return_prompt_token_ids": (False,),
        "session_params": ({},),
        "custom_params": ({},),
        # no_logs=true is refused, because an error quotes the refused value and may be logged
        "no_logs": (False,),
    }

    bootstrap_host: Annotated[
        str | list[str] | None, does("host of the prefill worker's bootstrap directory, set by the router")
    ] = None
    bootstrap_port: Annotated[Port | list[Port] | None, does("port of that directory, set by the router")] = None
    bootstrap_room: Annotated[
        RoomNumber | list[RoomNumber] | None, does("number of the room, set by the router; see below")
    ] = None
    model: Annotated[str, does("name or path of the served model, or empty; `/generate` alone takes any")] = ""
    stream: Annotated[bool, does("tokens are sent as they are generated, as server-sent events")] = False
    cache_salt: Annotated[
        Salt,
        does("only requests with the same salt share cached prefixes; one for each tenant"),
    ] = ""
    rid: Annotated[
        Label, inert("SGLang's id of a request: its name in logs; the worker makes the `id` of the answer itself")
    ] = ""
    request_id: Annotated[
        Label, inert("vLLM's id of a request: its name in logs; the worker makes the `id` of the answer itself")
    ] = ""
    user: Annotated[str, inert("names an end user to the provider; nothing is kept about users")] = ""
    kv_transfer_params: Annotated[
        dict[str, Any],
        inert("vLLM's description of a hand-off; here the bootstrap fields describe it"),
    ] = {}
    routing_key: Annotated[str, inert("a hint for routers; a worker does not route")] = ""
    conversation_id: Annotated[str, inert("names a conversation in SGLang's traces; there are none here")] = ""


class StreamOptions(Body, kw_only=True):
    """Options of a stream."""

    NEUTRAL: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: Annotated[bool, does("the stream ends with a chunk that has no choices and the token counts")] = (
        False
    )
    continuous_usage_stats: Annotated[bool, does("every chunk has the token counts of its choice so far")] = False


class OpenAI(Routed, kw_only=True):
    """Fields that the two routes of OpenAI's API share."""

    NEUTRAL: ClassVar[Neutral] = {
        **Routed.NEUTRAL,
        "echo": (False,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stop_token_ids": ([],),
        "include_stop_str_in_output": (False,),
        "no_stop_trim": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "return_tokens_as_token_ids": (False,),
        "logits_processors": ([],),
        "bad_words": ([],),
        "regex": ("",),
        "ebnf": ("",),
        "json_schema": ("",),
    }
    NESTED: ClassVar[Mapping[str, type[Body]]] = {"stream_options": StreamOptions}

    n: Annotated[Sequences, _SEQUENCES] = 1
    temperature: Annotated[Temperature, _TEMPERATURE] = 1.0
    top_p: Annotated[TopP, _TOP_P] = 1.0
    top_k: Annotated[TopK, _TOP_K] = 0
    min_p: Annotated[Share, _MIN_P] = 0.0
    min_tokens: Annotated[MinTokens, _MIN_TOKENS] = 0
    logit_bias: Annotated[LogitBias, _LOGIT_BIAS] = {}
    seed: Annotated[Seed | None, _SEED] = None
    stop: Annotated[Stop | None, _STOP] = None
    ignore_eos: Annotated[bool, _IGNORE_EOS] = False
    stream_options: Annotated[StreamOptions | None, does("options of a stream; refused without `stream`")] = None
    return_token_ids: Annotated[bool, does("choices have `token_ids`; whole answers also `prompt_token_ids`")] = False
    metadata: Annotated[dict[str, Any], inert("labels for stored answers; answers are not stored")] = {}
    safety_identifier: Annotated[str, inert("names an end user to the provider; nothing is kept about users")] = ""
    prompt_cache_key: Annotated[
        str, inert("a routing hint; the prefix cache finds a prefix by its tokens and `cache_salt`")
    ] = ""


class CompletionBody(OpenAI, kw_only=True):
    """`POST /v1/completions`."""

    NEUTRAL: ClassVar[Neutral] = {
        **OpenAI.NEUTRAL,
        "best_of": (1,),
        "suffix": ("",),
        "logprobs": (False,),
        "add_special_tokens": (True,),
    }

    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]], does("text or token ids; a list of either is several prompts")
    ]
    max_tokens: Annotated[MaxTokens, does("the answer has at most this many tokens")] = 16


class TextPart(Body, kw_only=True):
    """A part of a message's content."""

    type: Annotated[Literal["text"], does("only text parts are supported")]
    text: Annotated[str, does("the text of the part")]


class ChatMessage(Body, kw_only=True):
    """One turn of a chat."""

    NEUTRAL: ClassVar[Neutral] = {"annotations": ([],), "tool_calls": ([],), "prefix": (False,)}
    NESTED: ClassVar[Mapping[str, type[Body]]] = {"content": TextPart}

    role: Annotated[str, Meta(min_length=1, max_length=64), does("a role that the model's chat template knows")]
    content: Annotated[str | list[TextPart], does("text, or a list of text parts, which are joined")] = ""
    name: Annotated[
        str, Meta(max_length=256), does("passed to the chat template; refused if the template does not read it")
    ] = ""

    def plain(self) -> dict[str, str]:
        """Return the turn as the chat template takes it."""
        parts = self.content if isinstance(self.content, list) else None
        text = "".join(part.text for part in parts) if parts is not None else str(self.content)
        return {"role": self.role, "content": text, **({"name": self.name} if self.name else {})}


class ChatBody(OpenAI, kw_only=True):
    """`POST /v1/chat/completions`."""

    NEUTRAL: ClassVar[Neutral] = {
        **OpenAI.NEUTRAL,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none",),
        "documents": ([],),
        "add_special_tokens": (False,),
        "include_reasoning": (True,),
    }
    NESTED: ClassVar[Mapping[str, type[Body]]] = {**OpenAI.NESTED, "messages": ChatMessage}

    messages: Annotated[
        list[ChatMessage], Meta(min_length=1), does("the turns; the model's chat template makes the prompt of them")
    ]
    max_tokens: Annotated[
        MaxTokens | None, does("older name of `max_completion_tokens`, which wins if both are given")
    ] = None
    max_completion_tokens: Annotated[
        MaxTokens | None, does("the answer has at most this many tokens; by default as many as fit in the context")
    ] = None
    add_generation_prompt: Annotated[
        bool | None,
        does("`false` does not open the assistant's turn; refused if the template does not read it"),
    ] = None
    continue_final_message: Annotated[
        bool, does("the last turn is left open and the answer continues it; excludes `add_generation_prompt`")
    ] = False
    chat_template_kwargs: Annotated[
        dict[str, Any], does("variables for the chat template; refused if the template does not read them")
    ] = {}
    parallel_tool_calls: Annotated[bool, inert("tools are not supported, so none is called")] = True
    separate_reasoning: Annotated[bool, inert("there is no reasoning parser: all text is the answer")] = True
    stream_reasoning: Annotated[bool, inert("there is no reasoning parser: all text is the answer")] = True


class SamplingParams(Body, kw_only=True):
    """SGLang's `sampling_params`."""

    NEUTRAL: ClassVar[Neutral] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "beam_width": (1,),
        "stop_token_ids": ([],),
        "stop_regex": ("", []),
        "no_stop_trim": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stream_interval": (1,),
        "custom_params": ({},),
        "regex": ("",),
        "ebnf": ("",),
        "json_schema": ("",),
        "structural_tag": ("",),
    }

    n: Annotated[Sequences, _SEQUENCES] = 1
    temperature: Annotated[Temperature, _TEMPERATURE] = 1.0
    top_p: Annotated[TopP, _TOP_P] = 1.0
    top_k: Annotated[TopK, _TOP_K] = 0
    min_p: Annotated[Share, _MIN_P] = 0.0
    min_new_tokens: Annotated[MinTokens, _MIN_TOKENS] = 0
    max_new_tokens: Annotated[MaxTokens, does("the answer has at most this many tokens")] = 128
    logit_bias: Annotated[LogitBias, _LOGIT_BIAS] = {}
    sampling_seed: Annotated[Seed | None, _SEED] = None
    stop: Annotated[Stop | None, _STOP] = None
    ignore_eos: Annotated[bool, _IGNORE_EOS] = False


class GenerateBody(Routed, kw_only=True):
    """`POST /generate`."""

    NEUTRAL: ClassVar[Neutral] = {
        **Routed.NEUTRAL,
        "return_logprob": (False,),
        "logprob_start_len": (-1,),
        "top_logprobs_num": (0,),
        "token_ids_logprob": ([],),
        "return_text_in_logprobs": (False,),
        "return_bytes": (False,),
        "return_entropy": (False,),
        "log_metrics": (True,),
        "background": (False,),
        "require_reasoning": (False,),
        "image_data": ([],),
        "video_data": ([],),
        "audio_data": ([],),
    }
    NESTED: ClassVar[Mapping[str, type[Body]]] = {"sampling_params": SamplingParams}

    text: Annotated[str | list[str] | None, does("the prompt or prompts as text; give this or `input_ids`")] = None
    input_ids: Annotated[list[TokenId | list[TokenId]] | None, does("the prompt or prompts as token ids")] = None
    sampling_params: Annotated[SamplingParams | None, does("how tokens are chosen")] = None
