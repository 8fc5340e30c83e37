"""Runners carry an admitted job to an overlay and bring back an outcome. They know nothing of the bus.

Reading order: base (the words), process, http.
"""
