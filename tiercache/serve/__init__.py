"""An offloaded model behind OpenAI's API: what `tiercache serve` runs.

Needs the extra: `pip install "tiercache[serve]"`. Nothing else imports this package but the command, when it runs.
"""
