"""The bodies of the three generating routes: every name that a client or a router may write, and what it does here.

This is an allow list. A name is one of three things, and everything else is refused by name:

- a field of a struct below. Its description says how it changes the answer, or, where it is `inert`, that it has no
  effect here and why;
- an entry of a struct's `NEUTRAL`: an option that this engine does not have, allowed with the values that ask for
  nothing, because clients and routers write their defaults out;
- any name at all with the value null, which asks for the default everywhere, as in OpenAI's API.

Names and defaults are those of OpenAI (`/v1/...`) and of SGLang (`/generate`); where vLLM or SGLang adds to OpenAI's
routes, theirs. `docs/http-api.md` is generated from here by `scripts/list_options.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from kvroom.core.messages import RoomNumber

MAX_SEQUENCES = 128
MAX_STOP_STRINGS = 16
MAX_BIASES = 1024
MAX_SALT_CHARS = 512

Neutral = Mapping[str, tuple[Any, ...]]
"""Option -> the values that ask for nothing."""


def does(effect: str) -> Meta:
    """Say how a field changes the answer."""
    return Meta(description=effect)


def inert(why: str) -> Meta:
    """Say why a field has no effect here."""
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

_TEMPERATURE = does("0 takes the most likely token, 1 draws from the model's distribution")
_TOP_P = does("draw from the most likely tokens that have this share of the probability together")
_TOP_K = does("draw from so many of the most likely tokens; 0 or -1: from all")
_MIN_P = does("draw from tokens at least this share as likely as the most likely one")
_MIN_TOKENS = does("no token that ends the answer is chosen before so many tokens; a stop string still ends it")
_LOGIT_BIAS = does("token id, written as a string, to what is added to its logit, -100 to 100")
_SEED = does("the same seed, the same answer; sequence i of a body takes seed + i")
_STOP = does("the answer ends before the first of these strings")
_IGNORE_EOS = does("the model's end token does not end the answer")
_SEQUENCES = does("answers to each prompt, in rooms of their own")


class Body(msgspec.Struct, kw_only=True):
    """One JSON object of a request. `NESTED` are its members that are such objects or lists of them."""

    NEUTRAL: ClassVar[Neutral] = {}
    NESTED: ClassVar[Mapping[str, type[Body]]] = {}


class Routed(Body, kw_only=True):
    """The part that all three routes have: what a router adds, and names for a request that others read."""

    NEUTRAL: ClassVar[Neutral] = {
        "priority": (0,),
        # one engine of one rank
        "data_parallel_rank": (0,),
        "routed_dp_rank": (0,),
        "disagg_prefill_dp_rank": (0,),
        "return_hidden_states": (False,),
        "return_routed_experts": (False,),
        "return_prompt_token_ids": (False,),
        "session_params": ({},),
        "custom_params": ({},),
    }

    bootstrap_host: Annotated[
        str | list[str] | None, does("host of the prefill worker's bootstrap directory; one, or one for each prompt")
    ] = None
    bootstrap_port: Annotated[Port | list[Port] | None, does("its port, likewise")] = None
    bootstrap_room: Annotated[
        RoomNumber | list[RoomNumber] | None, does("the room; one, or one for each prompt or each sequence")
    ] = None
    model: Annotated[str, does("must be the name or the path of the model that is served, or empty")] = ""
    stream: Annotated[bool, does("tokens are sent as they come, as server-sent events")] = False
    cache_salt: Annotated[
        Salt,
        does("requests share cached prefixes only with requests of the same salt; other salts, other rooms' pages"),
    ] = ""
    rid: Annotated[Label, inert("SGLang's name for the request; the answer's `id` is made by the worker")] = ""
    request_id: Annotated[Label, inert("the same, in vLLM's words")] = ""
    user: Annotated[str, inert("a name for the provider's records; no such records are kept")] = ""
    kv_transfer_params: Annotated[
        dict[str, Any],
        inert("vLLM's way to name the partner; here `bootstrap_room` does, which has to be there anyway"),
    ] = {}
    routing_key: Annotated[str, inert("a hint for the router")] = ""
    conversation_id: Annotated[str, inert("a name for traces of SGLang's")] = ""
    no_logs: Annotated[bool, inert("no text or token of a request is logged anyway")] = False


class StreamOptions(Body, kw_only=True):
    """What a stream says besides its tokens."""

    NEUTRAL: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: Annotated[bool, does("the stream ends with a chunk that has no choices and the token counts")] = (
        False
    )
    continuous_usage_stats: Annotated[bool, does("every chunk has the token counts so far")] = False


class OpenAI(Routed, kw_only=True):
    """What the two routes of OpenAI's API share."""

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
    stream_options: Annotated[StreamOptions | None, does("see below; only with `stream`")] = None
    return_token_ids: Annotated[bool, does("each choice has `token_ids`, and whole answers `prompt_token_ids`")] = False
    metadata: Annotated[dict[str, Any], inert("labels for the provider's records; no such records are kept")] = {}
    safety_identifier: Annotated[str, inert("a name for the provider's records; no such records are kept")] = ""
    prompt_cache_key: Annotated[
        str, inert("a hint where a cached prefix may be; it is found by its tokens, see `cache_salt` to part caches")
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
        str | list[str | TokenId | list[TokenId]], does("text, or token ids; a list of either is a prompt for each")
    ]
    max_tokens: Annotated[MaxTokens, does("the answer has at most so many tokens")] = 16


