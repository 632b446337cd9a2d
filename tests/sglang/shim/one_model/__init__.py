"""The only model that tests serve (SGLANG_EXTERNAL_MODEL_PACKAGE), so that SGLang need not import all that it knows."""
