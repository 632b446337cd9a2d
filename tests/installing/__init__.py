"""Tests of an installation from the wheel alone, under every supported version of Python (`make test-installing`)."""
