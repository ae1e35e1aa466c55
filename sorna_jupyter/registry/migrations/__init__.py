"""How a database comes to the tables of `models`: one file a step, run by `Registry.upgrade`.

A test compares the outcome with the models, so a forgotten step shows.
"""
