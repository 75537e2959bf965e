"""The model families that are served: for each a small function, ``config.json`` → ``Family``.

The defaults are those of transformers' config classes, written out here because importing those takes seconds;
a test compares the two. What each function says was read from the family's modeling file in transformers 5.23.0.
"""
