"""The ops of a GPT, each with several implementations; `register` adds one of your own."""
from .registered import register, unregister

__all__ = ["register", "unregister"]
