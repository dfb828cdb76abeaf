"""What a model will need before it is loaded: `memory.predict` and the counting behind it."""
