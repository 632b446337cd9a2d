"""The connector for vLLM, loaded with `"kv_connector": "KVRoomConnector", "kv_connector_module_path":
"kvroom.adapters.vllm"`.

The law: it translates. Requests become rooms, and ended rooms become reports. The library decides the fate of a room,
and vLLM that of a request. vLLM is not patched.
"""

from . import guard

guard.check()

from .connector import KVRoomConnector  # noqa: E402 - the check must run before these imports

__all__ = ["KVRoomConnector"]
