"""An idle engine counts its pages: a lost page ends the engine with an error instead of silently shrinking the pool."""

from __future__ import annotations

import asyncio

import pytest

from .pair import DEADLINE_S, Pair
from .tiny import prompt, tiny


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_lost_page_is_found_when_nothing_is_open(side: str) -> None:
    with Pair(tiny().loaded) as pair:
        engine = getattr(pair, side)
        pair.serve(pair.request(prompt(20), max_tokens=4))
        engine.wait_idle(20)
        engine.pool.book._free.pop()
        with pytest.raises(TimeoutError, match="pages were lost or counted twice"):
            engine.wait_idle(2)
        assert "pages were lost or counted twice" in engine.stats().error
        prefilled, decoded = serve_once(pair)
        assert "takes no more requests" in str(prefilled)
        assert "takes no more requests" in str(decoded)


def serve_once(pair: Pair) -> tuple[object, object]:
    """Return the results of one request on both sides, which may be errors."""
    request = pair.request(prompt(20), max_tokens=4)

    async def decode() -> None:
        async for _ in pair.decode.generate(request):
            pass

    async def both() -> tuple[object, object]:
        return await asyncio.wait_for(
            asyncio.gather(pair.prefill.prefill(request), decode(), return_exceptions=True), DEADLINE_S
        )

    return asyncio.run(both())
