"""Compare ctxdocs with numbers that the authors' own code computed.

``python -m tests.parity FOLDER...`` walks folders of golden cases. A case holds ``config.json``, weights in the
authors' names, ``io.safetensors`` (inputs and expected outputs) and ``case.json`` (settings, meaning of every tensor,
``atol``).
"""
