"""A page to drop a photo into: `python -m spinmeround_jax.app --help`.

work    photos to heads to Gaussians, one job at a time, with progress; knows no page
page    the page, in Gradio
"""
