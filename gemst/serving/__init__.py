"""The tuned model as a service: what MLflow loads and serves."""
