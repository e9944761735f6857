"""`python -m flexrattn.inspect`: what the compilers made of a configuration's layers (docs/inspect.md)."""
