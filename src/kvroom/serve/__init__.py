"""HTTP workers: one prefill or decode engine behind OpenAI-style routes and SGLang's `/generate`.

They run behind a PD router (`smg`), which sends the same body to one prefill and one decode worker and adds
`bootstrap_host`, `bootstrap_port` and `bootstrap_room`. `bodies` lists the fields of a request, `schema` checks them,
and `replies` builds the answers. `app` has the routes that both roles share, and `prefill` and `decode` have those of
each role. `probe` implements `/health_generate`, and `worker` starts and ends the parts of a process.
"""
