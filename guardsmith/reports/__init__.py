"""What a verification leaves for people and machines: schema, page, terminal, CI formats, comparison, redaction.

Nothing here runs a model.
"""
