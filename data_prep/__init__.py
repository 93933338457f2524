"""Training data from parametric people: MakeHuman (CC0) heads, grown hair, exact normals.

`python -m data_prep.render_heads --help` renders a data set; `contact_sheet` draws an overview.
"""
