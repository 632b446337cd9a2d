"""The only model of the tests (SGLANG_EXTERNAL_MODEL_PACKAGE), so that SGLang need not import all of its models."""
