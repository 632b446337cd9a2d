"""The connector for vLLM: loaded with `"kv_connector": "KVRoomConnector", "kv_connector_module_path":
"kvroom.adapters.vllm"`.

The law: it translates. Requests become rooms and rooms become reports; what becomes of a room is the library's, and
what becomes of a request is vLLM's. Nothing is patched.
"""

from . import guard

guard.check()

from .connector import KVRoomConnector  # noqa: E402 - an unknown vLLM is told apart first

__all__ = ["KVRoomConnector"]
