"""The bootstrap directory, where a decode rank finds its prefill ranks. Names and routes are those of SGLang."""
