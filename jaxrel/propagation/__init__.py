"""LRP as a transformation: rules, composites, the plan, and `lrp` itself.

The public names are in `jaxrel`. This package exports none: its modules `lrp`, `plan` and
`conservation` would be hidden by the functions of the same name.
"""
