"""The rules, by subject. A rule is one function under a ``@rule`` with its data; nothing else lists it."""
