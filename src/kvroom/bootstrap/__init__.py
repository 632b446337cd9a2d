"""The bootstrap directory, through which a decode rank finds its prefill ranks. Names and routes are SGLang's."""
