"""HTTP workers: one prefill or decode engine behind OpenAI-style routes and SGLang's `/generate`.

They are made to live behind a PD router (`smg`), which sends the same body to one prefill and one decode worker and
adds `bootstrap_host`, `bootstrap_port` and `bootstrap_room`. `schema` knows what a client may say, `replies` what we
say back, `app` the routes that both roles share, `prefill` and `decode` what differs, `worker` the life of a process.
"""
