"""Runners carry an admitted job to an overlay and bring back an outcome. They know nothing of the bus.

Reading order: base (the words), process (a call), helpers (who starts it) with launcher and zygote (the helper itself);
worker, service (with ports), http.
"""
