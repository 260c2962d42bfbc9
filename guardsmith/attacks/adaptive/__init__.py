"""Attackers who know the protection: one file for each method that they were made against.

Ordinary attacks are one level up.
"""
