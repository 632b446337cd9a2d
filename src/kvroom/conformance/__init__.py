"""The checks that every transport must pass, and the command that runs them: `python -m kvroom.conformance NAME`."""
