"""SGLang's metadata rows through an aux message."""

from __future__ import annotations

import random
from array import array
from typing import Any

import msgspec
import pytest
import torch
from sglang_helpers import ROWS, kv_args, new_buffers, new_pool, new_prompt, new_request, row_of

from kvroom.adapters.sglang.rows import EXTRA, RowContent, Rows
from kvroom.errors import ConfigurationError, RemoteProtocolError
from kvroom.wire import aux_message
from kvroom.wire.aux_message import Aux


def rows(buffers: Any) -> Rows:
    return Rows(kv_args(new_pool(pages=1), buffers))


def filled(seed: int) -> Any:
    """Return buffers filled with random bytes."""
    buffers = new_buffers()
    draw = torch.Generator().manual_seed(seed)
    for value in vars(buffers).values():
        if isinstance(value, torch.Tensor):
            raw = value.view(torch.uint8)
            raw.copy_(torch.randint(1, 256, raw.shape, generator=draw, dtype=torch.uint8))
    return buffers


def every_row(buffers: Any) -> list[list[bytes]]:
    return [row_of(buffers, row) for row in range(ROWS)]


def message(of: Rows, row: int) -> Aux:
    """Return the aux message with row `row`, encoded and decoded."""
    return aux_message.decode_aux(aux_message.encode_aux(Aux(tokens=3, extra=of.read(row))))


def test_a_row_arrives_complete_and_changes_no_other_row() -> None:
    source, sink = filled(1), filled(2)
    before = every_row(sink)
    rows(sink).write(9, message(rows(source), 4))
    after = every_row(sink)
    assert after[9] == row_of(source, 4)
    assert after[9] != before[9]
    assert after[:9] + after[10:] == before[:9] + before[10:]


def test_sglang_reads_from_a_row_the_values_that_it_has_written() -> None:
    source, sink = new_buffers(), new_buffers()
    req = new_request(new_prompt(9), 77, return_logprob=True, top_logprobs_num=5)
    req.metadata_buffer_index, req.output_ids, req.cached_tokens = 3, array("q", [4711]), 6
    req.cached_tokens_device, req.cached_tokens_host = 5, 1
    req.logprob.output_token_logprobs_val, req.logprob.output_token_logprobs_idx = [-0.25], [4711]
    req.logprob.output_top_logprobs_val = [[-0.25, -1.5, -2.0, -3.0, -4.0]]
    req.logprob.output_top_logprobs_idx = [[4711, 5, 6, 7, 8]]
    source.set_buf(req)
    rows(sink).write(12, message(rows(source), 3))
    token, cached, logprob, logprob_of, top, top_of = sink.get_buf(12)[:6]
    assert (token[0].item(), cached[:3].tolist()) == (4711, [6, 5, 1])
    assert (logprob[0].item(), logprob_of[0].item()) == (-0.25, 4711)
    assert (top[:5].tolist(), top_of[:5].tolist()) == ([-0.25, -1.5, -2.0, -3.0, -4.0], [4711, 5, 6, 7, 8])
    assert sink.get_buf(12)[-1][0].item() == 77
    assert rows(source).content(3) == RowContent(first_token=4711, cached_tokens=6, first_logprob=-0.25)
    assert rows(sink).content(12) == rows(source).content(3)


def test_a_row_without_a_sampled_token_is_handed_over() -> None:
    """SGLang writes -1 there, which is not a token. The decode side's SGLang reads the same row."""
    source, sink = new_buffers(), new_buffers()
    req = new_request(new_prompt(9), 77)
    req.metadata_buffer_index, req.output_ids = 3, array("q", [-1])
    source.set_buf(req)
    assert rows(source).content(3).first_token is None
    rows(sink).write(12, message(rows(source), 3))
    assert sink.get_buf(12)[0][0].item() == -1


@pytest.mark.parametrize(
    "other",
    [{"hidden_size": 17}, {"max_top_logprobs_num": 64}, {"output_dsa_topk_indices_dim": 4}, {"kv_checksum_enabled": 1}],
)
def test_a_row_of_other_buffers_is_refused_and_nothing_is_written(other: dict[str, Any]) -> None:
    source, sink = new_buffers(**other), filled(5)
    before = every_row(sink)
    with pytest.raises(RemoteProtocolError, match=r"buffers of \[64, .* bytes, this side's has \[64, .*same version"):
        rows(sink).write(1, message(rows(source), 1))
    assert every_row(sink) == before


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, f"sent nothing instead of {EXTRA}: SGLang can only continue a prompt that SGLang"),
        ({"vllm.kv.1": b"x", "a": b""}, f"sent a, vllm.kv.1 instead of {EXTRA}: SGLang can only"),
        ({EXTRA: b""}, "an invalid metadata row, which is not a list of bytes"),
        ({EXTRA: b"\xc1"}, "an invalid metadata row, which is not a list of bytes"),
        ({EXTRA: msgspec.msgpack.encode(["text"])}, "an invalid metadata row, which is not a list of bytes"),
        ({EXTRA: msgspec.msgpack.encode({"row": b"x"})}, "an invalid metadata row, which is not a list of bytes"),
        ({EXTRA: msgspec.msgpack.encode([])}, r"buffers of \[\] bytes"),
        ({EXTRA: msgspec.msgpack.encode([b"x" * 64])}, r"buffers of \[64\] bytes"),
    ],
)
def test_an_invalid_row_is_refused_and_nothing_is_written(extra: dict[str, bytes], words: str) -> None:
    sink = filled(6)
    before = every_row(sink)
    with pytest.raises(RemoteProtocolError, match=words):
        rows(sink).write(0, Aux(tokens=3, extra=extra))
    assert every_row(sink) == before


def test_a_row_with_drawn_bytes_is_refused_or_written() -> None:
    sink, draw = filled(7), random.Random(7)
    own = rows(sink)
    whole = own.read(2)[EXTRA]
    before = every_row(sink)
    for _ in range(300):
        broken = bytearray(whole)
        broken[draw.randrange(len(broken))] = draw.randrange(256)
        data = bytes(broken[: draw.choice((len(broken), draw.randrange(len(broken))))])
        try:
            own.write(2, Aux(tokens=3, extra={EXTRA: data}))
        except RemoteProtocolError:
            continue
        assert [len(part) for part in row_of(sink, 2)] == [len(part) for part in before[2]]
    after = every_row(sink)
    assert after[:2] + after[3:] == before[:2] + before[3:]


@pytest.mark.parametrize("row", [-1, ROWS, ROWS + 1])
def test_a_row_that_does_not_exist_is_refused(row: int) -> None:
    buffers = filled(8)
    own, before = rows(buffers), every_row(buffers)
    for call in (own.read, own.content, lambda row: own.write(row, Aux(tokens=1, extra=own.read(0)))):
        with pytest.raises(ConfigurationError, match=f"invalid metadata row {row}: SGLang has {ROWS} rows"):
            call(row)
    assert every_row(buffers) == before


def test_buffers_with_different_numbers_of_rows_are_refused() -> None:
    args = kv_args(new_pool(pages=1), new_buffers())
    args.aux_data_lens[4] *= 2
    with pytest.raises(ConfigurationError, match=rf"got 10 with \[{ROWS}, {2 * ROWS}\] rows"):
        Rows(args)
    args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = [], [], []
    with pytest.raises(ConfigurationError, match=r"got 0 with \[\] rows"):
        Rows(args)
