"""States of requests: one row of memory per slot, which contains one tensor for each layer and component.

A state summarizes all tokens up to the newest one. It cannot be shared or shortened, so each request has its own slot,
and a model with states has no prefix cache. Models access their states through `RequestStates`, which takes the place
of transformers' cache, for one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from kvroom import KVRegion

from .memory import zeroed
from .pages import PageBook
from .shape import StateShape

_ALIGN_BYTES = 64


class _Place(NamedTuple):
    """The position of a state within a slot's row, in bytes."""

    shape: StateShape
    first: int
    nbytes: int


def slot_bytes(shapes: Sequence[StateShape]) -> int:
    """Return the bytes of one request's row."""
    return sum(_aligned(prod(shape.sizes) * shape.dtype.itemsize) for shape in shapes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


class StateSlots:
    """The memory of all states: `rows` is uint8 [slots, row bytes], zeroed, on `device`."""

    def __init__(self, shapes: Sequence[StateShape], *, slots: int, device: str = "cpu") -> None:
        self._places: list[_Place] = []
        end = 0
        for shape in shapes:
            nbytes = prod(shape.sizes) * shape.dtype.itemsize
            self._places.append(_Place(shape, end, nbytes))
            end += _aligned(nbytes)
        self.rows = zeroed((slots, end), torch.uint8, device)
        self.book = PageBook(slots)
        self._views: dict[tuple[int, str], torch.Tensor] = {}
        for shape, first, nbytes in self._places:
            state = self.rows[:, first : first + nbytes].view(shape.dtype).view(-1, *shape.sizes)
            self._views[shape.layer, shape.component] = state

    def regions(self, group: str) -> tuple[KVRegion, ...]:
        """Return the description of the rows for peers: a slot is a page that holds one token, the newest."""
        return tuple(
            KVRegion(
                layer=place.shape.layer,
                component=place.shape.component,
                base=self.rows.data_ptr() + place.first,
                pages=self.rows.shape[0],
                page_stride=self.rows.stride(0),
                page_tokens=1,
                token_stride=self.rows.stride(0),
                heads=1,
                head_stride=place.nbytes,
                head_bytes=place.nbytes,
                head_range=(0, 1),
                device=str(self.rows.device),
                group=group,
                format=f"{str(place.shape.dtype).removeprefix('torch.')}{list(place.shape.sizes)}",
            )
            for place in self._places
        )

    def of(self, slot: int, *, fresh: bool) -> RequestStates:
        """Return the states in `slot`. `fresh` means that the slot still has the states of an earlier request."""
        return RequestStates({key: view[slot : slot + 1] for key, view in self._views.items()}, fresh=fresh)


class RequestStates:
    """The part of transformers' `Cache` that models call, for one sequence whose states are in its slot.

    Keys and values of attention pass through unchanged: the attention function keeps them in pages.
    """

    def __init__(self, states: dict[tuple[int, str], torch.Tensor], *, fresh: bool) -> None:
        self._states = states
        self._fresh = fresh

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the last inputs of a convolution [1, channels, kernel], or None before the first token.

        The model changes the tensor in place.
        """
        return None if self._fresh else self._states[layer_idx, f"conv{state_idx + 1}"]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a recurrent state [1, ...], or None before the first token."""
        return None if self._fresh else self._states[layer_idx, f"recurrent{state_idx + 1}"]

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_options: object
    ) -> torch.Tensor:
        """Store the last of the new inputs [1, channels, n]; return the previously stored inputs followed by them.

        Before the first token, the stored inputs count as zeros.
        """
        kept = self._states[layer_idx, f"conv{state_idx + 1}"]
        before = torch.zeros_like(kept) if self._fresh else kept
        inputs = torch.cat([before, conv_states], dim=-1)
        kept.copy_(inputs[..., -kept.shape[-1] :])
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_options: object
    ) -> torch.Tensor:
        """Store a recurrent state, and return the stored tensor."""
        return self._states[layer_idx, f"recurrent{state_idx + 1}"].copy_(recurrent_states)

    def is_recording_past(self, _layer_idx: int) -> bool:
        """Return False: earlier states cannot be restored."""
        return False

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: object, **_options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of attention unchanged, without storing them."""
        return key, value
