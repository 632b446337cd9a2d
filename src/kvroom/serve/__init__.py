"""HTTP workers: one prefill or decode engine behind OpenAI-style routes and SGLang's `/generate`.

They are made to live behind a PD router (`smg`), which sends the same body to one prefill and one decode worker and
adds `bootstrap_host`, `bootstrap_port` and `bootstrap_room`. `bodies` lists what a client may say, `schema` checks it,
`replies` knows what we say back, `app` the routes that both roles share, `prefill` and `decode` what differs, `probe`
the token behind `/health_generate`, `worker` the life of a process.
"""