class TextPart(Body, kw_only=True):
    """A part of a message's content."""

    type: Annotated[Literal["text"], does("only text can be answered")]
    text: Annotated[str, does("parts are joined as they are")]


class ChatMessage(Body, kw_only=True):
    """One turn of a chat."""

    NEUTRAL: ClassVar[Neutral] = {"annotations": ([],), "tool_calls": ([],), "prefix": (False,)}
    NESTED: ClassVar[Mapping[str, type[Body]]] = {"content": TextPart}

    role: Annotated[str, Meta(min_length=1, max_length=64), does("the model's chat template says which there are")]
    content: Annotated[str | list[TextPart], does("text, or a list of parts")] = ""
    name: Annotated[
        str, Meta(max_length=256), does("given to the chat template; refused where it does not read names")
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
        list[ChatMessage], Meta(min_length=1), does("the turns so far, made into a prompt by the model's chat template")
    ]
    max_tokens: Annotated[MaxTokens | None, does("as `max_completion_tokens`, which goes before it")] = None
    max_completion_tokens: Annotated[
        MaxTokens | None, does("the answer has at most so many tokens; else as many as fit in the model's context")
    ] = None
    add_generation_prompt: Annotated[
        bool | None,
        does("false: the prompt ends with the last turn and opens none; refused where the template cannot do without"),
    ] = None
    continue_final_message: Annotated[
        bool, does("the answer continues the last turn, which is left open; not with `add_generation_prompt`")
    ] = False
    chat_template_kwargs: Annotated[
        dict[str, Any], does("variables for the chat template; one that it does not read is refused")
    ] = {}
    parallel_tool_calls: Annotated[bool, inert("there are no tools to call: `tools` is refused")] = True
    separate_reasoning: Annotated[bool, inert("no reasoning is parsed: all text is the answer")] = True
    stream_reasoning: Annotated[bool, inert("no reasoning is parsed: all text is the answer")] = True


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
    max_new_tokens: Annotated[MaxTokens, does("the answer has at most so many tokens")] = 128
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

    text: Annotated[str | list[str] | None, does("the prompt, or a list of prompts; or `input_ids`")] = None
    input_ids: Annotated[
        list[TokenId | list[TokenId]] | None, does("the prompt as token ids, or a list of such prompts")
    ] = None
    sampling_params: Annotated[SamplingParams | None, does("see below")] = None
