"""Models: loading, a tiny one to begin with, packed attention, adapters. The home of transformers and peft."""
