"""Code that an exported folder of DeepStack-L, -L-HD or -V ships, run with `trust_remote_code=True`.

These files are copied into the folder and run there, by transformers, which nothing of ours imports. What they are
told stands in `families/deepstack.py`.
"""
