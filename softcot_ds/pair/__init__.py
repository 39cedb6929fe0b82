"""The embedded default: generated word problems, and a tiny assistant and base model trained on them from scratch."""
