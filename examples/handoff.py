"""Hand one room from a prefill process to a decode process: everything that an engine has to do.

Run: python examples/handoff.py
"""

import multiprocessing

import numpy as np

from kvroom import KVBootstrapServer, KVIdentity, KVLayout, KVManager, array_regions

LAYERS, PAGES, PAGE_TOKENS, HEADS, DIM = 2, 64, 16, 4, 32
PROMPT_TOKENS = 40
PROMPT = KVIdentity.of(range(PROMPT_TOKENS))  # of the token ids; both sides of a room state the same identity


def make_pool() -> tuple[np.ndarray, KVLayout]:
    pool = np.zeros((LAYERS, 2, PAGES, PAGE_TOKENS, HEADS, DIM), np.float32)
    regions = array_regions(pool.ctypes.data, pool.shape, pool.strides, "LCPTHD", itemsize=4, layers=range(LAYERS))
    return pool, KVLayout(regions, dtype="float32", model="my-model")


def prefill(bootstrap_addr: str, room: int) -> None:
    pool, layout = make_pool()
    with KVManager(layout, register_with=bootstrap_addr) as manager, manager.sender(room, identity=PROMPT) as sender:
        pool[:, :, [5, 6]] = 0.5  # chunk 1 is computed into pages 5 and 6 ...
        sender.send([5, 6], stop=32)  # ... and travels while chunk 2 is computed
        pool[:, :, 9, :8] = 0.25
        sender.send([9], stop=PROMPT_TOKENS, last=True, aux=b"first token: 42")
        sender.wait(timeout_s=30)


def decode(bootstrap_addr: str, room: int) -> None:
    pool, layout = make_pool()
    with KVManager(layout) as manager, manager.receiver(bootstrap_addr, room, identity=PROMPT) as receiver:
        receiver.send_metadata([0, 1, 2], tokens=PROMPT_TOKENS)
        result = receiver.wait(timeout_s=30)  # or: receiver.poll() in a scheduler loop, or: await receiver
        assert (pool[:, :, [0, 1]] == 0.5).all()
        assert (pool[:, :, 2, :8] == 0.25).all()
        print(f"{result.nbytes} bytes in {result.latency_s * 1e3:.1f} ms by {result.transport}; {result.aux.decode()}")


if __name__ == "__main__":
    with KVBootstrapServer() as directory:
        other = multiprocessing.get_context("spawn").Process(target=prefill, args=(directory.address, 7))
        other.start()
        decode(directory.address, 7)
        other.join()
