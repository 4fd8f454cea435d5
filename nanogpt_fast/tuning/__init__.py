"""`nanogpt-fast tune`: every machine measures which implementation, form and tile is its fastest, and `auto` uses what it found."""
