"""Floor 6: a verb's work, where it needs several of the floors below. What is typed for it is parsed in cli/.

A package, and not modules beside `lorakit/__init__.py`, because `lorakit.train` is the function of the Python API.
"""
