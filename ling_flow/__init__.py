"""The whole life of a Ling-2.0-style sparse Mixture-of-Experts language model as one declarative pipeline."""

__version__ = "0.1.0"
