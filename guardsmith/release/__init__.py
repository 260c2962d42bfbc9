"""A hardened model leaves the house: card, bill of materials, signature, upload to the Hub, release notes.

Nothing here trains or judges.
"""
