"""Prefect: when, where and by whom the stages are run. No maths, no data wrangling."""
