"""gemst: one generative language model for search and recommendation, tuned with GEMS (arXiv 2601.09496)."""

__version__ = "0.1.0"
